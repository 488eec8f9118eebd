"""A judge in this process: frozen weights on an engine of their own, for example the policy's own at the
start (self-reward).

It works in the arena's thread, between the arena's steps. Its answers are held to their form (judge/form.py),
so that every checkpoint gives a valid one, and the same whatever else is asked.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import Completion, Request
from duologue.rollout.judge import form
from duologue.rollout.judge.asking import Ask
from duologue.rollout.judge.questions import AGREEMENT, SCORE, Posed

EXPECTED, LIKELIEST = "expected", "likeliest"
KEPT = 64  # answered questions whose KV stays for those to come, as long as the pool has room
COUNTERS = ("prefill_tokens", "shared_tokens", "decode_tokens")  # of the engine
_FORM = 1  # of the answers; another number where another form gives other answers


@dataclass(kw_only=True, eq=False)
class _Open:
    """A question with its readings, of which some are not through."""

    ask: Ask
    left: int
    answers: list[Any]  # of each reading
    fault: str = ""


@dataclass(kw_only=True, eq=False)
class _Reading:
    question: _Open
    number: int
    branch: Branch
    form: form.Form[Any]


class ModelJudge:
    """Answers with the model that `load` gives, which nobody may change. It is loaded when it is first
    needed.

    threshold: how probable an agreement must be. score: of the digits' probabilities, the "expected" value or
    the "likeliest". readings: orders of the aspects over which a score is averaged.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Engine, Tokenizer]],
        *,
        threshold: float = 0.5,
        score: str = EXPECTED,
        readings: int = 1,
    ) -> None:
        self.settings: dict[str, Any] = {
            "threshold": threshold,
            "score": score,
            "readings": readings,
            "form": _FORM,
        }
        self._load = load
        self._open: dict[Request, _Reading] = {}
        self._kept: deque[Branch] = deque()
        self._questions, self._seconds = 0, 0.0  # since the last report
        self._counted = dict.fromkeys(COUNTERS, 0)  # until then

    @cached_property
    def _loaded(self) -> tuple[Engine, Tokenizer]:
        return self._load()

    @cached_property
    def name(self) -> str:
        engine, tokenizer = self._loaded
        return fingerprint(engine.model, tokenizer)

    def ask(self, question: Ask) -> None:
        assert question.posed is not None
        began = time.monotonic()
        orders = form.ORDERS[: self.settings["readings"]] if question.kind == SCORE else form.ORDERS[:1]
        of_all = _Open(ask=question, left=len(orders), answers=[None] * len(orders))
        self._questions += 1
        for number, order in enumerate(orders):
            branch = self._branch(question.posed.text(order))
            made = self._form(question.kind, question.posed, branch, order)
            self._go_on(_Reading(question=of_all, number=number, branch=branch, form=made), None)
        self._seconds += time.monotonic() - began

    def _branch(self, text: str) -> Branch:
        engine, tokenizer = self._loaded
        chat = tokenizer.turn_chat
        return engine.open([*chat.open([]), *chat.heard(tokenizer.encode(text)), *chat.reply()])

    def _form(self, kind: str, posed: Posed, branch: Branch, order: tuple[str, ...]) -> form.Form[Any]:
        writer = form.Writer(branch, self._loaded[1])
        if kind == AGREEMENT:
            return form.agreement(writer, posed.case, self.settings["threshold"])
        return form.scores(writer, order) if kind == SCORE else form.preference(writer)

    def work(self) -> bool:
        began = time.monotonic()
        for request in self._loaded[0].step():
            self._go_on(self._open.pop(request), request.completion)
        self._seconds += time.monotonic() - began
        return True

    def _go_on(self, reading: _Reading, completion: Completion | None) -> None:
        """Ask what the form asks next, or note what it made."""
        question = reading.question
        try:
            # A generator that has not begun takes None.
            params = reading.form.send(completion)  # type: ignore[arg-type]
            self._open[self._loaded[0].start(reading.branch, params)] = reading
            return
        except StopIteration as end:
            question.answers[reading.number] = end.value
        except ValueError as error:  # the question is longer than the judge's context
            question.fault = f"the judge's model: {error}"
        self._keep(reading.branch)
        question.left -= 1
        if question.left == 0:
            self._answer(question)

    def _answer(self, question: _Open) -> None:
        """All readings are through."""
        if question.fault:
            question.ask.done(None, question.fault)
            return
        answer = question.answers[0]
        if question.ask.kind == SCORE:
            answer = form.averaged(question.answers, self.settings["score"] == EXPECTED)
        content = json.dumps(answer)
        try:
            question.ask.check(content)
        except ValueError as error:
            question.ask.done(None, f"the judge's model: {error}")
        else:
            question.ask.done(content, "")

    def _keep(self, branch: Branch) -> None:
        """Later questions find in it what they share: the rubric, the dilemma, the turns before."""
        self._kept.append(branch)
        if len(self._kept) > KEPT:
            self._kept.popleft().close()

    def costs(self) -> dict[str, float]:
        """Tokens whose KV was computed, whose KV was found, that were decoded; seconds."""
        before, n = self._counted, self._questions
        if n:
            stats = self._loaded[0].stats
            self._counted = {name: getattr(stats, name) for name in COUNTERS}
        costs = {f"judge_{name}": (self._counted[name] - before[name]) / max(n, 1) for name in COUNTERS}
        costs["judge_work_seconds"] = self._seconds / max(n, 1)
        self._questions, self._seconds = 0, 0.0
        return costs

    def close(self) -> None:
        self._open.clear()
        self._kept.clear()


@torch.no_grad()
def fingerprint(model: Decoder, tokenizer: Tokenizer) -> str:
    """A name for these weights and this tokenizer: the hash of the tokenizer and of up to 4,096 numbers of
    each parameter, evenly spread.
    """
    digest = hashlib.sha256(tokenizer.digest.encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {[*parameter.shape]} {parameter.dtype}".encode())
        digest.update(flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
    return f"weights {digest.hexdigest()[:32]}"
