"""A chat template, compiled once into id fragments around turns.

Text is a view: after compilation no template is rendered and no sampled text is tokenised again. Compilation
renders conversations with marker contents, cuts the fragments out between the markers, as text and then as
ids, and checks that longer conversations are the concatenation of those fragments. Contexts are append-only,
so a template that renders a turn differently once others follow is refused, with the turn and both
renderings; where every turn gets a context of its own, such a template is taken as it is (Qwen3's drops the
empty thoughts that stand before a reply). What fragments cannot stand for is refused: no system turn, one
side that must speak first, or today's date.

Contents are inserted as ids, as they are: where a template trims a content, trim it before encoding. A
content and the text around it never join in one token, which for a content that ends in punctuation a
tokenizer might do on the whole text.
"""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Offsets = list[tuple[int, int]]
ACCEPTED = (
    "accepted is a template that takes a system turn, then user and assistant turns in any order: every "
    "context begins with private instructions, and either side may speak first"
)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for other trainers; here it only has to parse."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(x: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, **options)


def compile_template(source: str) -> jinja2.Template:
    """`source` in the sandboxed environment that Hugging Face templates are written for, less one function.

    There is no `strftime_now`: contexts must not change from day to day. Templates that have a fixed date too
    use it.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)


class Pieces(NamedTuple):
    """The texts around contents: a turn is `xxx_before`, content, `xxx_after`."""

    system_before: str
    system_after: str
    user_before: str
    user_after: str
    reply: str
    closing: str
    earlier: str  # what stands before our own words in a later context

    def segments(self, roles: Iterable[str]) -> list[tuple[str, str]]:
        """A conversation as (name of the piece, text); the contents are named by their turn's index."""
        around = {
            "system": ("system_before", "system_after"),
            "user": ("user_before", "user_after"),
            "assistant": ("earlier", "closing"),
        }
        fragments = []
        for i, role in enumerate(roles):
            before, after = around[role]
            fragments += [(before, getattr(self, before)), (str(i), _mark(i)), (after, getattr(self, after))]
        return fragments


def _mark(i: int) -> str:
    return f"m{i}zqx"  # survives trimming, and stands in no template


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _conversations() -> list[list[str]]:
    """What a context can look like: either side first, several turns, and a question after the other side's
    words.
    """
    u, a = "user", "assistant"
    turns = [[], [u], [u, a], [u, a, u, a, u], [a], [a, u], [a, u, a, u, a], [u, u, a], [a, u, u, a, u]]
    return [["system", *t] for t in turns]


class Chat:
    """Id fragments of a template: `open`, `heard`, `reply`, `close_reply` in order are the ids of a
    conversation.

    Without `append_only` a conversation is `open`, then `heard` and `said`, and a `reply` at the end.

    stop_token_ids: what ends a reply when sampled. end_token_id: the one of them that this template writes
    itself.
    """

    def __init__(
        self,
        template: str,
        variables: dict[str, str],
        encode: Callable[[str], tuple[list[int], Offsets]],
        eos_token_ids: Iterable[int],
        special_ids: Iterable[int],
        append_only: bool = True,
    ) -> None:
        """`encode` parses special tokens and gives character offsets; `variables` are bos_token, eos_token
        and such.

        ValueError says why a template cannot be compiled.
        """
        self._variables = variables
        try:
            self._template = compile_template(template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid: {error}") from error
        self._append_only = append_only
        self._talks = [talk for talk in _conversations() if append_only or talk[-1] != "assistant"]
        pieces = self._pieces(append_only)
        self._check(pieces)
        self.contents: list[
            tuple[str, list[int]]
        ] = []  # texts in the places of contents, with their ids there
        self._ids = self._cut_ids(pieces, encode)
        self.written_ids = frozenset(i for ids in self._ids.values() for i in ids)
        closing, special = self._ids["closing"], set(special_ids)
        stops = [*eos_token_ids]
        end = next((i for i, t in enumerate(closing) if t in special or t in stops), None)
        if end is not None:
            stops.insert(0, closing[end])
        if not stops:
            raise ValueError(
                "no token ends a reply: the chat template writes none there, and eos_token is not set"
            )
        self.end_token_id = stops[0]
        self.stop_token_ids = frozenset(stops)
        self._after_stop = closing if end is None else closing[end + 1 :]
        self._opening = self._default_opening(pieces, encode)

    def open(self, system_ids: list[int]) -> list[int]:
        """Everything before the first turn: the template's beginning and the system turn with these ids."""
        return [*self._ids["system_before"], *system_ids, *self._ids["system_after"]]

    def question(self, token_ids: list[int]) -> list[int]:
        """A conversation of one user turn alone, up to the reply; a system turn is the template's own."""
        return [*self._opening, *self.heard(token_ids), *self.reply()]

    def heard(self, token_ids: list[int]) -> list[int]:
        """The other side's turn."""
        return [*self._ids["user_before"], *token_ids, *self._ids["user_after"]]

    def said(self, token_ids: list[int]) -> list[int]:
        """Our own earlier turn, without its stop token."""
        return [*self._ids["earlier"], *token_ids, *self._ids["closing"]]

    def reply(self) -> list[int]:
        """What stands before our own words."""
        return list(self._ids["reply"])

    def close_reply(self, stopped: bool) -> list[int]:
        """What follows our own words. When a stop token was sampled (`stopped`) it already stands there."""
        return list(self._after_stop if stopped else self._ids["closing"])

    # ---- compilation ---------------------------------------------------------------------------------------

    def _render(self, roles: list[str], generate: bool = False) -> str:
        messages = [{"role": role, "content": _mark(i)} for i, role in enumerate(roles)]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=generate,
                enable_thinking=False,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            reason = "it asks for today's date" if "strftime_now" in str(error) else str(error)
            turns = ", ".join(roles)
            raise ValueError(
                f"the chat template does not take the turns {turns}: {reason}. {ACCEPTED}"
            ) from error

    def _default_opening(
        self, pieces: Pieces, encode: Callable[[str], tuple[list[int], Offsets]]
    ) -> list[int]:
        """What the template writes before a first user turn; an empty system turn where it needs one."""
        asked = f"{pieces.user_before}{_mark(0)}{pieces.user_after}{pieces.reply}"
        try:
            text = self._render(["user"], generate=True)
        except ValueError:
            return self.open([])
        return encode(text.removesuffix(asked))[0] if text.endswith(asked) else self.open([])

    def _pieces(self, append_only: bool) -> Pieces:
        system = self._render(["system"])
        system_around = self._around("system", 0, system)
        user = self._render(["system", "user"])
        user_around = self._around("user", 1, self._rest(system, user, 1))
        prompt = self._render(["system", "user"], generate=True)
        if prompt == user:
            raise ValueError("the chat template has no generation prompt: nothing marks whose turn it is")
        reply = self._rest(user, prompt, 2)
        if not append_only:
            return Pieces(*system_around, *user_around, reply, *self._around_earlier(user, user_around))
        done = self._render(["system", "user", "assistant"])
        between, closing = self._around("assistant", 2, self._rest(prompt, done, 3))
        if between:
            self._refuse(
                2, f"{between!r} stands before a finished reply, but not in the generation prompt {reply!r}"
            )
        return Pieces(*system_around, *user_around, reply, closing, reply)

    def _around_earlier(self, user: str, user_around: tuple[str, str]) -> tuple[str, str]:
        """What stands after a reply that the user has answered, and before it: of the last it may differ."""
        talk = self._rest(user, self._render(["system", "user", "assistant", "user"]), 2)
        before, after = self._around("assistant", 2, talk)
        answer = _mark(3).join(user_around)
        if not after.endswith(answer):
            self._refuse(3, f"what stood as {answer!r} is not at the end of {after[-80:]!r}")
        return after.removesuffix(answer), before

    def _rest(self, start: str, text: str, turns: int) -> str:
        """What a conversation adds to its first `turns` turns, which are `start`."""
        if not text.startswith(start):
            at = _first_difference(start, text)
            self._differ(min(sum(_mark(i) in start[:at] for i in range(turns)), turns - 1), start, text)
        return text[len(start) :]

    def _around(self, role: str, turn: int, text: str) -> tuple[str, str]:
        parts = text.split(_mark(turn))
        if len(parts) != 2:
            raise ValueError(
                f"the chat template writes the content of the {role} turn {len(parts) - 1} times, not once. "
                f"{ACCEPTED}"
            )
        return parts[0], parts[1]

    def _check(self, pieces: Pieces) -> None:
        for roles in self._talks:
            segments = pieces.segments(roles)
            for generate in (False, True) if roles[-1] != "assistant" else (False,):
                if generate:
                    segments.append(("reply", pieces.reply))
                actual, expected = self._render(roles, generate), "".join(text for _, text in segments)
                if actual != expected:
                    ends = [*accumulate(len(text) for _, text in segments)]
                    self._differ(bisect(ends, _first_difference(expected, actual)) // 3, expected, actual)

    def _cut_ids(
        self, pieces: Pieces, encode: Callable[[str], tuple[list[int], Offsets]]
    ) -> dict[str, list[int]]:
        """The ids of each piece, cut out of whole conversations, where they must be the same everywhere."""
        known: dict[str, list[int]] = {}
        for roles in self._talks:
            segments = pieces.segments(roles)
            if roles[-1] != "assistant":
                segments += [("reply", pieces.reply), (str(len(roles)), _mark(len(roles)))]
            ends = list(accumulate(len(text) for _, text in segments))
            cut: list[list[int]] = [[] for _ in segments]
            at = 0
            for token, (start, end) in zip(*encode("".join(text for _, text in segments)), strict=True):
                while start >= ends[at]:
                    at += 1
                if end > ends[at]:
                    raise ValueError(
                        f"the tokenizer joins the end of {segments[at][1]!r} and what follows in one token: "
                        "the chat template has no boundary of tokens between a content and what stands "
                        "around it"
                    )
                cut[at].append(token)
            for (name, text), ids in zip(segments, cut, strict=True):
                if name.isdigit():
                    self.contents.append((text, ids))
                elif known.setdefault(name, ids) != ids:
                    raise ValueError(
                        f"the tokenizer gives {text!r} of the chat template other ids in other places"
                    )
        return known

    def _differ(self, turn: int, expected: str, actual: str) -> NoReturn:
        begin = max(0, _first_difference(expected, actual) - 10)
        alone, here = expected[begin : begin + 50], actual[begin : begin + 50]
        self._refuse(turn, f"what stood as {alone!r} stands as {here!r} in a longer conversation")

    def _refuse(self, turn: int, reason: str) -> NoReturn:
        accepted = "Contexts are written anew for every turn, yet a turn must be rendered the same in all"
        if self._append_only:
            accepted = (
                "Contexts here are append-only: a turn must be rendered the same whatever follows it. Put a "
                "template that does so into chat_template.jinja; dilemmas with dialogue.context = 'last_2' "
                "need none"
            )
        raise ValueError(f"the chat template rewrites turn {turn}: {reason}. {accepted}")
