"""What a side has before it when it speaks, as ids: a context that grows, one of the latest turns, or one
for a final statement.

Nothing that was sampled is tokenised again: turns go into a context with the ids that they have.
"""

from __future__ import annotations

from collections.abc import Sequence

from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.trie import TokenTrie
from duologue.rollout.games.game import Game, Scenario
from duologue.rollout.selfplay.dialogue import Turn, View
from duologue.rollout.selfplay.rules import Rules

TRIES = 4096  # that are kept


class Contexts:
    """Of all dialogues on one game. `grows`: a side's context lives as long as the dialogue, and its KV
    stays.
    """

    def __init__(self, tokenizer: Tokenizer, game: Game, rules: Rules) -> None:
        self.tokenizer, self.game, self.rules = tokenizer, game, rules
        self.grows = rules.context == "full" and not game.alone
        self.chat = tokenizer.chat if self.grows else tokenizer.turn_chat
        self.limit: int | None = None  # tokens that a context can have, whoever speaks from it
        self._tries: dict[tuple[str, ...], TokenTrie] = {}
        self.question_ids = tokenizer.encode(game.final_prompt) if game.final_prompt else None

    def private_ids(self, scenario: Scenario) -> tuple[list[int], list[int]]:
        """What each side is told: the shared text first, so that its KV is shared too."""
        shared = self._encode(scenario.shared_text)
        first, second = (self.tokenizer.encode(text) for text in scenario.private_text)
        return [*shared, *first], [*shared, *second]

    def recent(self, scenario: Scenario, role: int, turns: Sequence[Turn]) -> View:
        """A context of `role` in which only these turns were said before."""
        chat, view = self.chat, View()
        view.prompt(chat.open(self.private_ids(scenario)[role]))
        for turn in turns:
            words = self._words(turn)
            view.prompt(chat.said(words) if turn.role == role else chat.heard(words))
        view.prompt(chat.reply())
        return view

    def final(self, scenario: Scenario, turns: Sequence[Turn]) -> View:
        """The context of a final statement that is made apart from the talk: the shared text, then the
        game's request with all that was said, each turn after its persona's name.
        """
        before, *after = self.game.final_parts(scenario)
        request = self._encode(before)
        for part in after:
            for i, turn in enumerate(turns):
                label = f"{scenario.personas[turn.role].name}: "
                request += self._encode(f"\n\n{label}" if i else label) + self._words(turn)
            request += self._encode(part)
        chat, view = self.chat, View()
        view.prompt(chat.open(self._encode(scenario.shared_text)) + chat.heard(request) + chat.reply())
        return view

    def takes(self, length: int) -> bool:
        """Whether something can be said after so many ids."""
        return self.limit is None or length < self.limit

    def holds(self, view: View, heard: list[int]) -> bool:
        """Whether a side's context can take these words of the other and a turn of its own."""
        return self.limit is None or len(view.token_ids) + self._turn_length(heard) <= self.limit

    def _turn_length(self, heard: list[int]) -> int:
        frames = len(self.chat.reply()) + len(self.chat.close_reply(False))
        return frames + self.rules.max_tokens_per_turn + (len(self.chat.heard(heard)) if heard else 0)

    def trie(self, legal: tuple[str, ...]) -> TokenTrie:
        """The ids of these texts, each with the token that ends a turn. ValueError for one that does not fit
        into a turn, or that no tokens stand for.
        """
        if legal not in self._tries:
            if len(self._tries) >= TRIES:
                self._tries.clear()
            self._tries[legal] = TokenTrie([self._move(text) for text in legal])
        return self._tries[legal]

    def _move(self, text: str) -> list[int]:
        ids = [*self.tokenizer.encode(text), self.chat.end_token_id]
        read, limit = self.tokenizer.decode(ids).strip(), self.rules.max_tokens_per_turn
        if read != text:
            raise ValueError(f"the legal move {text!r} is read back as {read!r}: accepted is text that stays")
        if len(ids) > limit:
            accepted = f"{len(ids)} or more for the legal move {text!r}"
            raise ValueError(f"dialogue.max_tokens_per_turn = {limit}: accepted is {accepted}")
        return ids

    def length_after(self, scenario: Scenario, turns: Sequence[Turn], role: int) -> int:
        """Tokens of the longest context that `role` can have to speak on next, once these turns were said."""
        views = [self.recent(scenario, role, turns if self.grows else turns[-2:])]
        if self.game.final_parts(scenario):
            views.append(self.final(scenario, turns))
        return max(len(view.token_ids) for view in views)

    def longest(self) -> int:
        """Tokens that the longest context of any dialogue can take."""
        rules, chat = self.rules, self.chat
        scenario = self.game.longest(lambda text: len(self._encode(text)))
        if self.game.observed:  # a talk ends before a context is full
            told = max(len(chat.open(ids)) for ids in self.private_ids(scenario))
            return told + self._turn_length(self._encode(self.game.opening(scenario)))
        said = max(len(chat.said([])), len(chat.reply()) + len(chat.close_reply(False)))
        turns = 2 * rules.max_rounds
        heard = turns if self.grows else 2
        told = max(len(chat.open(ids)) for ids in self.private_ids(scenario))
        talk = told + heard // 2 * (2 * rules.max_tokens_per_turn + said + len(chat.heard([])))
        if not self.grows:
            talk += len(chat.reply()) + rules.max_tokens_per_turn
        if self.question_ids is not None:
            talk += len(chat.heard(self.question_ids)) + said + rules.max_tokens_final
        if not self.game.final_parts(scenario):
            return talk
        label = max((len(self._encode(f"\n\n{p.name}: ")) for p in scenario.personas), default=0)
        words = turns * (rules.max_tokens_per_turn + label) if scenario.personas else 0
        final = len(self.final(scenario, ()).token_ids) + words + rules.max_tokens_final
        return final if self.game.alone else max(talk, final)

    def _words(self, turn: Turn) -> list[int]:
        """The ids of a turn without its stop token."""
        stopped = turn.token_ids[-1:] and turn.token_ids[-1] in self.chat.stop_token_ids
        return turn.token_ids[:-1] if stopped else turn.token_ids

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []
