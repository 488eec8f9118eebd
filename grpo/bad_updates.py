"""An update whose loss or gradient is not finite: skipped on all ranks, counted, named in a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from duologue.grpo.packing import Row
from duologue.grpo.update import UpdateStats
from duologue.grpo.world import World
from duologue.model.decoder import Decoder
from torch import Tensor

Gradient = Callable[..., UpdateStats]  # of rows; takes `backward` and more


class BadUpdates:
    """What is known of each update before it is taken, and how many could not be."""

    def __init__(self, most: int) -> None:
        self.most = most  # in a row; then the run ends
        self.in_a_row = 0
        self.of_step = 0
        self.lines: list[str] = []  # of this step
        self._parts: list[tuple[str, Gradient, Sequence[Row], UpdateStats]] = []

    def new_step(self) -> None:
        self.of_step, self.lines = 0, []

    def note(self, what: str, gradient: Gradient, rows: Sequence[Row], stats: UpdateStats) -> None:
        """A part of the next update: `gradient` of this rank's `rows`, which are of `what`."""
        self._parts.append((what, gradient, rows, stats))

    def reason(self, norm: float) -> str:
        """What is not finite in this update, alike on all ranks; "" where all is."""
        values = [pair for *_, stats in self._parts for pair in stats.metrics().items()]
        bad = [
            f"{name} is {value}" for name, value in [*values, ("grad_norm", norm)] if not math.isfinite(value)
        ]
        return bad[0] if bad else ""

    def skip(self, step: int, reason: str, model: Decoder, world: World) -> None:
        """Once the gradients are dropped: find out whose they were."""
        self.in_a_row += 1
        self.of_step += 1
        named = []
        for what, gradient, rows, _ in self._parts:
            found = sorted({i for part in world.each(suspects(model, rows, gradient)) for i in part})
            named += [f"{what} {', '.join(map(str, found))}"] if found else []
        cause = " and ".join(named) or "none of its dialogues alone"
        self.lines.append(f"step {step}: {reason}, by {cause}: the update is skipped")
        self._parts = []

    def taken(self) -> None:
        self.in_a_row = 0
        self._parts = []

    def check(self) -> None:
        """RuntimeError once there were too many."""
        if self.in_a_row >= self.most:
            skipped = f"{self.in_a_row} in a row, accepted is fewer than train.max_bad_updates = {self.most}"
            raise RuntimeError(f"{self.lines[-1]}; {skipped}; the weights are as before them")


def suspects(model: Decoder, rows: Sequence[Row], gradient: Gradient) -> list[int]:
    """The dialogues of which a row by itself has a loss or a gradient that is not finite."""
    trained = [p for p in model.parameters() if p.requires_grad]
    bad: list[int] = []

    def look(loss: Tensor) -> None:
        of_row = torch.autograd.grad(loss, trained, allow_unused=True)
        if not all(bool(g.isfinite().all()) for g in of_row if g is not None):
            bad.append(row.dialogue_id)

    for row in rows:
        stats = gradient(rows=[row], backward=look)
        if not all(map(math.isfinite, stats.metrics().values())):
            bad.append(row.dialogue_id)
    return bad
