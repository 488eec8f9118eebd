"""The nouns of the rollout engine: what is asked for, what comes back, and a live sequence.

Ids in, ids out: nothing here knows text.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duologue.rollout.engine.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one completion is drawn. The defaults sample the model's full distribution.

    temperature 0 is greedy. `seed` fixes the draw whatever else is in the batch; without one the engine numbers requests.
    `stop_strings` end a completion whose text (the engine's `decode`) contains one; the token that completed it is kept.
    `allow` gets the ids sampled so far and returns those allowed next (None: all), for structured output; log-prob and entropy
    are then of the softmax over the allowed ids. When it raises, this request ends with finish_reason "error".
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

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens, "an integer >= 1", self.max_new_tokens >= 1),
            ("temperature", self.temperature, "a finite number >= 0", 0 <= self.temperature < math.inf),
            ("top_k", self.top_k, "an integer >= 0 (0 = off)", self.top_k >= 0),
            ("top_p", self.top_p, "a number in (0, 1]", 0 < self.top_p <= 1),
            ("min_p", self.min_p, "a number in [0, 1)", 0 <= self.min_p < 1),
            (
                "stop_strings",
                self.stop_strings,
                "a tuple of non-empty strings",
                isinstance(self.stop_strings, tuple)
                and all(isinstance(x, str) and x for x in self.stop_strings),
            ),
            (
                "seed",
                self.seed,
                "None or an integer in [0, 2**63)",
                self.seed is None or 0 <= self.seed < 2**63,
            ),
        )
        for name, value, accepted, ok in checks:
            if not ok:
                raise ValueError(f"SamplingParams.{name} = {value!r}: accepted is {accepted}")
        truncated = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        if self.temperature == 0 and truncated:
            raise ValueError(
                "SamplingParams: temperature 0 is greedy and contradicts top_k, top_p or min_p; drop one of them"
            )


@dataclass(slots=True)
class Kept:
    """The supports of truncated draws: `ids` holds `sizes[0]` token ids, ascending, then `sizes[1]`; 0 stands for all tokens."""

    sizes: list[int] = field(default_factory=list)  # [n], one per token
    ids: array[int] = field(default_factory=lambda: array("i"))

    def add(self, ids: array[int]) -> None:
        self.sizes.append(len(ids))
        self.ids += ids

    def extend(self, other: Kept) -> None:
        self.sizes += other.sizes
        self.ids += other.ids


@dataclass(kw_only=True, slots=True)
class Completion:
    """The tokens that the policy sampled, the stop token included: it was sampled, so it is trained too."""

    token_ids: list[int] = field(default_factory=list)  # [n]
    logprobs: list[float] = field(
        default_factory=list
    )  # [n] of softmax(logits / temperature) over `kept`, taken at sampling time
    entropies: list[float] = field(default_factory=list)  # [n] nats, same distribution
    kept: Kept = field(default_factory=Kept)  # [n]
    finish_reason: str = ""  # "stop" | "length" | "cancelled" | "error"
    weights_version: int = 0
    error: str = ""  # what the callback raised

    @property
    def stopped(self) -> bool:
        return self.finish_reason == "stop"


class Branch:
    """A live sequence in the engine whose KV stays between turns.

    `token_ids` is the whole context. The KV of the first `n_cached` of them lies in `pages`; the rest is computed when the
    branch next generates, so `append` and `rewind` cost nothing, and losing the pages costs only time. `adapter` indexes the
    engine's adapters; pages are shared between branches of one adapter only.
    """

    __slots__ = ("adapter", "engine", "n_cached", "pages", "request", "token_ids")

    def __init__(self, engine: Engine, token_ids: Ids[int], adapter: int = 0) -> None:
        self.engine: Engine | None = engine
        self.adapter = adapter
        self.token_ids = list(token_ids)
        self.pages: list[int] = []
        self.n_cached = 0
        self.request: Request | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def append(self, token_ids: Ids[int]) -> None:
        """Add ids that were not sampled here: the other side's turn, a template fragment."""
        self._idle_engine("append").check_ids(token_ids)
        self.token_ids.extend(token_ids)

    def generate(self, params: SamplingParams) -> Completion:
        """Sample from this branch until it stops; the sampled ids become part of it."""
        engine = self._idle_engine("generate")
        request = engine.start(self, params)
        engine.run()
        return request.completion

    def fork(self, n: int = 1) -> list[Branch]:
        """`n` branches with the same ids; full pages are shared, the partly filled one is copied."""
        return self._idle_engine("fork").fork(self, n)

    def rewind(self, n_tokens: int) -> None:
        """Drop the last `n_tokens` ids."""
        self._idle_engine("rewind").rewind(self, n_tokens)

    def close(self) -> None:
        """Give the pages back. Closing twice is allowed; any other use afterwards raises."""
        if self.engine is not None:
            self._idle_engine("close").close(self)
            self.engine = None

    def _idle_engine(self, verb: str) -> Engine:
        if self.engine is None:
            raise RuntimeError(f"Branch.{verb}: this branch is closed")
        if self.request is not None:
            raise RuntimeError(f"Branch.{verb}: this branch is generating; wait for its request to finish")
        return self.engine


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """One `generate` in flight on a branch."""

    branch: Branch
    params: SamplingParams
    seed: int
    completion: Completion
    stop_token_ids: frozenset[int]
    prefill_only: bool = False  # compute the KV of the context and sample nothing
    done: bool = False
    preempted: bool = False
    plain: bool = False  # its next token needs a step of its own: see DecodeLoop

    @property
    def expected(self) -> int:
        """Tokens that this may still take, at most."""
        return self.n_todo + (
            0 if self.prefill_only else self.params.max_new_tokens - len(self.completion.token_ids)
        )

    @property
    def n_todo(self) -> int:
        """Tokens of the context whose KV is still to be computed; 1 while decoding."""
        return len(self.branch.token_ids) - self.branch.n_cached
