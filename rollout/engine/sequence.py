"""The nouns of the rollout engine: what is asked for, what comes back, and a live sequence. Data only.

Ids in, ids out: nothing here knows text.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

LEAST_TEMPERATURE = 1e-6  # above 0; logits over a lower one leave the range of fp32


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one completion is drawn. The defaults sample the model's full distribution.

    temperature 0 is greedy. `seed` fixes the draw whatever else is in the batch; the engine numbers requests
    without one. `stop_strings` end a completion whose text (the engine's `decode`) contains one; the token
    that completed it stays. `allow` gets the ids sampled so far and returns those allowed next (None:
    all), for structured output; log-prob and entropy are then of the softmax over the allowed ids. When it
    raises, this request ends with finish_reason "error". `candidates` are ids whose log-probs in the place
    of the first token the completion carries too, whatever is drawn there.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    allow: Callable[[list[int]], Ids[int] | None] | None = None
    candidates: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        strings, seed = self.stop_strings, self.seed
        strings_fit = isinstance(strings, tuple) and all(isinstance(x, str) and x for x in strings)
        temperature_fits = self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf
        checks = (
            ("max_new_tokens", "an integer >= 1", self.max_new_tokens >= 1),
            ("temperature", f"0 (greedy) or a finite number >= {LEAST_TEMPERATURE:g}", temperature_fits),
            ("top_k", "an integer >= 0 (0 = off)", self.top_k >= 0),
            ("top_p", "a number in (0, 1]", 0 < self.top_p <= 1),
            ("min_p", "a number in [0, 1)", 0 <= self.min_p < 1),
            ("stop_strings", "a tuple of non-empty strings", strings_fit),
            ("seed", "None or an integer in [0, 2**63)", seed is None or 0 <= seed < 2**63),
        )
        for name, accepted, ok in checks:
            if not ok:
                raise ValueError(f"SamplingParams.{name} = {getattr(self, name)!r}: accepted is {accepted}")
        if self.temperature == 0 and self.truncates:
            contradicted = "top_k, top_p or min_p; drop one of them"
            raise ValueError(f"SamplingParams: temperature 0 is greedy and contradicts {contradicted}")

    @property
    def truncates(self) -> bool:
        """Whether tokens may be left out of the softmax."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(slots=True)
class Supports:
    """The supports of truncated draws: `ids` holds `sizes[0]` token ids, ascending, then `sizes[1]`.

    Size 0 stands for all tokens.
    """

    sizes: list[int] = field(default_factory=list)  # [n], one per token
    ids: array[int] = field(default_factory=lambda: array("i"))

    def extend(self, other: Supports) -> None:
        self.sizes += other.sizes
        self.ids += other.ids


@dataclass(slots=True)
class Draws:
    """Tokens sampled for one request, one after the other."""

    tokens: list[int]  # [k]
    logprobs: list[float]  # [k] of softmax(logits / temperature) over the support
    entropies: list[float]  # [k] nats, of the same
    support_sizes: list[int]  # [k] 0 for all tokens, -1 where the support is not known
    support_ids: array[int]  # of one support after the other, each ascending
    candidate_logprobs: Ids[float] = ()  # of SamplingParams.candidates, where they were asked for

    def drop(self, n: int) -> None:
        """The first `n`, which have no supports."""
        del self.tokens[:n], self.logprobs[:n], self.entropies[:n], self.support_sizes[:n]

    def keep(self, n: int) -> None:
        """The first `n`, and no more."""
        if self.support_ids:
            self.support_ids = self.support_ids[: sum(self.support_sizes[:n])]
        del self.tokens[n:], self.logprobs[n:], self.entropies[n:], self.support_sizes[n:]

    @property
    def n_known(self) -> int:
        """Draws before the first whose support is not known: a plain step must draw that token again."""
        return self.support_sizes.index(-1) if -1 in self.support_sizes else len(self.support_sizes)


@dataclass(kw_only=True, slots=True)
class Completion:
    """The tokens that the policy sampled, the stop token included: it was sampled, so it is trained too."""

    token_ids: list[int] = field(default_factory=list)  # [n]
    logprobs: list[float] = field(default_factory=list)  # [n], see `Draws`
    entropies: list[float] = field(default_factory=list)  # [n]
    supports: Supports = field(default_factory=Supports)  # [n]
    candidate_logprobs: list[float] = field(default_factory=list)  # of all tokens' softmax at temperature 1
    finish_reason: str = ""  # "stop" | "length" | "cancelled" | "error"
    weights_version: int = 0
    error: str = ""  # what the callback raised

    def add(self, draws: Draws) -> None:
        self.token_ids += draws.tokens
        self.logprobs += draws.logprobs
        self.entropies += draws.entropies
        self.supports.sizes += draws.support_sizes
        if draws.support_ids:
            self.supports.ids += draws.support_ids
        if draws.tokens and draws.candidate_logprobs:
            self.candidate_logprobs += draws.candidate_logprobs


@dataclass(slots=True, eq=False)
class BranchState:
    """A live sequence: its whole context, and where the KV of the first `n_cached` tokens lies.

    The rest is computed when the branch next generates, so losing the pages costs only time. Pages are shared
    between branches of one adapter only.
    """

    token_ids: list[int]
    adapter: int = 0  # index into the engine's adapters
    pages: list[int] = field(default_factory=list)
    n_cached: int = 0
    request: Request | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """One `generate` in flight on a branch."""

    branch: BranchState
    params: SamplingParams
    seed: int
    completion: Completion
    stop_token_ids: frozenset[int]
    prefill_only: bool = False  # compute the KV of the context and sample nothing
    done: bool = False
    preempted: bool = False
    plain: bool = field(init=False)  # its next token must be drawn by a step of its own
    ahead: int = 0  # tokens that a loop has drawn beyond those that are entered, into pages that are reserved
    guided: bool = field(init=False)  # the host looks at each token before the next is drawn

    def __post_init__(self) -> None:
        self.plain = bool(self.params.candidates)  # and later where a support does not fit the loop
        self.guided = self.params.allow is not None or bool(self.params.stop_strings)

    @property
    def n_left(self) -> int:
        """Tokens that this may still sample."""
        return self.params.max_new_tokens - len(self.completion.token_ids)

    @property
    def candidates(self) -> tuple[int, ...]:
        """Ids whose log-probs the next draw is to give."""
        return () if self.completion.token_ids else self.params.candidates

    @property
    def n_todo(self) -> int:
        """Tokens of the context whose KV is still to be computed; 1 while decoding."""
        return len(self.branch.token_ids) - self.branch.n_cached

    @property
    def expected(self) -> int:
        """Tokens that this may still take, at most."""
        return self.n_todo if self.prefill_only else self.n_todo + self.n_left

    def finish(self, reason: str) -> None:
        self.completion.finish_reason = reason
        self.done = True
