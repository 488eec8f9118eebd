"""Plays many dialogues at once on the engine: two branches per dialogue, each with its own side's private text.

No turn waits for another dialogue's: as soon as a reply is finished its dialogue moves on, and the engine batches whatever is
in flight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import Completion, SamplingParams
from duologue.rollout.games.game import Game, Scenario
from duologue.rollout.selfplay.dialogue import FINAL, POLICY, UTTERANCE, Dialogue, Group, Transcript
from duologue.rollout.selfplay.guests import Guest, Speakers, behind_network, messages, players


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Limits of the talk and how it is sampled. A round is one exchange: both sides speak once.

    The first speaker is "random", drawn per group; "first", side 0; or "alternate", in turn from group to group and step to step.
    """

    max_rounds: int = 7
    max_tokens_per_turn: int = 48
    max_tokens_final: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    final_temperature: float = -1.0  # below 0: as temperature
    final_top_p: float = 0.0  # 0: as top_p
    first_speaker: str = "random"

    def sampling(self, kind: int, seed: int, stop_token_ids: tuple[int, ...]) -> SamplingParams:
        final = kind == FINAL
        temperature = self.final_temperature if final and self.final_temperature >= 0 else self.temperature
        return SamplingParams(
            max_new_tokens=self.max_tokens_final if final else self.max_tokens_per_turn,
            temperature=temperature,
            top_p=((final and self.final_top_p) or self.top_p) if temperature > 0 else 1.0,
            seed=seed,
            stop_token_ids=stop_token_ids,
        )

    def opener(self, seed: int, group: int, step: int) -> int:
        """The side that speaks first."""
        if self.first_speaker == "random":
            return derive_seed(seed, group, "first") % 2
        return (group + step) % 2 if self.first_speaker == "alternate" else 0


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from any parts; stable across processes and Python versions."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Table:
    """One dialogue being held: a small state machine that asks for replies and takes them."""

    def __init__(
        self,
        arena: Arena,
        scenario: Scenario,
        first: int,
        branches: tuple[Branch, Branch],
        seed: int,
        guest: Guest | None,
    ) -> None:
        self.arena = arena
        self.scenario = scenario
        self.first = first
        self.branches = branches
        self.seed = seed
        self.guest = guest
        self.players = players(guest)
        self.version = -1
        self.transcript = Transcript(arena.tokenizer.chat, arena.private_ids(scenario))
        self.utterances = 0
        self.finals: dict[int, str | None] = {}
        self.dialogue: Dialogue | None = None

    def ask(self, role: int, kind: int) -> None:
        """Request `role`'s next words. The branch gets exactly the ids that the view gained since it last spoke."""
        arena, view, branch = self.arena, self.transcript.views[role], self.branches[role]
        self.transcript.ask(role, arena.final_prompt_ids if kind == FINAL else None)
        branch.append(view.token_ids[len(branch) :])
        params = arena.rules.sampling(kind, derive_seed(self.seed, role), arena.stop_token_ids)
        if behind_network(self.guest, role):
            question = arena.game.final_prompt if kind == FINAL else ""
            talk = messages(self.scenario.private_text[role], self.transcript.turns, role, question)
            arena.speakers.ask((self, role, kind), talk, params)
        else:
            arena.speakers.start((self, role, kind), branch, params)

    def take(self, role: int, kind: int, completion: Completion | None) -> None:
        """`role` has spoken: go on to the other side, to the final statements, or to the end. None: no answer, so unscored."""
        if completion is None:
            self.finals[role] = None
            if kind != FINAL or len(self.finals) == 2:
                self.end(None, unscored=True)
            return
        assert self.version in (-1, completion.weights_version), "the weights changed within a dialogue"
        self.version = completion.weights_version
        text = self.arena.tokenizer.decode(completion.token_ids).strip()
        guest = self.players[role] != POLICY
        self.transcript.say(
            role, completion.token_ids, completion.logprobs or None, kind, text, completion.kept, guest
        )
        if kind == FINAL:
            self.finals[role] = text
            if len(self.finals) == 2:
                first, second = self.finals[0], self.finals[1]
                self.end(None, unscored=True) if first is None or second is None else self.end(
                    (first, second)
                )
            return
        self.utterances += 1
        if self.arena.game.closes(text):
            for side in (role, 1 - role):
                self.ask(side, FINAL)
        elif self.utterances == 2 * self.arena.rules.max_rounds:
            self.end(None)
        else:
            self.ask(1 - role, UTTERANCE)

    def end(self, finals: tuple[str, str] | None, unscored: bool = False) -> None:
        views = self.transcript.views
        for view, branch in zip(views, self.branches, strict=True):
            assert view.token_ids[: len(branch)] == branch.token_ids, "a branch and its view went apart"
            branch.close()
        self.dialogue = Dialogue(
            scenario=self.scenario,
            first_speaker=self.first,
            turns=self.transcript.turns,
            views=views,
            players=self.players,
            outcome=None if unscored else self.arena.game.judge(self.scenario, finals),
            weights_version=self.version,
        )


class Arena:
    """`play` holds groups of dialogues under `rules` and has `game` judge them."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, game: Game, rules: Rules) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.game = game
        self.rules = rules
        self.final_prompt_ids = tokenizer.encode(game.final_prompt)
        self.stop_token_ids = tuple(tokenizer.stop_token_ids)
        self.speakers: Speakers[tuple[_Table, int, int]] = Speakers(engine)

    def private_ids(self, scenario: Scenario) -> tuple[list[int], list[int]]:
        first, second = scenario.private_text
        return self.tokenizer.encode(first), self.tokenizer.encode(second)

    def play(
        self,
        scenarios: list[Scenario],
        *,
        group_size: int,
        seed: int,
        guests: Sequence[Guest | None] | None = None,
    ) -> list[Group]:
        """One group of `group_size` dialogues per scenario, with a guest on one side where `guests` has one for the group.

        One first speaker per group; all draws follow from `seed`. RuntimeError when too many dialogues are unscored.
        """
        guests = guests or [None] * len(scenarios)
        bases = [self._open(scenario, guest) for scenario, guest in zip(scenarios, guests, strict=True)]
        self.speakers.prefill(
            (guest, role, pair[role]) for guest, pair in zip(guests, bases, strict=True) for role in (0, 1)
        )
        tables: list[list[_Table]] = []
        for g, (scenario, pair, guest) in enumerate(zip(scenarios, bases, guests, strict=True)):
            first = self.rules.opener(seed, g, self.engine.weights_version)
            forks = [branch.fork(group_size) for branch in pair]
            group = [
                _Table(self, scenario, first, (forks[0][i], forks[1][i]), derive_seed(seed, g, i), guest)
                for i in range(group_size)
            ]
            tables.append(group)
            for branch in pair:
                branch.close()
        for group in tables:
            for table in group:
                table.ask(table.first, UTTERANCE)
        self._run(len(scenarios) * group_size)
        return [
            Group(scenario=scenario, dialogues=[t.dialogue for t in group if t.dialogue is not None])
            for scenario, group in zip(scenarios, tables, strict=True)
        ]

    def _open(self, scenario: Scenario, guest: Guest | None) -> tuple[Branch, Branch]:
        first, second = (self.tokenizer.chat.open(ids) for ids in self.private_ids(scenario))
        return self.speakers.open(guest, 0, first), self.speakers.open(guest, 1, second)

    def _run(self, n_tables: int) -> None:
        unanswered = 0
        while self.speakers.busy:
            for (table, role, kind), completion in self.speakers.step():
                table.take(role, kind, completion)
                if completion is None:
                    unanswered += 1
                    self.speakers.check_share(unanswered, n_tables)
