"""Two personas look for a resolution of a dilemma, judged by somebody else; or the policy resolves it alone.

A round is one exchange. After every round a judge says whether the two agree; when they do, side 0 writes the resolution from the
dilemma, both personas and the dialogue, and the judge scores it. Judges answer while other dialogues go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import Completion
from duologue.rollout.games.dilemma import DilemmaGame
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.games.template import fill
from duologue.rollout.judge.judge import UNSCORED, Answer, FeedbackJudge
from duologue.rollout.judge.questions import AGREEMENT, ASPECTS, SCORE, Case
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.arena import Rules
from duologue.rollout.selfplay.dialogue import (
    FINAL,
    KINDS,
    POLICY,
    UTTERANCE,
    Dialogue,
    Group,
    Transcript,
    Turn,
    View,
)
from duologue.rollout.selfplay.guests import Guest, Speakers, behind_network, messages, players


@dataclass(frozen=True, kw_only=True, slots=True)
class TalkRules(Rules):
    """`context` "full": a side's context grows, its KV stays. "last_2": each turn sees the two before it, in a context of its own.

    `always_final`: a final is written, and not scored, without an agreement too.
    """

    context: str = "last_2"
    always_final: bool = False


class _Talk:
    """One dialogue being held: a small state machine, moved on by completions and by the judge's answers."""

    def __init__(
        self, arena: Deliberation, scenario: Scenario, first: int, seed: int, guest: Guest | None
    ) -> None:
        self.arena, self.scenario, self.first, self.seed, self.guest = arena, scenario, first, seed, guest
        self.players = players(guest)
        self.transcript = Transcript(arena.chat, arena.private_ids(scenario))
        self.turns = self.transcript.turns
        opened = (
            arena.speakers.open(guest, role, view.token_ids)
            for role, view in enumerate(self.transcript.views)
        )
        self.branches = [*opened] if arena.grows else []
        self.views: list[tuple[int, View]] = [*enumerate(self.transcript.views)] if arena.grows else []
        self.rounds = 0
        self.agreed = arena.game.alone
        self.version = -1
        self.dialogue: Dialogue | None = None

    def speak(self) -> None:
        """The next side's turn."""
        role = (self.first + len(self.turns)) % 2
        if not self.branches:
            self._generate(role, UTTERANCE, self.arena.recent_view(self.scenario, role, self.turns[-2:]))
            return
        self.transcript.ask(role)
        view, branch = self.transcript.views[role], self.branches[role]
        branch.append(view.token_ids[len(branch) :])
        self._generate(role, UTTERANCE, view, branch)

    def write(self) -> None:
        """Side 0 writes the resolution, or side 1 where 0 is not the policy."""
        self._generate(self.players.index(POLICY), FINAL, self.arena.final_view(self.scenario, self.turns))

    def _generate(self, role: int, kind: int, view: View, branch: Branch | None = None) -> None:
        if branch is None:
            self.views.append((role, view))
            branch = self.arena.speakers.open(self.guest, role, view.token_ids)
        self.now = role, kind, view, branch
        arena, seed = self.arena, derive_seed(self.seed, "final" if kind == FINAL else len(self.turns))
        params = arena.rules.sampling(kind, seed, tuple(arena.chat.stop_token_ids))
        if behind_network(self.guest, role):
            heard = self.turns if arena.grows else self.turns[-2:]
            talk = messages(self.scenario.shared_text + self.scenario.private_text[role], heard, role)
            arena.speakers.ask(self, talk, params)
        else:
            arena.speakers.start(self, branch, params)

    def take(self, completion: Completion | None) -> None:
        """The words that `_generate` asked for; None is no answer."""
        if completion is None:
            if self.now[3] not in self.branches:
                self.now[3].close()
            self.end(UNSCORED)
            return
        assert self.version in (-1, completion.weights_version), "the weights changed within a dialogue"
        self.version = completion.weights_version
        role, kind, view, branch = self.now
        ids, logprobs, guest = completion.token_ids, completion.logprobs or None, self.players[role] != POLICY
        text = self.arena.tokenizer.decode(ids).strip()
        if branch in self.branches:
            self.transcript.say(role, ids, logprobs, kind, text, completion.kept, guest)
        else:
            view.prompt(ids) if guest else view.said(ids, logprobs, kind, completion.kept)
            assert view.token_ids == branch.token_ids or not logprobs, "a branch and its view went apart"
            branch.close()
            self.turns.append(Turn(role=role, kind=KINDS[kind], text=text, token_ids=ids, logprobs=logprobs))
        if kind == FINAL and self.agreed:
            self._submit(SCORE)
        elif kind == FINAL:
            self.end("no_agreement")
        elif len(self.turns) % 2:
            self.speak()
        else:
            self.rounds += 1
            self._submit(AGREEMENT)

    def _submit(self, kind: str) -> None:
        talk = [turn for turn in self.turns if turn.kind != "final"]
        case = Case(
            dilemma=self.scenario.shared_text,
            personas=self.scenario.personas,
            turns=tuple((turn.role, turn.text) for turn in talk),
            completion="".join(turn.text for turn in self.turns if turn.kind == "final"),
        )
        self.arena.judge.submit(kind, case, (self, kind))

    def hear(self, kind: str, answer: Answer) -> None:
        """The judge has answered; None is no answer."""
        if answer is None:
            self.end(UNSCORED)
        elif kind == SCORE:
            self.end(None, {aspect: float(answer[aspect]) for aspect in ASPECTS})
        elif answer["agreed"]:
            self.agreed = True
            self.write()
        elif self.rounds < self.arena.rules.max_rounds:
            self.speak()
        elif self.arena.rules.always_final:
            self.write()
        else:
            self.end("no_agreement")

    def end(self, failure: str | None, aspects: dict[str, float] | None = None) -> None:
        for branch in self.branches:
            branch.close()
        score = sum(aspects.values()) / len(aspects) if aspects else 0.0
        self.dialogue = Dialogue(
            scenario=self.scenario,
            first_speaker=self.first,
            turns=self.turns,
            views=tuple(view for _, view in self.views),
            view_roles=tuple(role for role, _ in self.views),
            players=self.players,
            outcome=Outcome(
                agreed=self.agreed,
                scores=(score, score),
                failure=failure,
                metrics=aspects or {},
                rounds=self.rounds,
            ),
            weights_version=self.version,
        )


class Deliberation:
    """`play` holds groups of dialogues on dilemmas; the counterpart of `Arena` for what a judge scores."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        game: DilemmaGame,
        rules: TalkRules,
        judge: FeedbackJudge | None,
    ) -> None:
        """`judge` None: for the contexts alone, where a person talks with the policy."""
        self.engine, self.tokenizer, self.game, self.rules, self._judge = (
            engine,
            tokenizer,
            game,
            rules,
            judge,
        )
        self.grows = rules.context == "full" and not game.alone
        self.chat = tokenizer.chat if self.grows else tokenizer.turn_chat
        self.speakers: Speakers[_Talk] = Speakers(engine)

    @property
    def judge(self) -> FeedbackJudge:
        assert self._judge is not None
        return self._judge

    def play(
        self,
        scenarios: list[Scenario],
        *,
        group_size: int,
        seed: int,
        guests: Sequence[Guest | None] | None = None,
    ) -> list[Group]:
        """One group of `group_size` dialogues per scenario, with a guest on one side where `guests` has one for the group; all draws
        follow from `seed`. The policy writes the resolution, always.

        RuntimeError as soon as too many of them are unscored.
        """
        roles = (0,) if self.game.alone else (0, 1)
        guests = guests or [None] * len(scenarios)
        sides = [(guest, s, role) for guest, s in zip(guests, scenarios, strict=True) for role in roles]
        prefixes = [
            self.speakers.open(guest, role, self.chat.open(self.private_ids(s)[role]))
            for guest, s, role in sides
        ]
        self.speakers.prefill(
            (*side[::2], branch) for side, branch in zip(sides, prefixes, strict=True)
        )  # later contexts find these
        groups = []
        for g, (scenario, guest) in enumerate(zip(scenarios, guests, strict=True)):
            first = self.rules.opener(seed, g, self.engine.weights_version)
            groups.append(
                [_Talk(self, scenario, first, derive_seed(seed, g, i), guest) for i in range(group_size)]
            )
        talks = [talk for group in groups for talk in group]
        for talk in talks:
            talk.write() if self.game.alone else talk.speak()
        self._run(talks)
        for branch in prefixes:
            branch.close()
        return [
            Group(scenario=scenario, dialogues=[talk.dialogue for talk in group if talk.dialogue is not None])
            for scenario, group in zip(scenarios, groups, strict=True)
        ]

    def _run(self, talks: list[_Talk]) -> None:
        open_talks, unscored, unanswered = len(talks), 0, 0
        while open_talks:
            for talk, completion in self.speakers.step():
                talk.take(completion)
                open_talks -= talk.dialogue is not None
                if completion is None:
                    unanswered += 1
                    self.speakers.check_share(unanswered, len(talks))
            for (talk, kind), answer in self.judge.answered(wait=not self.speakers.busy):
                talk.hear(kind, answer)
                open_talks -= talk.dialogue is not None
                unscored += answer is None
                self.judge.check_share(unscored, len(talks))

    # ---- contexts ----------------------------------------------------------------------------------------------------

    def private_ids(self, scenario: Scenario) -> tuple[list[int], list[int]]:
        """What each side is told: the shared text first, so that its KV is shared too, then its own persona."""
        shared = self.tokenizer.encode(scenario.shared_text)
        first, second = (self.tokenizer.encode(text) for text in scenario.private_text)
        return [*shared, *first], [*shared, *second]

    def recent_view(self, scenario: Scenario, role: int, turns: list[Turn]) -> View:
        """A context of `role` in which only these turns were said before."""
        chat, view = self.chat, View()
        view.prompt(chat.open(self.private_ids(scenario)[role]))
        for turn in turns:
            view.prompt(chat.said(self._words(turn)) if turn.role == role else chat.heard(self._words(turn)))
        view.prompt(chat.reply())
        return view

    def final_view(self, scenario: Scenario, turns: list[Turn]) -> View:
        """The context of the resolution: dilemma, both personas and all that was said, id for id; or the dilemma alone."""
        chat, encode, view = self.chat, self.tokenizer.encode, View()
        if self.game.alone:
            question = encode(self.game.answer)
        else:
            personas = "\n\n".join(f"{p.name}: {p.instructions}" for p in scenario.personas)
            before, *between, after = self.game.final.split("{transcript}")
            question = encode(fill(before, {"personas": personas}))
            for part in [*between, after]:
                for i, turn in enumerate(turns):
                    question += encode(
                        ("\n\n" if i else "") + f"{scenario.personas[turn.role].name}: "
                    ) + self._words(turn)
                question += encode(fill(part, {"personas": personas}))
        view.prompt([*chat.open(encode(scenario.shared_text)), *chat.heard(question), *chat.reply()])
        return view

    def _words(self, turn: Turn) -> list[int]:
        """The ids of a turn without its stop token."""
        return turn.token_ids[: len(turn.token_ids) - (turn.token_ids[-1] in self.chat.stop_token_ids)]

    def longest_context(self) -> int:
        """Tokens that the longest possible context can take."""
        rules, encode, chat = self.rules, self.tokenizer.encode, self.chat
        frame = len(chat.said([])) + len(chat.heard([])) + len(chat.reply())
        head = (
            len(chat.open([]))
            + frame
            + max(len(encode(text)) for items in self.game.items.values() for _, text, _ in items)
        )
        if self.game.alone:
            return head + len(encode(self.game.answer)) + rules.max_tokens_final
        personas, turns = self.game.personas(), 2 * rules.max_rounds
        private = max(len(encode(self.game.private_text(p))) for p in personas)
        described = max(len(encode(f"\n\n{p.name}: {p.instructions}")) for p in personas)
        label = max(len(encode(f"\n\n{p.name}: ")) for p in personas)
        talk = (
            private
            + (turns if self.grows else 2) * (rules.max_tokens_per_turn + frame)
            + rules.max_tokens_per_turn
        )
        final = (
            len(encode(self.game.final))
            + 2 * described
            + turns * (rules.max_tokens_per_turn + label)
            + rules.max_tokens_final
        )
        return head + max(talk, final)
