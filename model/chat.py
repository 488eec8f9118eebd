"""A chat template, compiled once into id fragments around turns.

Text is a view: after compilation no template is rendered and no sampled text is tokenised again. Compilation renders conversations
with marker contents, cuts the fragments out between the markers, and checks that longer conversations are the concatenation of
those fragments. A template that renders earlier turns differently once later ones exist cannot be compiled, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, str]


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def render(template: str, messages: list[Message], variables: dict[str, Any], add_generation_prompt: bool) -> str:
    """A conversation as text, in the environment that Hugging Face templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    compiled = environment.from_string(template)
    return compiled.render(
        messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
        enable_thinking=False, **variables,
    )  # fmt: skip


def _mark(i: int) -> str:
    return f"m{i}zqx"  # survives trimming, and stands in no template


class Chat:
    """Id fragments of a template: `open`, `heard`, `reply`, `close_reply` joined in order are the ids of the conversation."""

    def __init__(self, template: str, variables: dict[str, Any], encode: Callable[[str], list[int]], stop_token_ids: set[int]) -> None:
        """`encode` parses special tokens; `variables` are the tokenizer's own (bos_token, eos_token, ...)."""
        self._template = template
        self._variables = variables
        before, after_system = self._cut(["system", "user"], [0])
        heard_before, heard_after = self._cut(["system", "user"], [1], strip=before + _mark(0) + after_system)
        reply, closing = self._cut_reply()
        self._check(before, after_system, heard_before, heard_after, reply, closing)
        self._open = (encode(before), encode(after_system))
        self._heard = (encode(heard_before), encode(heard_after))
        self._reply = encode(reply)
        self._closing = encode(closing)
        stops = set(stop_token_ids)
        self._end = self._closing[0] if self._closing and self._closing[0] in stops else None
        if not stops:
            raise ValueError("the chat template ends a reply with no token that stops generation; name one as eos_token")
        self.stop_token_ids = frozenset(stops)

    def open(self, system_ids: list[int]) -> list[int]:
        """Everything before the first turn: the template's own beginning and the system turn with these ids."""
        return [*self._open[0], *system_ids, *self._open[1]]

    def heard(self, token_ids: list[int]) -> list[int]:
        """The other side's turn."""
        return [*self._heard[0], *token_ids, *self._heard[1]]

    def reply(self) -> list[int]:
        """What stands before our own words."""
        return list(self._reply)

    def close_reply(self, stopped: bool) -> list[int]:
        """What follows our own words. When a stop token was sampled (`stopped`) it already stands there."""
        return self._closing[1:] if stopped and self._end is not None else list(self._closing)

    # ---- compilation -------------------------------------------------------------------------------------------------

    def _render(self, roles: list[str], generate: bool = False) -> str:
        messages = [{"role": role, "content": _mark(i)} for i, role in enumerate(roles)]
        try:
            return render(self._template, messages, self._variables, generate)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not take the turns {', '.join(roles)}: {error}") from error

    def _cut(self, roles: list[str], keep: list[int], strip: str | None = None) -> tuple[str, str]:
        """What stands before and after turn `keep[0]`, from a conversation of that turn and one more."""
        turn = keep[0]
        text = self._render(roles[: turn + 1])
        if strip is not None:
            if not text.startswith(strip):
                self._refuse(0, "the system turn changes once a user turn follows")
            text = text[len(strip) :]
        parts = text.split(_mark(turn))
        if len(parts) != 2:
            raise ValueError(f"the chat template renders the {roles[turn]} turn's content {len(parts) - 1} times, accepted is once")
        return parts[0], parts[1]

    def _cut_reply(self) -> tuple[str, str]:
        prompt = self._render(["system", "user"], generate=True)
        without = self._render(["system", "user"])
        if not prompt.startswith(without):
            self._refuse(1, "the generation prompt changes the turns before it")
        reply = prompt[len(without) :]
        if not reply:
            raise ValueError("the chat template has no generation prompt: nothing marks whose turn it is")
        done = self._render(["system", "user", "assistant"])
        if not done.startswith(prompt + _mark(2)):
            self._refuse(2, "a finished reply does not begin with its generation prompt")
        return reply, done[len(prompt + _mark(2)) :]

    def _check(self, before: str, after_system: str, heard_before: str, heard_after: str, reply: str, closing: str) -> None:
        """Longer conversations, from either first speaker, must be the concatenation of the fragments."""
        pieces = {
            "system": (before, after_system),
            "user": (heard_before, heard_after),
            "assistant": (reply, closing),
        }
        for first in ("user", "assistant"):
            other = "assistant" if first == "user" else "user"
            for n in range(1, 6):
                roles = ["system", *([first, other] * 3)[:n]]
                expected = "".join(f"{pieces[r][0]}{_mark(i)}{pieces[r][1]}" for i, r in enumerate(roles))
                actual = self._render(roles)
                if actual != expected:
                    at = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), len(expected))
                    turn = sum(_mark(i) in expected[:at] for i in range(len(roles)))
                    self._refuse(turn, f"in a conversation of {len(roles)} turns it is rendered differently")

    def _refuse(self, turn: int, reason: str) -> NoReturn:
        raise ValueError(
            f"the chat template rewrites turn {turn}: {reason}. Contexts here are append-only, so a turn must be rendered the "
            "same whatever follows it"
        )
