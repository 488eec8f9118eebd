"""A whole optimizer on every rank: gradients are added up over the ranks, and all take the same step."""

from __future__ import annotations

from typing import Any

import torch
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.world import World
from torch import Tensor, nn


class ReplicatedOptimizer(Optimizer):
    """What adapters are trained with, whose parameters are few."""

    def __init__(self, model: nn.Module, *, world: World, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.world = world

    @torch.no_grad()
    def squared_grad_norm(self) -> Tensor:
        """[] fp64, of the gradient of all ranks."""
        self.accumulate()
        masters = [*self.masters.values()]
        ranks = self.world.sum([float(master.grad is not None) for master in masters])  # world
        for master, n in zip(masters, ranks, strict=True):
            if n and master.grad is None:  # another rank has one; where none has, no step is taken
                master.grad = torch.zeros_like(master)
        self.world.add_up(self.gradients())
        return super().squared_grad_norm()
