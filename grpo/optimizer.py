"""AdamW on fp32 master weights, with learning rate, clipping and state made explicit.

The arithmetic is `torch.optim.AdamW`'s, fused. What this adds: bf16 and fp16 parameters are updated through an fp32
copy and written back in place, so that the engine, which holds the same storage, sees them; their gradients are summed
over micro-batches in fp32; the squared gradient norm can be reduced over ranks before it is used; a step that would
spread a NaN is refused; the state is a flat dictionary of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "cosine")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: str = "constant") -> float:
    """Rate of update `step` (from 0): linear up to `peak` in the warm-up, then constant or half a cosine down to 0."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule = {schedule!r}: accepted is one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


class Optimizer:
    """AdamW over named parameters; weight decay (decoupled) falls on matrices only, not on norms and biases.

    loss.backward(); optimizer.accumulate()      # per micro-batch
    norm = optimizer.step(learning_rate(...))    # clips, updates, drops the gradients
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.max_grad_norm = max_grad_norm  # 0 = no clipping
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        self.masters: dict[str, Tensor] = {  # what AdamW updates: the parameter itself where that is precise enough
            name: parameter.detach().float() if parameter.dtype.itemsize < 4 else parameter
            for name, parameter in self.parameters.items()
        }
        matrices = [master for master in self.masters.values() if master.ndim >= 2]
        vectors = [master for master in self.masters.values() if master.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=eps, fused=True)
        for master in self.masters.values():
            step = torch.zeros((), device=master.device)
            moments = [torch.zeros_like(master, requires_grad=False) for _ in range(2)]
            self.adamw.state[master] = dict(zip(MOMENTS, (step, *moments), strict=True))

    @torch.no_grad()
    def accumulate(self) -> None:
        """Move the gradients of low-precision parameters into fp32 sums; autograd sums the others well enough."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                grad = parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Sum of the squares of all gradients, [] fp64. With sharded parameters, add it up over ranks for `step`."""
        self.accumulate()
        gradients = self._gradients()
        assert gradients, "no gradient: nothing was trained since the last step"
        return torch.stack(torch._foreach_norm(gradients)).double().square().sum()

    @torch.no_grad()
    def step(self, rate: float, squared_norm: Tensor | None = None) -> float:
        """Scale the gradients down to `max_grad_norm`, update with learning rate `rate`, drop the gradients.

        Returns the norm before clipping. If it is not finite: FloatingPointError, weights and state are as they were.
        """
        norm = math.sqrt(float(self.squared_norm() if squared_norm is None else squared_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}: no update was made")
        scale = self.max_grad_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        if 0 < scale < 1:
            torch._foreach_mul_(self._gradients(), scale)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """`step.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`, and `master.NAME` for low precision; no copies are made."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            state |= {f"{key}.{name}": self.adamw.state[master][key] for key in MOMENTS}
            if master is not self.parameters[name]:
                state[f"master.{name}"] = master
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state` was taken. ValueError names a tensor missing, surplus or of another shape."""
        own = self.state_dict()
        if wrong := sorted(own.keys() ^ state.keys()):
            problem = "is missing" if wrong[0] in own else "belongs to no parameter here"
            raise ValueError(f"optimizer state: {wrong[0]} {problem} ({len(wrong)} such tensors)")
        for key, tensor in own.items():
            if state[key].shape != tensor.shape:
                raise ValueError(f"optimizer state: {key} has shape {[*state[key].shape]}, expected {[*tensor.shape]}")
        for key, tensor in own.items():
            tensor.copy_(state[key])
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self.masters.values() if master.grad is not None]
