"""A scripted negotiator that speaks for a side of live dialogues.

What it says follows from its character, the scenario, what was said so far as text, and the seed that the
dialogue has for its side: nothing is kept between turns, so a resumed run hears the same.
"""

from __future__ import annotations

import random

from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.sequence import Completion
from duologue.rollout.games.catalogue import SIDES, partners
from duologue.rollout.games.game import Game
from duologue.rollout.selfplay.dialogue import FINAL
from duologue.rollout.selfplay.speakers import Speak, Speaker, completion_of


class ScriptedSpeaker(Speaker):
    """Everybody of one character. It hears all turns of a talk, whatever the policy's context holds."""

    def __init__(self, game: Game, tokenizer: Tokenizer, max_rounds: int, character: str) -> None:
        known = partners(game.name)
        if character not in known:
            accepted = f"one of {', '.join(known)}" if known else "none: the game has no scripts"
            raise ValueError(f"character {character!r} in the game {game.name}: accepted is {accepted}")
        self.who = f"scripted:{character}"
        self._game, self._tokenizer = game, tokenizer
        self._utterances, self._character = 2 * max_rounds, character
        self._asked: list[Speak] = []

    @property
    def busy(self) -> bool:
        return bool(self._asked)

    def ask(self, turn: Speak) -> None:
        self._asked.append(turn)

    def answered(self, wait: bool) -> list[tuple[Speak, Completion | None]]:
        asked, self._asked = self._asked, []
        return [
            (turn, completion_of(self._tokenizer, self.words(turn), turn.params.max_new_tokens))
            for turn in asked
        ]

    def words(self, turn: Speak) -> str:
        """An utterance, or the final statement."""
        rng = random.Random(turn.params.seed)
        side = SIDES[self._game.name](self._game, turn.scenario, turn.role, self._character, rng)
        side.utterances = self._utterances
        side.repeat([(said.role == turn.role, said.text) for said in turn.said if said.kind == "utterance"])
        return side.state() if turn.kind == FINAL else side.say(side.act())
