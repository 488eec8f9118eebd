"""AdamW whose gradients, fp32 masters and moments are dealt over the ranks (ZeRO stage 2, Rajbhandari et al.,
arXiv 1910.02054).

The parameters of a layer are laid end to end, matrices and vectors apart: a block, padded to equal shards.
During each backward a block whose gradients are there is sent, while those of the layers below are computed:

    backward      head   layer 3   layer 2   layer 1   embedding
    on their way         head      layer 3   layer 2   layer 1     embedding
    added up                       head      layer 3   layer 2     layer 1, embedding

Each rank receives all ranks' gradients of its shard and adds them in a fixed tree, so that the bits are the
same every time; and, where the rows are dealt into fixed shares, for any number of ranks that divides these.
A rank steps its shard, and the new values of all shards are copied into every rank's parameters, layer by
layer. Whole gradients never exist: beside the shard there are those of two or three blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from duologue.grpo.distributed.tree import TreeSum
from duologue.grpo.optimizer import MOMENTS, Optimizer, adamw, block_of, check_state
from duologue.grpo.world import World
from torch import Tensor, nn

NORM_PART = 2**20  # numbers
LANES = 64  # a shard of fixed shares has no remainder for a loop over vectors


@dataclass
class Block:
    """Parameters that are laid end to end, and padded to a multiple of `unit` numbers."""

    unit: int
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def padded(self) -> int:
        return -(-sum(self.sizes) // self.unit) * self.unit

    def flat(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """[padded] fp32"""
        flat = torch.zeros(self.padded, device=like.device)
        for name, part in self.parts(flat).items():
            part.copy_(tensors[name].reshape(-1))
        return flat

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, torch.split(flat[: sum(self.sizes)], self.sizes), strict=True))


class ShardedOptimizer(Optimizer):
    """As `Optimizer`, with this rank's shards in place of whole tensors. Every rank calls each method, and
    `accumulate` after each of its micro-batches, of which all ranks have as many.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        world: World,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        offload: bool = False,
        shares: int = 0,
    ) -> None:
        """`shares` is a multiple of the ranks, or 0 for as many."""
        self.world = world
        self.shares = shares or world.size
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.max_grad_norm = max_grad_norm
        self.blocks: dict[str, Block] = {}
        for name, parameter in self.parameters.items():
            unit = shares * LANES or world.size
            block = self.blocks.setdefault(block_of(name, parameter), Block(unit))
            block.names.append(name)
            block.sizes.append(parameter.numel())
        self.masters = {key: self._shard(block, self.parameters) for key, block in self.blocks.items()}
        matrices, vectors = (
            [m for key, m in self.masters.items() if key.endswith(kind)] for kind in ("matrices", "vectors")
        )
        self._adamw = adamw(matrices, vectors, betas, weight_decay, offload)
        self._offload = offload
        self._sums = {key: TreeSum(self.shares) for key in self.blocks}
        self._flats: dict[str, tuple[Tensor, set[str]]] = {}  # of a block: gradients, and whose are there
        self._to_send = [*reversed(self.blocks)]  # of this micro-batch, alike on all ranks
        self._on_their_way: deque[tuple[str, Callable[[], Sequence[Tensor]]]] = deque()
        self._hooks: list[Any] = []
        for key, block in self.blocks.items():
            for name in block.names:
                listen: Any = self.parameters[name].register_post_accumulate_grad_hook
                self._hooks.append(listen(partial(self._take, key, name)))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _shard(self, block: Block, tensors: Mapping[str, Tensor]) -> Tensor:
        """This rank's part of them, a copy in fp32."""
        whole = {name: tensors[name].detach() for name in block.names}
        flat = block.flat(whole, self.parameters[block.names[0]])
        return flat.chunk(self.world.size)[self.world.rank].clone()

    # ---- gradients -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, key: str, name: str, parameter: Tensor) -> None:
        """A gradient is there. Blocks are sent in one order on all ranks, whatever order they come in."""
        assert parameter.grad is not None
        block = self.blocks[key]
        if key not in self._flats:
            assert key in self._to_send, f"a second backward in one micro-batch reached {name}"
            self._flats[key] = torch.empty(block.padded, device=parameter.device), set()
        flat, there = self._flats[key]
        block.parts(flat)[name].copy_(parameter.grad.reshape(-1))
        parameter.grad = None
        there.add(name)
        while self._to_send and self._complete(self._to_send[0]):
            self._send(self._to_send.pop(0))

    def _complete(self, key: str) -> bool:
        return key in self._flats and len(self._flats[key][1]) == len(self.blocks[key].names)

    def _send(self, key: str) -> None:
        """What has no gradient counts as zeros."""
        block, like = self.blocks[key], self.masters[key]
        if key not in self._flats:
            self._flats[key] = torch.empty(block.padded, device=like.device), set()
        flat, there = self._flats.pop(key)
        flat[sum(block.sizes) :] = 0
        for name, part in block.parts(flat).items():
            if name not in there:
                part.zero_()
        self._on_their_way.append((key, self.world.scatter(flat)))
        if len(self._on_their_way) > 1:
            self._receive()

    def _receive(self) -> None:
        key, received = self._on_their_way.popleft()
        for term in received():
            self._sums[key].add(term)
        self._sums[key].own()

    @torch.no_grad()
    def accumulate(self) -> None:
        """After a micro-batch: send what is left of it, and add up all that comes."""
        for key in self._to_send:
            self._send(key)
        while self._on_their_way:
            self._receive()
        self._to_send = [*reversed(self.blocks)]

    def gradients(self) -> list[Tensor]:
        """Of this rank's shards."""
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def drop_gradients(self) -> None:
        self._sums = {key: TreeSum(self.shares) for key in self.blocks}
        for master in self.masters.values():
            master.grad = None

    @torch.no_grad()
    def squared_grad_norm(self) -> Tensor:
        """[] fp64, of all ranks; as many numbers are added up as there are shares, in their order."""
        n, own = self.shares // self.world.size, []
        for key, master in self.masters.items():
            master.grad = self._sums.pop(key).total
            self._sums[key] = TreeSum(self.shares)
            if master.grad is not None:
                own.append(torch.stack([_squared_norm(piece) for piece in master.grad.chunk(n)]))
        of_ranks = self.world.each([values.tolist() for values in own])
        of_blocks = [value for block in zip(*of_ranks, strict=True) for rank in block for value in rank]
        return torch.tensor(sum(of_blocks), dtype=torch.float64)

    # ---- state ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The whole state, as of `Optimizer`, on the first rank; empty on the others."""
        state: dict[str, Tensor] = {}
        for key, block in self.blocks.items():
            held = {**self._adamw.state[self.masters[key]], "master": self.masters[key]}
            device = self.masters[key].device
            whole = {kind: self.world.join(held[kind].to(device)) for kind in (*MOMENTS[1:], "master")}
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
        """In place, so that `_version` of each parameter tells the engine; rounded before it is sent."""
        for key, block in self.blocks.items():
            rounded = self.masters[key].to(self.parameters[block.names[0]].dtype)
            for name, part in block.parts(self.world.join(rounded)).items():
                parameter = self.parameters[name]
                parameter.copy_(part.view(parameter.shape))


def _squared_norm(shard: Tensor) -> Tensor:
    """[] fp64, a part at a time: a wide copy of the whole would be large."""
    return torch.stack([part.double().square_().sum() for part in torch.split(shard, NORM_PART)]).sum()
