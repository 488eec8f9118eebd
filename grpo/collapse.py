"""Whether a run collapses: means of what its steps report, the rules over them, and what is done.

All that is known here comes from the lines of metrics.jsonl, in order, so that a run that was resumed knows
what it would have known:

    watch = Watch(config.watch, config.grpo.advantage)
    for row in read_lines(run / "metrics.jsonl"):
        watch.feed(row)
    watch.alarms            # rule -> what is wrong now, in words
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from duologue.model.settings import setting

IDLE = "idle"
WATCHED = (  # rules of [watch]
    *("reward", "one_sided", "no_variance", "distinct", "echo", "length", "malformed"),
    *("entropy", "kl", "start_score", IDLE),
)
Row = Mapping[str, Any]
SIDES = ("side 1", "side 2")
NOISE = 3.0  # distances of a step from the mean, in the mean, that a fall of the reward must exceed
STATS = (  # that means are kept of, in a line's `watch`
    *(f"{name}_{side}" for name in ("reward", "no_variance") for side in (0, 1)),
    *("win_share", "distinct_2", "echo", "turn_tokens", "cut", "malformed"),
)
METRICS = ("entropy", "kl_start")  # and in a line itself


@dataclass(frozen=True, kw_only=True)
class WatchSection:
    """How a run watches itself for a collapse. Each rule is named by its threshold; 0 turns it off. A rule
    that holds warns, once as it begins; those in `stop` end the run; those in `rollback` go back to the last
    good weights and their optimizer, with a lower rate, and on to the next step, whose draws are others.

    A mean over fast_steps is compared with one over slow_steps, or with the first fast_steps of the run;
    nothing but `idle` is said before the run, or the rollback, is twice as old. "Good" weights are kept every
    train.save_every steps while no rule holds; a rollback goes to the older of the latest two.
    """

    enabled: bool = setting(True, "whether it does")
    fast_steps: int = setting(5, "steps that the fast mean of a metric looks back on", least=1)
    slow_steps: int = setting(50, "steps that the slow mean looks back on", least=1)
    reward: float = setting(
        0.5, "a side's fast mean of the reward lies below its slow one by more than this part of it", least=0
    )
    one_sided: float = setting(
        0.95, "one side wins more than this share of the dialogues of the policy with itself", least=0, most=1
    )
    no_variance: float = setting(
        0.95, "more than this share of groups has no variance in a side's rewards", least=0, most=1
    )
    distinct: float = setting(
        0.3, "different pairs of tokens, by all pairs of a group, are below this part of the first", least=0
    )
    echo: float = setting(
        0.8, "more than this share of what is said repeats what the other side has just said", least=0, most=1
    )
    length: float = setting(
        4.0, "tokens of a turn are more than this many times the first, or fewer by as much", least=0
    )
    malformed: float = setting(
        0.3,
        "the share of malformed dialogues, or of turns cut at the limit, is above the first by this",
        least=0,
    )
    entropy: float = setting(
        10.0, "the entropy is more than this many times the first, or less by as much", least=0
    )
    kl: float = setting(5.0, "the KL to the start, in nats per token, is above this", least=0)
    start_score: float = setting(
        0.3,
        "the score against the start (a win 1, a draw 0.5) is below this in an evaluation",
        least=0,
        most=1,
    )
    idle: int = setting(50, "steps in a row in which no group had variance, or no parameter changed", least=0)
    stop: tuple[str, ...] = setting((IDLE,), "rules that end self-play", one_of=WATCHED)
    rollback: tuple[str, ...] = setting((), "rules that go back", one_of=WATCHED)
    rollback_rate: float = setting(
        0.5, "what each rollback multiplies the learning rate with", above=0, most=1
    )
    max_rollbacks: int = setting(2, "rollbacks of a run; a rule that asks for one more stops it", least=0)


@dataclass(eq=False)
class Watch:
    """`feed` every line; then `alarms`, and `action` for what is to be done about them."""

    config: WatchSection
    advantage: str = "std"  # grpo.advantage
    steps: int = 0  # of self-play since the start, or since the policy went back
    first: dict[str, float] = field(default_factory=dict)  # means over the first `fast_steps` of the run
    fast: dict[str, float] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)
    alarms: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)  # those of `alarms` that the step before had not
    rollbacks: list[Row] = field(default_factory=list)
    _begun: int = 0
    _start_score: float = math.nan  # of the latest evaluation
    _flat: int = 0  # steps in a row without a group with variance
    _still: int = 0  # steps in a row without a parameter that changed

    def feed(self, row: Row) -> None:
        """A line of metrics.jsonl more; one of imitation, or of a step that nobody watched, says nothing."""
        if row["stage"] != "selfplay" or "watch" not in row:
            return
        seen = {name: row["watch"].get(name) for name in STATS} | {name: row.get(name) for name in METRICS}
        for name, value in seen.items():
            if _known(value):
                self._average(name, float(value))
        self._begun += 1
        self.steps += 1
        score = row.get("eval", {}).get("start", {}).get("score")
        self._start_score = float(score) if _known(score) else self._start_score
        flat = row.get("no_variance_share") == 1 and self.advantage != "running"
        self._flat = self._flat + 1 if flat else 0
        self._still = 0 if row["watch"].get("changed", True) else self._still + 1
        before, self.alarms = self.alarms, self._judge() if self.config.enabled else {}
        self.new = [name for name in self.alarms if name not in before]
        if row["watch"].get("rollback"):
            self.went_back(row["watch"]["rollback"])

    def went_back(self, rollback: Row) -> None:
        """The policy is an earlier one: what was seen of the later one counts no more."""
        self.rollbacks.append(rollback)
        self.steps = self._flat = self._still = 0
        self.fast, self.slow, self.alarms, self.new = {}, {}, {}, []
        self._start_score = math.nan

    @property
    def action(self) -> tuple[str, str]:
        """("rollback" | "stop" | "", why). One that can go back no more stops."""
        for name, why in self.alarms.items():
            if name in self.config.stop:
                return "stop", f"watch.{name}: {why}"
        for name, why in self.alarms.items():
            if name not in self.config.rollback:
                continue
            if len(self.rollbacks) < self.config.max_rollbacks:
                return "rollback", f"watch.{name}: {why}"
            most = f"watch.max_rollbacks = {self.config.max_rollbacks}"
            return "stop", f"watch.{name}: {why}, after as many rollbacks as {most} allows"
        return "", ""

    @property
    def rate_scale(self) -> float:
        """What the learning rate is multiplied with."""
        scale: float = self.config.rollback_rate ** len(self.rollbacks)
        return scale

    def _average(self, name: str, value: float) -> None:
        if self._begun < self.config.fast_steps:
            weight = 1 / (self._begun + 1)
            self.first[name] = self.first.get(name, value) * (1 - weight) + value * weight
        if name in self.fast:  # how far a step lies from those before it: a fall is measured by that, too
            distance, spread = abs(value - self.fast[name]), f"spread_{name}"
            weight = self._weight(self.config.slow_steps)
            self.slow[spread] = self.slow.get(spread, distance) * (1 - weight) + distance * weight
        for means, span in ((self.fast, self.config.fast_steps), (self.slow, self.config.slow_steps)):
            weight = self._weight(span)
            means[name] = means[name] * (1 - weight) + value * weight if name in means else value

    def _weight(self, span: int) -> float:
        """Of a step in an exponential mean that looks back on `span` steps, in a plain one before."""
        return max(2 / (span + 1), 1 / (self.steps + 1))

    # ---- rules ---------------------------------------------------------------------------------------------

    def _judge(self) -> dict[str, str]:
        found = self._idle()
        if self.steps > 2 * self.config.fast_steps:  # before that a mean is one step's chance
            found |= self._of_sides() | self._of_words() | self._of_policy()
        return found

    def _idle(self) -> dict[str, str]:
        limit = self.config.idle
        for steps, why in ((self._flat, "no group had variance"), (self._still, "no parameter changed")):
            if limit and steps >= limit:
                return {IDLE: f"nothing is learned: {why} in {steps} steps"}
        return {}

    def _of_sides(self) -> dict[str, str]:
        c, fast, slow, found = self.config, self.fast, self.slow, {}
        for side, name in enumerate(SIDES):
            now, before = fast.get(f"reward_{side}", math.nan), slow.get(f"reward_{side}", math.nan)
            least = max(c.reward * abs(before), NOISE * slow.get(f"spread_reward_{side}", 0.0))
            if c.reward and before - now > least:
                found["reward"] = f"the reward of {name} fell to {now:.3g} from a mean of {before:.3g}"
            if c.no_variance and (share := fast.get(f"no_variance_{side}", 0.0)) > c.no_variance:
                found["no_variance"] = f"{share:.0%} of the groups have no variance for {name}"
        wins = fast.get("win_share", 0.5)
        if c.one_sided and max(wins, 1 - wins) > c.one_sided:
            found["one_sided"] = f"{SIDES[wins < 0.5]} wins {max(wins, 1 - wins):.0%} of the dialogues"
        return found

    def _of_words(self) -> dict[str, str]:
        c, fast, first, found = self.config, self.fast, self.first, {}
        pairs, before = fast.get("distinct_2", 1.0), first.get("distinct_2", 0.0)
        if c.distinct and pairs < c.distinct * before:
            found["distinct"] = f"{pairs:.1%} of the pairs of tokens are different, {before:.1%} at the start"
        if c.echo and fast.get("echo", 0.0) > max(c.echo, first.get("echo", 0.0)):
            found["echo"] = f"{fast['echo']:.0%} of what is said repeats the other side"
        length, before = fast.get("turn_tokens", 1.0), first.get("turn_tokens", 1.0)
        if c.length and not 1 / c.length <= length / before <= c.length:
            found["length"] = f"a turn has {length:.1f} tokens, at the start {before:.1f}"
        for name, meaning in (
            ("malformed", "of the dialogues are malformed"),
            ("cut", "of the turns are cut"),
        ):
            share, before = fast.get(name, 0.0), first.get(name, 0.0)
            if c.malformed and share - before > c.malformed:
                found["malformed"] = f"{share:.0%} {meaning}, {before:.0%} at the start"
        return found

    def _of_policy(self) -> dict[str, str]:
        c, fast, found = self.config, self.fast, {}
        entropy, before = fast.get("entropy", 0.0), self.first.get("entropy", 0.0)
        if c.entropy and before > 0 and not 1 / c.entropy <= entropy / before <= c.entropy:
            found["entropy"] = f"the entropy is {entropy:.3g} nats per token, at the start {before:.3g}"
        if c.kl and fast.get("kl_start", 0.0) > c.kl:
            found["kl"] = f"the KL to the start is {fast['kl_start']:.3g} nats per token"
        if c.start_score and self._start_score < c.start_score:
            found["start_score"] = f"against its start the policy scores {self._start_score:.0%}"
        return found


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
