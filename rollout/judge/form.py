"""Answers in their form, whatever the model: its fixed parts stand as they are, a choice is made by the
probabilities of what may stand in its place, and a quote is copied from what was said.

    {"agreed": true, "assent": {"1": "Half is fine", "2": "we do"}}
               ----                   ------------         -----
               true or false          a span of 1's turns   a span of 2's turns

A form is a generator that yields what the branch is to be asked next and is sent the completion.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch
from duologue.rollout.engine.sequence import Completion, SamplingParams
from duologue.rollout.games.dilemma import ASPECTS, HIGHEST
from duologue.rollout.judge.questions import WINNERS, Case
from duologue.rollout.judge.wording import writable

DIGITS = [f" {n}" for n in range(HIGHEST + 1)]
SHORTEST_QUOTE, LONGEST_QUOTE = 3, 32  # tokens; shorter where the turn ends

Made = TypeVar("Made")
Form = Generator[SamplingParams, Completion, Made]
_ROTATIONS = [ASPECTS[i:] + ASPECTS[:i] for i in range(len(ASPECTS))]
# Of the aspects. In the first four each stands once in every place.
ORDERS = [*_ROTATIONS, *(order for order in itertools.permutations(ASPECTS) if order not in _ROTATIONS)]


class Spans:
    """The spans of some texts that a quote may be: an `allow` of SamplingParams, which lets `end` follow.

    A quote begins with a token that is not blank, so that it is never blank itself, and stops before a token
    that is `end`.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, end: int) -> None:
        self._texts = [writable(text) for text in texts]
        self._turns = [tokenizer.encode_with_offsets(text) for text in self._texts]
        self._end = end
        self.starts = [
            (i, at)
            for i, (ids, offsets) in enumerate(self._turns)
            for at, (start, stop) in enumerate(offsets)
            if ids[at] != end and self._texts[i][start:stop].strip()
        ]

    def __call__(self, drawn: Sequence[int]) -> list[int]:
        n = len(drawn)
        following = {self._turns[i][0][at + n] for i, at in self._places(drawn) if self._goes_on(i, at + n)}
        if n == LONGEST_QUOTE:
            return [self._end]
        if n >= SHORTEST_QUOTE or not following:
            following.add(self._end)
        return sorted(following)

    def text(self, drawn: Sequence[int]) -> str:
        """The characters that a span covers, as they were said."""
        i, at = self._places(drawn)[0]
        offsets = self._turns[i][1]
        return self._texts[i][offsets[at][0] : offsets[at + len(drawn) - 1][1]]

    def _places(self, drawn: Sequence[int]) -> list[tuple[int, int]]:
        """(text, token) where such a span begins."""
        wanted = list(drawn)
        return [(i, at) for i, at in self.starts if self._turns[i][0][at : at + len(wanted)] == wanted]

    def _goes_on(self, i: int, at: int) -> bool:
        ids = self._turns[i][0]
        return at < len(ids) and ids[at] != self._end


class Writer:
    """Writes an answer behind the question that `branch` holds."""

    def __init__(self, branch: Branch, tokenizer: Tokenizer) -> None:
        self.branch, self.tokenizer = branch, tokenizer

    def write(self, text: str) -> None:
        self.branch.append(self.tokenizer.encode(text))

    def end(self, closing: str) -> int:
        """The id that ends a quote before `closing`; where a tokenizer drops those characters, a turn's."""
        return [*self.tokenizer.encode(closing), self.tokenizer.turn_chat.end_token_id][0]

    def choose(self, texts: Sequence[str]) -> Form[list[float]]:
        """How probable each text is to stand next, among these alone. The branch stays as it is.

        A text of several tokens has the product of their probabilities, each after those before it. Places
        in which all texts go on alike say nothing and are not looked at. ValueError when a log-prob is no
        number.
        """
        options = [self.tokenizer.encode(text) for text in texts]
        logprobs = [0.0] * len(options)
        for before in _forks(options):
            n = len(before)
            inside = [i for i, ids in enumerate(options) if len(ids) > n and ids[:n] == before]
            candidates = tuple(dict.fromkeys(options[i][n] for i in inside))
            self.branch.append(before)
            looked = yield SamplingParams(max_new_tokens=1, temperature=0, candidates=candidates)
            self.branch.rewind(n + 1)  # the token that was drawn beside does not count
            found = dict(zip(candidates, looked.candidate_logprobs, strict=True))
            for i in inside:
                logprobs[i] += found[options[i][n]]
        if not all(map(math.isfinite, logprobs)):
            raise ValueError(f"the log-probs of {', '.join(texts)} are {logprobs}")
        highest = max(logprobs)
        weights = [math.exp(logprob - highest) for logprob in logprobs]
        return [weight / sum(weights) for weight in weights]

    def quote(self, spans: Spans, end: int) -> Form[str]:
        """The likeliest span, token by token, which the branch then ends with."""
        said = yield SamplingParams(
            max_new_tokens=LONGEST_QUOTE + 1, temperature=0, stop_token_ids=(end,), allow=spans
        )
        assert said.finish_reason == "stop", said.error
        self.branch.rewind(1)
        return spans.text(said.token_ids[:-1])


def _forks(options: Sequence[list[int]]) -> list[list[int]]:
    """Beginnings of options after which not all of them go on with one token, the shortest first."""
    beginnings = {tuple(ids[:n]) for ids in options for n in range(len(ids))}
    ahead = {before: {tuple(ids[: len(before) + 1]) for ids in options} for before in beginnings}
    return [
        list(before) for before in sorted(beginnings, key=lambda b: (len(b), b)) if len(ahead[before]) > 1
    ]


# ---- the forms ---------------------------------------------------------------------------------------------


def agreement(writer: Writer, case: Case, threshold: float) -> Form[dict[str, Any]]:
    """They agree where that is at least as probable as `threshold`. Who has said nothing has accepted
    nothing.
    """
    writer.write('{"agreed":')
    yes, no = yield from writer.choose([" true", " false"])
    quotes = ["", ""]
    closings = ('", "2": "', '"}}')
    ends = [writer.end(closing) for closing in closings]
    turns = [[text for who, text in case.turns if who == role] for role in (0, 1)]
    spans = [Spans(said, writer.tokenizer, end) for said, end in zip(turns, ends, strict=True)]
    agreed = yes >= threshold and all(each.starts for each in spans)
    if agreed:
        writer.write(' true, "assent": {"1": "')
        quotes[0] = yield from writer.quote(spans[0], ends[0])
        writer.write(closings[0])
        quotes[1] = yield from writer.quote(spans[1], ends[1])
    assent = {str(i): quote for i, quote in enumerate(quotes, 1)}
    return {"agreed": agreed, "assent": assent, "probabilities": {"true": yes, "false": no}}


def scores(writer: Writer, order: Sequence[str]) -> Form[dict[str, list[float]]]:
    """The probabilities of the digits for each aspect, scored in this order; the likeliest stands before the
    next.
    """
    found: dict[str, list[float]] = {}
    for aspect in order:
        writer.write(f'{", " if found else "{"}"{aspect}":')
        found[aspect] = yield from writer.choose(DIGITS)
        writer.write(DIGITS[likeliest(found[aspect])])
    return found


def preference(writer: Writer) -> Form[dict[str, Any]]:
    writer.write('{"winner": "')
    found = yield from writer.choose(WINNERS)
    winner = WINNERS[likeliest(found)]
    return {"winner": winner, "reason": "", "probabilities": dict(zip(WINNERS, found, strict=True))}


def likeliest(probabilities: Sequence[float]) -> int:
    """The first of the highest."""
    return max(range(len(probabilities)), key=probabilities.__getitem__)


def averaged(readings: Sequence[dict[str, list[float]]], expected: bool) -> dict[str, Any]:
    """One score per aspect of several readings: the mean of their expected, or likeliest, digits."""

    def score(probabilities: list[float]) -> float:
        if not expected:
            return float(likeliest(probabilities))
        mean = math.fsum(digit * probability for digit, probability in enumerate(probabilities))
        return min(mean, float(HIGHEST))  # rounding

    found = {aspect: [reading[aspect] for reading in readings] for aspect in ASPECTS}
    means = {aspect: math.fsum(map(score, of_it)) / len(of_it) for aspect, of_it in found.items()}
    return {**means, "reason": "", "probabilities": found}
