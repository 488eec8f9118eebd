"""AdamW whose gradients, fp32 masters and moments are dealt over the ranks (ZeRO stage 2, Rajbhandari et al.,
arXiv 1910.02054).

A block of parameters (grpo/blocks.py) is padded to equal shards. During each backward a block whose gradients
are there is sent, while those of the layers below are computed:

    backward      head   layer 3   layer 2   layer 1   embedding
    on their way         head      layer 3   layer 2   layer 1     embedding
    added up                       head      layer 3   layer 2     layer 1, embedding

Each rank receives all ranks' gradients of its shard and adds them in a fixed tree, so that the bits are the
same every time; and, where the rows are dealt into fixed shares, for any number of ranks that divides these.
A rank steps its shard, and all ranks receive the new values straight into their parameters' buffers, block by
block. Whole gradients never exist: beside the shard there are those of two or three blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from duologue.grpo.blocks import LANES, Block, is_matrices
from duologue.grpo.distributed.tree import TreeSum
from duologue.grpo.optimizer import MOMENTS, Optimizer, check_state
from duologue.grpo.world import World
from torch import Tensor, nn

NORM_PART = 2**20  # numbers
WIDE_LOAD = 16  # numbers: a shard begins where a vector of fp32 does


class ShardedOptimizer(Optimizer):
    """As `Optimizer`, with this rank's shards in place of whole tensors. Every rank calls each method, and
    `accumulate` after each of its micro-batches, of which all ranks have as many.
    """

    def __init__(self, model: nn.Module, *, world: World, shares: int = 0, **settings: Any) -> None:
        """`shares` is a multiple of the ranks, or 0 for as many; a fixed share has no remainder for a loop
        over vectors.
        """
        self.world = world
        self.shares = shares or world.size
        super().__init__(model, unit=shares * LANES or world.size * WIDE_LOAD, **settings)
        self._sums = {key: TreeSum(self.shares) for key in self.blocks}
        self._to_send = [*reversed(self.blocks)]  # of this micro-batch, alike on all ranks
        self._on_their_way: deque[tuple[str, Callable[[], Sequence[Tensor]]]] = deque()

    def _make_masters(self) -> dict[str, Tensor]:
        """This rank's shards, by block: of fp32 parameters a part of their buffer, otherwise a copy."""
        return {key: self._own(flat).to(self.blocks[key].wide) for key, flat in self.flats.items()}

    def _decays(self, name: str) -> bool:
        return is_matrices(name)

    def _own(self, flat: Tensor) -> Tensor:
        """This rank's part of a buffer."""
        return flat.chunk(self.world.size)[self.world.rank]

    # ---- gradients -----------------------------------------------------------------------------------------

    def _take(self, key: str, name: str, parameter: Tensor) -> None:
        """A gradient is there. Blocks are sent in one order on all ranks, whatever order they come in."""
        assert key in self._to_send, f"a second backward in one micro-batch reached {name}"
        gradients = self._of_block(key)
        if parameter.grad is not None:
            gradients.put(name, parameter.grad)
        gradients.done.add(name)
        parameter.grad = None
        while self._to_send and self._complete(self._to_send[0]):
            self._send(self._to_send.pop(0))

    def _complete(self, key: str) -> bool:
        return key in self._gradients and len(self._gradients[key].done) == len(self.blocks[key].shapes)

    def _send(self, key: str) -> None:
        """What has no gradient counts as zeros."""
        gradients = self._of_block(key)
        del self._gradients[key]
        for name, view in gradients.views.items():
            if name not in gradients.there:
                view.zero_()
        self._on_their_way.append((key, self.world.scatter(gradients.flat)))
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

    def drop_gradients(self) -> None:
        super().drop_gradients()
        self._sums = {key: TreeSum(self.shares) for key in self.blocks}

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

    def _write_back(self) -> None:
        """Rounded before it is sent; every rank's part comes to its place in the parameters' buffer."""
        for key, flat in self.flats.items():
            if self.blocks[key].dtype != self.blocks[key].wide:
                self._own(flat).copy_(self.masters[key])
            self.world.join(flat)
        self._note_new_weights()

    def _read_parameters(self) -> None:
        for key, flat in self.flats.items():
            self.masters[key].copy_(self._own(flat))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The whole state, as of `Optimizer`, on the first rank; empty on the others."""
        state: dict[str, Tensor] = {}
        for key, block in self.blocks.items():
            held = {**self._adamw.state[self.masters[key]], "master": self.masters[key]}
            for kind in self._kinds(block):
                whole = block.empty()
                self._own(whole).copy_(held[kind])
                self.world.join(whole)
                if not self.world.rank:
                    parts = block.views(whole)
                    state |= {f"{kind}.{name}": part.cpu().clone() for name, part in parts.items()}
            if not self.world.rank:
                state |= {f"step.{name}": held["step"].clone() for name in block.shapes}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole state, of however many ranks."""
        shapes: dict[str, torch.Size] = {}
        for block in self.blocks.values():
            for name, shape in block.shapes.items():
                shapes |= {f"{kind}.{name}": shape for kind in self._kinds(block)}
                shapes[f"step.{name}"] = torch.Size([])
        check_state(shapes, state)
        for key, block in self.blocks.items():
            held = {**self._adamw.state[self.masters[key]], "master": self.masters[key]}
            held["step"].copy_(state[f"step.{next(iter(block.shapes))}"])
            for kind in self._kinds(block):
                whole = block.filled({name: state[f"{kind}.{name}"] for name in block.shapes})
                held[kind].copy_(self._own(whole))
        self._write_back()

    @staticmethod
    def _kinds(block: Block) -> tuple[str, ...]:
        """Of a state's tensors, beside the steps."""
        return MOMENTS[1:] if block.dtype == block.wide else (*MOMENTS[1:], "master")


def _squared_norm(shard: Tensor) -> Tensor:
    """[] fp64, a part at a time: a wide copy of the whole would be large."""
    return torch.stack([part.double().square_().sum() for part in torch.split(shard, NORM_PART)]).sum()
