"""A judge in this process: frozen weights on an engine of their own, for example the policy's own at the
start (self-reward).

It works in the arena's thread, between the arena's steps. Scores are held to their form: the judge only
chooses the four numbers, so that every checkpoint gives a valid answer. An agreement has free quotes and is
strict JSON or asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import Request, SamplingParams
from duologue.rollout.games.dilemma import ASPECTS, HIGHEST
from duologue.rollout.judge.asking import RETRY_TEMPERATURE, Ask
from duologue.rollout.judge.questions import SCORE


class ModelJudge:
    """Answers with the model that `load` gives, which nobody may change. It is loaded when it is first
    needed.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Engine, Tokenizer]],
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        attempts: int = 4,
    ) -> None:
        self.settings: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        self._load = load
        self._attempts = attempts
        self._open: dict[Request, tuple[Ask, int, Branch]] = {}

    @cached_property
    def _loaded(self) -> tuple[Engine, Tokenizer, list[list[int]]]:
        engine, tokenizer = self._load()
        return engine, tokenizer, score_form(tokenizer)

    @cached_property
    def name(self) -> str:
        return fingerprint(self._loaded[0].model)

    def ask(self, question: Ask, attempt: int = 1) -> None:
        engine, tokenizer, form = self._loaded
        chat, scoring = tokenizer.turn_chat, question.kind == SCORE
        branch = engine.open([*chat.open([]), *chat.heard(tokenizer.encode(question.text)), *chat.reply()])
        params = SamplingParams(
            max_new_tokens=len(form) if scoring else self.settings["max_tokens"],
            temperature=self.settings["temperature"] if attempt == 1 else RETRY_TEMPERATURE,
            seed=int.from_bytes(hashlib.sha256(f"{attempt} {question.text}".encode()).digest()[:7], "little"),
            stop_token_ids=tuple(chat.stop_token_ids),
            allow=(lambda so_far: form[len(so_far)]) if scoring else None,
        )
        try:
            self._open[engine.start(branch, params)] = (question, attempt, branch)
        except ValueError as error:  # the question is longer than the judge's context
            branch.close()
            question.done(None, str(error))

    def work(self) -> bool:
        engine, tokenizer, _ = self._loaded
        for request in engine.step():
            question, attempt, branch = self._open.pop(request)
            branch.close()
            content = tokenizer.decode(request.completion.token_ids).strip()
            try:
                question.check(content)
            except ValueError as error:
                if attempt < self._attempts:
                    self.ask(question, attempt + 1)
                else:
                    question.done(None, f"the judge's model: {self._reason(request, error)}")
                continue
            question.done(content, "")
        return True

    def _reason(self, request: Request, error: ValueError) -> str:
        if request.completion.finish_reason == "length":
            return f"the answer was cut at judge.max_tokens = {self.settings['max_tokens']}: {error}"
        return request.completion.error or str(error)

    def close(self) -> None:
        self._open.clear()


def score_form(tokenizer: Tokenizer) -> list[list[int]]:
    """The ids that may stand at each place of {"knowledge":n,...,"reason":""} with a stop token behind."""
    digits = [tokenizer.encode(str(n)) for n in range(HIGHEST + 1)]
    if any(len(ids) != 1 for ids in digits):
        raise ValueError(
            "the judge's tokenizer has no single token for each digit, which judge.backend = 'model' needs"
        )
    form: list[list[int]] = []
    for i, aspect in enumerate(ASPECTS):
        form += [[t] for t in tokenizer.encode(("," if i else "{") + f'"{aspect}":')]
        form.append([ids[0] for ids in digits])
    return [
        *form,
        *([t] for t in tokenizer.encode(',"reason":""}')),
        sorted(tokenizer.turn_chat.stop_token_ids),
    ]


@torch.no_grad()
def fingerprint(model: Decoder) -> str:
    """A name for these weights: the hash of up to 4,096 numbers of each parameter, evenly spread."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {[*parameter.shape]} {parameter.dtype}".encode())
        digest.update(flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
    return f"weights {digest.hexdigest()[:32]}"
