"""Holds many dialogues at once by the protocol of their game: whoever has its answer goes on, and the
engine batches what is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.games.game import Game, Scenario
from duologue.rollout.judge.asking import check_share
from duologue.rollout.judge.judge import Judge
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.contexts import Contexts
from duologue.rollout.selfplay.dialogue import Group
from duologue.rollout.selfplay.protocols import PROTOCOLS, Protocol
from duologue.rollout.selfplay.rules import Rules
from duologue.rollout.selfplay.speakers import EngineSpeaker, Opponent, Speak, Speaker, Speakers, prefill
from duologue.rollout.selfplay.talk import Question, Talk

Request = Speak | Question


class _Running:
    """A talk whose protocol waits for `requests`."""

    def __init__(self, talk: Talk, protocol: Protocol) -> None:
        self.talk, self.protocol = talk, protocol
        self.requests: Sequence[Request] = ()
        self.answers: dict[Request, Any] = {}

    def go_on(self) -> None:
        """Take all answers in the order in which they were asked for, and go on to the next requests; none
        at the end.
        """
        answers = [self._heard(request) for request in self.requests]
        try:
            self.requests = self.protocol.send(answers) if self.requests else next(self.protocol)
        except StopIteration as end:
            self.requests = ()
            self.talk.end(end.value)
        self.answers = {}

    def _heard(self, request: Request) -> Any:
        answer = self.answers[request]
        return self.talk.hear(request, answer) if isinstance(request, Speak) else answer


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
        self.speakers = Speakers(EngineSpeaker(policy) if isinstance(policy, Engine) else policy)
        self._running: dict[Request, _Running] = {}

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
    ) -> list[Group]:
        """One group of `group_size` dialogues per scenario, with an opponent on one side where `opponents`
        has one for the group.

        One first speaker per group. All draws follow from `seed` and the group's number, which counts from
        `first_group`; `step` counts for alternating first speakers. RuntimeError as soon as too many
        dialogues are unscored.
        """
        opponents = opponents or [None] * len(scenarios)
        opened = [self._open(s, opponent) for s, opponent in zip(scenarios, opponents, strict=True)]
        prefill([branch for pair in opened for branch in pair])  # forked, or found by later contexts
        groups = []
        for n, (scenario, opponent) in enumerate(zip(scenarios, opponents, strict=True)):
            number, forks = first_group + n, self._fork(opened[n], group_size)
            first = self.rules.opener(seed, number, step)
            groups.append(
                [
                    Talk(
                        self.contexts,
                        self.speakers,
                        scenario,
                        forks[i],
                        first=first,
                        seed=derive_seed(seed, number, i),
                        opponent=opponent,
                    )
                    for i in range(group_size)
                ]
            )
        self._run([talk for group in groups for talk in group])
        for branch in (b for pair in opened for b in pair if b is not None):
            branch.close()
        return [
            Group(scenario=scenario, dialogues=[talk.dialogue for talk in group if talk.dialogue is not None])
            for scenario, group in zip(scenarios, groups, strict=True)
        ]

    def _open(self, scenario: Scenario, opponent: Opponent | None) -> list[Branch | None]:
        """What every dialogue of a group begins with, for each side that speaks in it."""
        told = self.contexts.private_ids(scenario)[: 1 if self.game.alone else 2]
        openings = [self.contexts.chat.open(ids) for ids in told]
        return [self.speakers.open(opponent, role, ids) for role, ids in enumerate(openings)]

    def _fork(self, opened: list[Branch | None], n: int) -> list[list[Branch | None]]:
        """The growing contexts of `n` dialogues, which hold the pages of what was opened in their place."""
        if not self.contexts.grows:
            return [[] for _ in range(n)]
        forks = [[None] * n if branch is None else branch.fork(n) for branch in opened]
        for branch in opened:
            if branch is not None:
                branch.close()
        return [list(pair) for pair in zip(*forks, strict=True)]

    def _run(self, talks: Sequence[Talk]) -> None:
        """Until all are through."""
        protocol = PROTOCOLS[self.game.protocol]
        for talk in talks:
            self._go_on(_Running(talk, protocol(talk)))
        unanswered = unscored = 0
        while self._running:
            for turn, completion in self.speakers.answered():
                self._answered(turn, completion)
                if completion is None:
                    unanswered += 1
                    assert self.speakers.outside is not None
                    check_share(self.speakers.outside, unanswered, len(talks))
            if self.judge is None:
                continue
            for question, answer in self.judge.answered(wait=not self.speakers.busy):
                self._answered(question, answer)
                if answer is None:
                    unscored += 1
                    check_share(self.judge, unscored, len(talks))

    def _answered(self, request: Request, answer: Any) -> None:
        running = self._running.pop(request)
        running.answers[request] = answer
        if len(running.answers) == len(running.requests):
            self._go_on(running)

    def _go_on(self, running: _Running) -> None:
        running.go_on()
        for request in running.requests:
            self._running[request] = running
            if isinstance(request, Speak):
                self.speakers.of(running.talk.opponent, request.role).ask(request)
            else:
                assert self.judge is not None, f"{self.game.protocol} asks a judge"
                self.judge.submit(request.kind, request.case, request)
