"""What is written into a model's parameters, as torch counts it."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_VERSION = attrgetter("_version")


def _count_fused(optimizer: Optimizer, *_: Any) -> None:
    """A fused step of torch's optimizers is not counted by torch itself."""
    groups = [group["params"] for group in optimizer.param_groups if group.get("fused")]
    if written := [parameter for group in groups for parameter in group if parameter.grad is not None]:
        increment_version(written)


register_optimizer_step_post_hook(_count_fused)


def writes(parameters: Iterable[Tensor]) -> int:
    """How many there were; what is written through `.data` is in no count."""
    return sum(map(_VERSION, parameters))
