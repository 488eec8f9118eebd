"""Holds many dialogues at once by the protocol of their game: whoever has its answer goes on, and the
engine batches what is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.games.game import Game, Scenario
from duologue.rollout.judge.asking import check_share
from duologue.rollout.judge.judge import Judge
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.contexts import Contexts
from duologue.rollout.selfplay.dialogue import Group
from duologue.rollout.selfplay.partners import ScriptedSpeaker
from duologue.rollout.selfplay.protocols import PROTOCOLS
from duologue.rollout.selfplay.question import Question
from duologue.rollout.selfplay.rules import Rules
from duologue.rollout.selfplay.speakers import EngineSpeaker, Opponent, Speak, Speaker, Speakers, prefill
from duologue.rollout.selfplay.talk import Talk


class Arena:
    """`play` holds groups of dialogues on `game` under `rules`. `policy`: an engine on its weights, or
    somebody who speaks for it.

    `judge` answers the questions of protocols that ask any.
    """

    def __init__(
        self,
        policy: Engine | Speaker,
        tokenizer: Tokenizer,
        game: Game,
        rules: Rules,
        judge: Judge | None = None,
    ) -> None:
        self.tokenizer, self.game, self.rules, self.judge = tokenizer, game, rules, judge
        self.contexts = Contexts(tokenizer, game, rules)
        self.speakers = Speakers(
            EngineSpeaker(policy) if isinstance(policy, Engine) else policy,
            partial(ScriptedSpeaker, game, tokenizer, rules.max_rounds),
        )
        self._waiting: dict[Speak | Question, Talk] = {}
        self.lost = 0, 0  # dialogues not answered, and not judged, since whoever counts them set it to 0

    @property
    def engine(self) -> Engine:
        """The policy's."""
        assert isinstance(self.speakers.policy, EngineSpeaker)
        return self.speakers.policy.engine

    def play(
        self,
        scenarios: Sequence[Scenario],
        *,
        group_size: int,
        seed: int,
        opponents: Sequence[Opponent | None] | None = None,
        step: int = 0,
        first_group: int = 0,
        openers: Sequence[int] | None = None,
        chosen: Sequence[int] | None = None,
    ) -> list[Group]:
        """One group of `group_size` dialogues per scenario, with an opponent on one side where `opponents`
        has one for the group.

        One first speaker per group, of `openers` or by the rules. All draws follow from `seed` and the
        group's number, which counts from `first_group`; `step` counts for alternating first speakers.
        `chosen` are the places of those that are played here. RuntimeError as soon as too many dialogues of
        all are unscored.
        """
        opponents = opponents or [None] * len(scenarios)
        chosen = range(len(scenarios)) if chosen is None else chosen
        self.contexts.limit = self._limit(opponents)
        opened = [self._open(scenarios[n], opponents[n]) for n in chosen]
        fit = [b for pair in opened for b in pair if b is None or self.contexts.takes(len(b))]
        prefill(fit)  # forked, or found by later contexts
        talks: list[Talk] = []
        for n, contexts in zip(chosen, opened, strict=True):
            number, opponent = first_group + n, opponents[n]
            first = self.rules.opener(seed, number, step) if openers is None else openers[n]
            talks += [
                Talk(
                    self.contexts,
                    self.speakers,
                    scenarios[n],
                    branches,
                    first=first,
                    seed=derive_seed(seed, number, i),
                    opponent=opponent,
                )
                for i, branches in enumerate(self._fork(contexts, group_size))
            ]
        self._run(talks, group_size * len(scenarios), group_size * self.from_outside(opponents))
        for branch in (b for pair in opened for b in pair if b is not None):
            branch.close()
        ended = iter(talks)
        return [
            Group(scenario=scenarios[n], dialogues=[next(ended).dialogue for _ in range(group_size)])
            for n in chosen
        ]

    def _limit(self, opponents: Sequence[Opponent | None]) -> int | None:
        """Tokens that a context of every engine at work can have; None where the policy has none."""
        if not isinstance(self.speakers.policy, EngineSpeaker):
            return None
        engines = {self.engine, *(o.engine for o in opponents if o is not None and o.engine is not None)}
        return min(engine.most_tokens for engine in engines)

    def _open(self, scenario: Scenario, opponent: Opponent | None) -> list[Branch | None]:
        """What every dialogue of a group begins with, for each side that speaks in it."""
        told, chat = self.contexts.private_ids(scenario), self.contexts.chat
        sides = (0,) if self.game.alone else (0, 1)
        return [self.speakers.open(opponent, side, chat.open(told[side])) for side in sides]

    def _fork(self, opened: list[Branch | None], n: int) -> list[list[Branch | None]]:
        """The growing contexts of `n` dialogues, which hold the pages of what was opened in their place."""
        if not self.contexts.grows:
            return [[] for _ in range(n)]
        forks = [[None] * n if branch is None else branch.fork(n) for branch in opened]
        for branch in opened:
            if branch is not None:
                branch.close()
        return [list(pair) for pair in zip(*forks, strict=True)]

    def _run(self, talks: Sequence[Talk], total: int, outside: int) -> None:
        """Until all are through. With those that others play there are `total`, so many with somebody
        outside.
        """
        protocol = PROTOCOLS[self.game.protocol]
        for talk in talks:
            talk.protocol = protocol(talk)
            self._go_on(talk)
        unanswered, unscored = 0, 0
        while self._waiting:
            for turn, completion in self.speakers.answered():
                self._answered(turn, completion)
                if completion is None:
                    unanswered += 1
                    assert self.speakers.outside is not None
                    check_share(self.speakers.outside, unanswered, outside)
            if self.judge is None:
                continue
            for question, answer in self.judge.answered(wait=not self.speakers.busy):
                self._answered(question, answer)
                if answer is None:
                    unscored += 1
                    check_share(self.judge, unscored, total)
        self.lost = self.lost[0] + unanswered, self.lost[1] + unscored

    def from_outside(self, opponents: Sequence[Opponent | None]) -> int:
        """How many of them may fail to answer."""
        guests = [self.speakers.of(o, o.role) for o in opponents if o is not None]
        return sum(guest is self.speakers.outside for guest in guests)

    def _answered(self, request: Speak | Question, answer: Any) -> None:
        talk = self._waiting.pop(request)
        talk.answers[request] = answer
        if len(talk.answers) == len(talk.requests):
            self._go_on(talk)

    def _go_on(self, talk: Talk) -> None:
        talk.go_on()
        for request in talk.requests:
            self._waiting[request] = talk
            if isinstance(request, Speak):
                self.speakers.of(talk.opponent, request.role).ask(request)
            else:
                assert self.judge is not None, f"{self.game.protocol} asks a judge"
                self.judge.submit(request.kind, request.case, request)
