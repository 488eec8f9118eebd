"""One dialogue being held, as its protocol sees it: what was said, and what can be waited for next."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from duologue.rollout.engine.engine import Branch
from duologue.rollout.engine.sequence import Completion
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.contexts import Contexts
from duologue.rollout.selfplay.dialogue import (
    FINAL,
    KINDS,
    POLICY,
    UTTERANCE,
    Asked,
    Dialogue,
    Transcript,
    Turn,
    View,
)
from duologue.rollout.selfplay.question import Question, case_of
from duologue.rollout.selfplay.speakers import LEFT, Opponent, Speak, Speakers


class Talk:
    """A protocol reads `game`, `rules`, `scenario`, `first`, `players` and `turns`, and waits for what
    `turn` and `question` make. With `rules.step_scores` it keeps the scores as they stand in `standing`.
    """

    def __init__(
        self,
        contexts: Contexts,
        speakers: Speakers,
        scenario: Scenario,
        branches: Sequence[Branch | None],
        *,
        first: int,
        seed: int,
        opponent: Opponent | None,
    ) -> None:
        """`branches` hold the growing contexts of both sides, where they grow."""
        self.game: Any = contexts.game  # a protocol knows what its games have
        self.rules, self.scenario, self.first = contexts.rules, scenario, first
        self.opponent = opponent
        self.players = [POLICY, POLICY]
        if opponent is not None:
            self.players[opponent.role] = opponent.name
        self.standing = 0.0, 0.0
        self._so_far: list[tuple[float, float]] = []  # `standing` before each turn that was spoken
        self._left = False
        self.protocol: Generator[Any, Any, Outcome | None]  # it waits for `requests`
        self.requests: Sequence[Speak | Question] = ()
        self.answers: dict[Speak | Question, Any] = {}
        self.dialogue: Dialogue  # at the end
        self._contexts, self._speakers = contexts, speakers
        self._seed, self._branches = seed, branches
        self._transcript = Transcript(contexts.chat, contexts.private_ids(scenario))
        self._version = -1  # of the weights
        self._views: list[tuple[int, View]] = []  # with the role of each
        self._asked: list[Asked] = []
        if contexts.grows:
            self._views += enumerate(self._transcript.views)

    def go_on(self) -> None:
        """Take all answers in the order in which they were asked for, and go on to the next requests; none
        at the end.
        """
        answers = [self._heard(request) for request in self.requests]
        self.answers = {}
        try:
            self.requests = self.protocol.send(answers if self.requests else None)
        except StopIteration as end:
            self.requests = ()
            self._end(end.value)

    def _heard(self, request: Speak | Question) -> Any:
        answer = self.answers[request]
        if isinstance(request, Speak):
            return self._hear(request, answer)
        self._asked.append(request.asked(answer))
        return answer

    @property
    def turns(self) -> list[Turn]:
        return self._transcript.turns

    def left(self) -> bool:
        """Whether a person has ended the talk without a word."""
        return self._left

    def tell(self, role: int, text: str) -> bool:
        """What `role` hears from the game before it speaks next, "" for nothing; False where its context
        could not hold this and a turn: then nothing is told.
        """
        ids = self._contexts.tokenizer.encode(text) if text else []
        if not self._contexts.holds(self._transcript.views[role], ids):
            return False
        if text:
            self._transcript.tell(Turn(role=role, kind="prompt", text=text, token_ids=ids, logprobs=None))
        return True

    def turn(
        self,
        role: int,
        kind: int = UTTERANCE,
        draw: int | str | None = None,
        legal: Sequence[str] | None = None,
    ) -> Speak:
        """`role`'s next words, of the `legal` ones where they are given. Draws of a dialogue that must differ
        have different `draw`s, by default the turn's number.
        """
        seed = derive_seed(self._seed, len(self.turns) if draw is None else draw)
        question = self.game.final_prompt if kind == FINAL else ""
        apart = kind == FINAL and bool(self.game.final_parts(self.scenario))
        grows = self._contexts.grows and not apart
        heard = self.turns[:] if grows or apart else self.turns[-2:]
        if self.game.observed:
            heard = [turn for turn in heard if turn.role == role]
        params = self.rules.sampling(kind, seed, self._contexts.chat.stop_token_ids)
        if legal is not None:
            params = replace(params, allow=self._contexts.trie(tuple(legal)))
        if grows:
            view, branch = self._growing(role, bool(question))
        else:
            if apart:
                view = self._contexts.final(self.scenario, heard)
            else:
                view = self._contexts.recent(self.scenario, role, heard)
            self._views.append((role, view))
            branch = self._speakers.open(self.opponent, role, view.token_ids)
        return Speak(
            role=role,
            kind=kind,
            view=view,
            branch=branch,
            grows=grows,
            params=params,
            told=self.scenario.shared_text + self.scenario.private_text[role],
            heard=heard,
            scenario=self.scenario,
            said=self.turns[:],
            question=question,
            legal=legal,
        )

    def _growing(self, role: int, asked: bool) -> tuple[View, Branch | None]:
        """The side's context; its branch gets exactly the ids that the view gained since it last spoke."""
        self._transcript.ask(role, self._contexts.question_ids if asked else None)
        view, branch = self._transcript.views[role], self._branches[role]
        if branch is not None:
            branch.append(view.token_ids[len(branch) :])
        return view, branch

    def question(self, kind: str, unfinished: bool = False) -> Question:
        """A question to the judge about what was said so far; `unfinished`: this is what it is to score."""
        case = case_of(self.scenario.shared_text, self.scenario.personas, self.turns, unfinished)
        return Question(kind=kind, case=case, turns=len(self.turns))

    def _hear(self, asked: Speak, completion: Completion | None) -> str | None:
        """Take the words that were asked for into the dialogue."""
        if completion is None:
            return None
        if completion.finish_reason == LEFT:
            self._left = True
            return ""
        if asked.branch is not None:
            version = completion.weights_version
            assert self._version in (-1, version), "the weights changed within a dialogue"
            self._version = version
        self._so_far.append(self.standing)
        ids, logprobs = completion.token_ids, completion.logprobs or None
        support = completion.supports if logprobs else None
        opponent = self.players[asked.role] != POLICY
        text = self._contexts.tokenizer.decode(ids).strip()
        turn = Turn(role=asked.role, kind=KINDS[asked.kind], text=text, token_ids=ids, logprobs=logprobs)
        turn.entropies, turn.support_sizes = completion.entropies, completion.supports.sizes
        if asked.grows:
            self._transcript.say(turn, support, opponent, heard=not self.game.observed)
            return text
        asked.view.say(turn, support, opponent)
        if asked.branch is not None:
            assert asked.view.token_ids == asked.branch.token_ids, "a branch and its view went apart"
            asked.branch.close()
        self.turns.append(turn)
        return text

    def _end(self, outcome: Outcome | None) -> None:
        """The protocol is through; without an outcome the dialogue is unscored."""
        for view, branch in zip(self._transcript.views, self._branches, strict=False):
            if branch is not None:
                assert view.token_ids[: len(branch)] == branch.token_ids, "a branch and its view went apart"
                branch.close()
        self.dialogue = Dialogue(
            scenario=self.scenario,
            first_speaker=self.first,
            turns=self.turns,
            views=tuple(view for _, view in self._views),
            view_roles=tuple(role for role, _ in self._views),
            players=(self.players[0], self.players[1]),
            outcome=outcome,
            so_far=tuple(self._so_far) if self.rules.step_scores else (),
            weights_version=self._version,
            asked=self._asked,
        )
