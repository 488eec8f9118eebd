"""AdamW with fp32 master weights, a learning-rate schedule, and gradient clipping by the global norm.

The update is `torch.optim.AdamW`'s, fused (5 to 7 times as fast as its foreach form on a 4M-parameter model
on CPU). The model's parameters are written in place, so the rollout engine, which holds the same tensors, has
the new weights at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as apply

SCHEDULES = ("constant", "cosine")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: str, floor: float = 0.1
) -> float:
    """Of update `step` (from 0): linear warm-up, then constant, or a cosine down to `floor * peak` at the
    last step.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule = {schedule!r}: accepted is one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimizer:
    """AdamW over `model`'s parameters; weight decay on matrices only.

    bf16 and fp16 parameters get an fp32 master copy, and their gradients are summed in fp32 by `accumulate`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        offload: bool = False,
    ) -> None:
        """`offload`: the moments are in the host's memory."""
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {
            n: p if p.dtype.itemsize >= 4 else p.detach().float() for n, p in self.parameters.items()
        }
        self.max_grad_norm = max_grad_norm  # 0 = no clipping
        matrices, vectors = ([m for m in self.masters.values() if (m.dim() >= 2) == f] for f in (True, False))
        self._adamw = adamw(matrices, vectors, betas, weight_decay, offload)
        self._offload = offload

    def accumulate(self) -> None:
        """After a micro-batch: move low-precision gradients into fp32 sums; autograd sums the others well
        enough.
        """
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                grad = parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """What the next step clips and applies, fp32."""
        self.accumulate()
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def drop_gradients(self) -> None:
        """Of an update that is not to be taken."""
        self.accumulate()
        for master in self.masters.values():
            master.grad = None

    @torch.no_grad()
    def squared_grad_norm(self) -> Tensor:
        """[] fp64, of all ranks; 0 without gradients."""
        gradients = self.gradients()
        norms = torch._foreach_norm(gradients) if gradients else [torch.zeros(())]
        return torch.stack(norms).double().square().sum()

    @torch.no_grad()
    def step(self, lr: float, squared_norm: Tensor | float | None = None) -> float:
        """Clip, update in place, drop the gradients; returns the gradient norm before clipping.

        A norm that is not finite raises, with weights and state as they were.
        """
        norm = math.sqrt(float(self.squared_grad_norm() if squared_norm is None else squared_norm))
        if not math.isfinite(norm):
            raise RuntimeError(
                f"the gradient norm is {norm}; lower the learning rate or look at the last dialogues"
            )
        scale = self.max_grad_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        if 0 < scale < 1:
            torch._foreach_mul_(self.gradients(), scale)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if self._offload:
            step_offloaded(self._adamw)
        else:
            self._adamw.step()
        # Fused AdamW leaves no trace in `_version`, by which the engine sees that its KV is stale.
        torch.autograd.graph.increment_version(self.masters.values())
        self._write_back()
        for master in self.masters.values():
            master.grad = None
        return norm

    def close(self) -> None:
        """When another optimizer takes the parameters over."""

    def state_dict(self) -> dict[str, Tensor]:
        """`step.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`, and `master.NAME` for low precision; no copies are
        made.
        """
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            state |= {f"{key}.{name}": self._adamw.state[master][key] for key in MOMENTS}
            if master is not self.parameters[name]:
                state[f"master.{name}"] = master
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on exactly where `state` was taken. ValueError names a tensor missing, surplus or of another
        shape.
        """
        present = self.state_dict()
        check_state({key: tensor.shape for key, tensor in present.items()}, state)
        for key, tensor in present.items():
            tensor.copy_(state[key])
        self._write_back()

    def _write_back(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def adamw(
    matrices: list[Tensor],
    vectors: list[Tensor],
    betas: tuple[float, float],
    weight_decay: float,
    offload: bool = False,
) -> torch.optim.AdamW:
    """With its state in place, and weight decay on `matrices` alone."""
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=0.0, betas=betas, eps=1e-8, fused=True
    )
    for master in (*matrices, *vectors):
        how: dict[str, Any] = {"device": "cpu", "pin_memory": master.is_cuda} if offload else {}
        moments = [torch.zeros_like(master, requires_grad=False, **how) for _ in range(2)]
        step = torch.zeros((), device=master.device)
        optimizer.state[master] = dict(zip(MOMENTS, (step, *moments), strict=True))
    return optimizer


@torch.no_grad()
def step_offloaded(optimizer: torch.optim.AdamW) -> None:
    """A step to the same bits; one tensor's moments after the other come to its device and go back."""
    for group in optimizer.param_groups:
        how: Any = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize", "amsgrad", "fused")}
        beta1, beta2 = group["betas"]
        for master in group["params"]:
            if master.grad is None:
                continue
            held = optimizer.state[master]
            here = [held[name].to(master.device, non_blocking=True) for name in MOMENTS[1:]]
            lists: Any = ([master.grad], [here[0]], [here[1]], [], [held["step"]])
            apply([master], *lists, beta1=beta1, beta2=beta2, **how)
            for name, moment in zip(MOMENTS[1:], here, strict=True):
                held[name].copy_(moment)


def block_of(name: str, parameter: Tensor) -> str:
    """What is sent together where an optimizer is sharded: a layer's, or else the parameter alone; and
    whether weight decay is on it.
    """
    layer = re.match(r"(.*\blayers\.\d+)\.", name)
    return f"{layer[1] if layer else name} {'matrices' if parameter.dim() >= 2 else 'vectors'}"


def check_state(shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """ValueError names a tensor of `state` that is missing, surplus or of another shape."""
    if wrong := sorted(shapes.keys() ^ state.keys()):
        problem = "is missing" if wrong[0] in shapes else "belongs to no parameter here"
        raise ValueError(f"optimizer state: {wrong[0]} {problem} ({len(wrong)} such tensors)")
    for key, shape in shapes.items():
        if state[key].shape != shape:
            raise ValueError(f"optimizer state: {key} has shape {[*state[key].shape]}, expected {[*shape]}")
