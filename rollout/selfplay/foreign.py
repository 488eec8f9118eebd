"""A policy whose tokenizer is another than the arena's speaks for a side: words pass between them as text.

It has its own ids for what it was told and what was said, on an engine of its own, and what it says is
tokenised once for the arena, as a server's words are. Its tokens are nobody's to train.
"""

from __future__ import annotations

from dataclasses import replace

from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import Completion, Request
from duologue.rollout.engine.trie import TokenTrie
from duologue.rollout.selfplay.speakers import Speak, Speaker, completion_of


class ForeignSpeaker(Speaker):
    """`engine` and `tokenizer` are the policy's, `heard_by` is the arena's tokenizer."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, heard_by: Tokenizer) -> None:
        self._engine, self._tokenizer, self._heard_by = engine, tokenizer, heard_by
        self._turns: dict[Request, tuple[Speak, Branch]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._turns)

    def ask(self, turn: Speak) -> None:
        branch = self._engine.open(self.context(turn))
        chat = self._tokenizer.chat
        params = replace(turn.params, stop_token_ids=tuple(chat.stop_token_ids))
        if turn.legal is not None:
            trie = TokenTrie([[*self._tokenizer.encode(text), chat.end_token_id] for text in turn.legal])
            params = replace(params, allow=trie, max_new_tokens=trie.longest)
        request = self._engine.start(branch, params)
        self._turns[request] = turn, branch

    def answered(self, wait: bool) -> list[tuple[Speak, Completion | None]]:
        answers: list[tuple[Speak, Completion | None]] = []
        for request in self._engine.step():
            turn, branch = self._turns.pop(request)
            branch.close()
            text = self._tokenizer.decode(request.completion.token_ids)
            answers.append((turn, completion_of(self._heard_by, text, turn.params.max_new_tokens)))
        return answers

    def context(self, turn: Speak) -> list[int]:
        """What the side has before it, in its own ids."""
        chat, encode = self._tokenizer.chat, self._tokenizer.encode
        ids = chat.open(encode(turn.told))
        for said in turn.heard:
            words = encode(said.text)
            own = said.role == turn.role and said.kind != "prompt"
            ids = ids + (chat.said(words) if own else chat.heard(words))
        if turn.question:
            ids = ids + chat.heard(encode(turn.question))
        return ids + chat.reply()
