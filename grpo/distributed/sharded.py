"""AdamW whose fp32 masters and moments are dealt over the ranks (ZeRO stage 1).

The parameters of a layer are laid end to end, matrices and vectors apart, and padded to equal shards. Of an
update each rank gets the sum of all ranks' gradients for its shard, added in the order of the ranks; it steps
its shard, and the new values of all shards are copied into every rank's parameters, layer by layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from duologue.grpo.optimizer import MOMENTS, Optimizer, adamw, check_state
from torch import Tensor, nn


class Exchange(Protocol):
    """What the optimizer needs of a `World` of several ranks."""

    rank: int
    size: int

    def sum(self, numbers: Any) -> Any: ...
    def agree(self, flag: bool) -> bool: ...
    def scatter_sum(self, flat: Tensor) -> Tensor: ...
    def join(self, shard: Tensor) -> Tensor: ...


@dataclass
class Block:
    """Parameters that are laid end to end."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def flat(self, tensors: Mapping[str, Tensor | None], like: Tensor, ranks: int) -> Tensor:
        """[padded] fp32; a tensor that is None is zeros."""
        total = sum(self.sizes)
        flat = torch.zeros(-(-total // ranks) * ranks, device=like.device)
        for name, part in zip(self.names, torch.split(flat[:total], self.sizes), strict=True):
            tensor = tensors[name]
            if tensor is not None:
                part.copy_(tensor.reshape(-1))
        return flat

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, torch.split(flat[: sum(self.sizes)], self.sizes), strict=True))


class ShardedOptimizer(Optimizer):
    """As `Optimizer`, with this rank's shards in place of whole tensors; every rank calls each method."""

    def __init__(
        self,
        model: nn.Module,
        *,
        world: Exchange,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
    ) -> None:
        self.world = world
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.max_grad_norm = max_grad_norm
        self.blocks: dict[str, Block] = {}
        for name, parameter in self.parameters.items():
            block = self.blocks.setdefault(_block_of(name, parameter), Block())
            block.names.append(name)
            block.sizes.append(parameter.numel())
        self._sums: dict[str, Tensor] = {}  # fp32, of the gradients of low precision
        self.masters = {key: self._shard(block, self.parameters) for key, block in self.blocks.items()}
        matrices, vectors = (
            [m for key, m in self.masters.items() if key.endswith(kind)] for kind in ("matrices", "vectors")
        )
        self._adamw = adamw(matrices, vectors, betas, weight_decay)

    def _shard(self, block: Block, tensors: Mapping[str, Tensor]) -> Tensor:
        """This rank's part of them, a copy in fp32."""
        whole = {name: tensors[name].detach() for name in block.names}
        flat = block.flat(whole, self.parameters[block.names[0]], self.world.size)
        return flat.chunk(self.world.size)[self.world.rank].clone()

    def accumulate(self) -> None:
        """After a micro-batch: move low-precision gradients into fp32 sums."""
        for name, parameter in self.parameters.items():
            if parameter.dtype.itemsize >= 4 or parameter.grad is None:
                continue
            grad = parameter.grad.float()
            self._sums[name] = self._sums[name].add_(grad) if name in self._sums else grad
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Of this rank's shards, once `squared_grad_norm` has added them up."""
        return [m.grad for m in self.masters.values() if m.grad is not None]

    @torch.no_grad()
    def squared_grad_norm(self) -> Tensor:
        """[] fp64: add up the gradients over the ranks, and return this rank's part of the norm."""
        self.accumulate()
        summed = {name: self._sums.get(name, p.grad) for name, p in self.parameters.items()}
        if not self.world.agree(any(gradient is not None for gradient in summed.values())):
            return torch.zeros((), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for key, block in self.blocks.items():
            flat = block.flat(summed, self.masters[key], self.world.size)
            shard = self.world.scatter_sum(flat)
            self.masters[key].grad = shard
            total += shard.double().square().sum().cpu()
            for name in block.names:
                summed[name] = self.parameters[name].grad = None
                self._sums.pop(name, None)
        return total

    def step(self, lr: float, squared_norm: Tensor | float | None = None) -> float:
        if squared_norm is None:
            (squared_norm,) = self.world.sum([float(self.squared_grad_norm())])
        return super().step(lr, squared_norm)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The whole state, as of `Optimizer`, on the first rank; empty on the others."""
        state: dict[str, Tensor] = {}
        for key, block in self.blocks.items():
            held = {**self._adamw.state[self.masters[key]], "master": self.masters[key]}
            whole = {name: self.world.join(held[name]) for name in ("exp_avg", "exp_avg_sq", "master")}
            if self.world.rank:
                continue
            state |= {f"step.{name}": held["step"].clone() for name in block.names}
            for kind, flat in whole.items():
                for name, part in block.parts(flat).items():
                    parameter = self.parameters[name]
                    if kind != "master" or parameter.dtype.itemsize < 4:
                        state[f"{kind}.{name}"] = part.view(parameter.shape).cpu().clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole state, of however many ranks."""
        shapes = {f"{kind}.{name}": p.shape for name, p in self.parameters.items() for kind in MOMENTS[1:]}
        for name, parameter in self.parameters.items():
            shapes[f"step.{name}"] = torch.Size([])
            if parameter.dtype.itemsize < 4:
                shapes[f"master.{name}"] = parameter.shape
        check_state(shapes, state)
        for key, block in self.blocks.items():
            master = self.masters[key]
            held = self._adamw.state[master]
            held["step"].copy_(state[f"step.{block.names[0]}"])
            for kind in MOMENTS[1:]:
                held[kind].copy_(self._shard(block, {n: state[f"{kind}.{n}"] for n in block.names}))
            values = {n: state.get(f"master.{n}", self.parameters[n]) for n in block.names}
            master.copy_(self._shard(block, values))
        self._write_back()

    def _write_back(self) -> None:
        """In place, so that `_version` of each parameter tells the engine."""
        for key, block in self.blocks.items():
            for name, part in block.parts(self.world.join(self.masters[key])).items():
                parameter = self.parameters[name]
                parameter.copy_(part.view(parameter.shape))


def _block_of(name: str, parameter: Tensor) -> str:
    """Which layer, or else the parameter itself; and whether weight decay is on it."""
    layer = re.match(r"(.*\blayers\.\d+)\.", name)
    return f"{layer[1] if layer else name} {'matrices' if parameter.dim() >= 2 else 'vectors'}"
