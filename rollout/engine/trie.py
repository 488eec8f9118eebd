"""The sequences that a completion may be, as a tree of ids: an `allow` of SamplingParams.

    trie = TokenTrie([[*encode(text), stop] for text in ("accept", "refuse")])
    params = SamplingParams(allow=trie, stop_token_ids=(stop,), max_new_tokens=trie.longest)

The sampler then draws among the ids that go on to one of the sequences, and log-probs are taken over these
alone. Every sequence must end with a stop token, or a completion runs on behind its end, where nothing is
allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Node = dict[int, "Node"]  # of each id that may come: what may follow it


class TokenTrie:
    """Called with the ids drawn so far, it gives those that may come next, ascending."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        """ValueError without a sequence, or for an empty one."""
        self._root: Node = {}
        self.longest = 0
        for sequence in sequences:
            if not sequence:
                raise ValueError("TokenTrie: accepted are sequences of at least one id")
            self.longest = max(self.longest, len(sequence))
            node = self._root
            for token in sequence:
                node = node.setdefault(token, {})
        if not self._root:
            raise ValueError("TokenTrie: accepted is at least one sequence")

    def __call__(self, drawn: Sequence[int]) -> list[int]:
        node = self._root
        for token in drawn:
            node = node[token]
        return sorted(node)
