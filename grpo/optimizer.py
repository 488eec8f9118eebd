"""AdamW with fp32 master weights, a learning-rate schedule, and gradient clipping by the global norm.

The update is `torch.optim.AdamW`'s. The model's parameters are written in place, so the rollout engine, which holds the same
tensors, has the new weights at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "cosine")


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: str, floor: float = 0.1) -> float:
    """Of update `step` (from 0): linear warm-up, then constant, or a cosine from `peak` to `floor * peak` at the last step."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule = {schedule!r}: accepted is one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimizer:
    """AdamW over `model`'s parameters; weight decay on matrices only. bf16 and fp16 parameters get an fp32 master copy."""

    def __init__(self, model: nn.Module, *, betas: tuple[float, float], weight_decay: float, max_grad_norm: float) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in self.parameters]
        self.max_grad_norm = max_grad_norm
        groups = [
            {"params": [m for m in self.masters if m.dim() >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=1e-8, foreach=True)

    def squared_grad_norm(self) -> Tensor:
        """The sum to be reduced over ranks before `step`."""
        squares = [p.grad.float().square().sum() for p in self.parameters if p.grad is not None]
        return torch.stack(squares).sum() if squares else torch.zeros(())

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip, update in place, clear the gradients; returns the gradient norm before clipping. A non-finite norm raises."""
        norm = float(self.squared_grad_norm().sqrt())
        if not math.isfinite(norm):
            raise RuntimeError(f"the gradient norm is {norm}; lower the learning rate or look at the last dialogues")
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm > 0 else 1.0
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is None:
                continue
            grad = parameter.grad.float() * scale if scale != 1.0 else parameter.grad.float()
            parameter.grad = None
            master.grad = grad
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None
            if master is not parameter:
                parameter.copy_(master)
        return norm

    def state_dict(self) -> dict[str, Any]:
        masters = [m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        return {"adamw": self._adamw.state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adamw.load_state_dict(state["adamw"])
        mine = [m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        for master, saved in zip(mine, state["masters"], strict=True):
            master.copy_(saved)
