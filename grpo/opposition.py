"""The settings of the opponent: whom the policy negotiates with in training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duologue.grpo.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class OpponentSection:
    """Who has the other side. "self": the policy as it is, on both. Otherwise the policy has one side, in turn from group to group
    (side 0 with grpo.train_roles = "first"), and only its own tokens are trained. "frozen": the policy at the start of self-play.
    "lagged:k": the policy k steps ago. "pool": a snapshot of it, drawn for every group. "endpoint": an OpenAI-compatible server.

    With lora.rank above 0 all but "endpoint" are adapters in the policy's own engine steps, and "frozen" is the base with no adapter.
    Without, a second set of weights with a KV pool is held, and "pool" draws one snapshot for all groups of a step. Snapshots are
    checkpoints in RUN_DIR/opponents: "lagged:k" keeps the last k + train.save_every, "pool" the last `size`.
    """

    kind: str = "self"
    pool_every: int = 10  # steps from one snapshot to the next; the first is the start
    pool_size: int = 8  # snapshots, the latest
    pool_draw: str = "uniform"  # "recent": the n-th oldest has weight n
    url: str = ""
    model: str = ""  # the server's name of it
    key_env: str = "DUOLOGUE_OPPONENT_KEY"  # the environment variable that holds the server's API key
    concurrency: int = 16
    timeout_s: float = 60.0  # of a request
    deadline_s: float = 240.0  # of a turn with all its tries

    @property
    def lag(self) -> int:
        """The k of "lagged:k"; 0 of the others."""
        return int(self.kind.partition(":")[2] or 0)


def opponent_rules(c: Config) -> list[tuple[str, str, bool]]:
    """(key, what is accepted, whether it holds)."""
    o, default = c.opponent, OpponentSection()
    remote = ("url", "model", "key_env", "concurrency", "timeout_s", "deadline_s")
    own = {"pool": ("pool_every", "pool_size", "pool_draw"), "endpoint": remote}
    return [
        (
            "opponent.kind",
            "'self', 'frozen', 'lagged:k' with k of 1 or more, 'pool' or 'endpoint'",
            re.fullmatch(r"self|frozen|lagged:[1-9]\d{0,8}|pool|endpoint", o.kind) is not None,
        ),
        (
            "opponent.kind",
            "'self' where one answers alone",
            c.game.name != "dilemma_alone" or o.kind == "self",
        ),
        *(
            (
                f"opponent.{key}",
                f"its default where opponent.kind is not '{kind}'",
                o.kind == kind or getattr(o, key) == getattr(default, key),
            )
            for kind, keys in own.items()
            for key in keys
        ),
        (
            "opponent.url",
            "an address that begins with http:// or https://, and no credential or query (opponent.key_env names one)",
            o.kind != "endpoint"
            or (re.match(r"https?://[^/]", o.url) is not None and not set("@?#") & set(o.url)),
        ),
        ("opponent.pool_draw", "'uniform' or 'recent'", o.pool_draw in ("uniform", "recent")),
        *(
            (f"opponent.{key}", "1 or more", getattr(o, key) >= 1)
            for key in ("pool_every", "pool_size", "concurrency")
        ),
        *(
            (f"opponent.{key}", "0.01 or more", getattr(o, key) >= 0.01)
            for key in ("timeout_s", "deadline_s")
        ),
    ]
