"""What a backward computes a second time, to the same bits, so that a forward need not keep it.

NORMS: what is made of kept tensors in one pass over memory, the outputs of norms and silu(gate) * up. These
are inputs of products, whose backward makes them again.
LAYER: activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a layer keeps what goes into it, and all
of its forward is computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

NOTHING, NORMS, LAYER = "none", "norms", "layer"


class Drawing(Protocol):
    """Whose random draws can be made again: `drawn` is the generator's state, None before the first draw."""

    drawn: Tensor | None


def recomputed(layer: nn.Module, draws: Drawing | None) -> Callable[..., Any]:
    """`layer`, as a call that keeps its inputs alone; the second time dropout draws what it drew at first."""
    first: list[Tensor | None] = []

    def forward(*inputs: Any) -> Any:
        if draws is not None and first:
            draws.drawn = first[0]
        elif draws is not None:
            first.append(draws.drawn)
        return layer(*inputs)

    def call(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

    return call


class _Again:
    """In place of a tensor, for each of those who saved it: their backwards come one after the other, and the
    first has it made for all.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._users = 0
        self._made: Tensor | None = None

    def keep(self) -> _Again:
        self._users += 1
        return self

    def take(self) -> Tensor:
        made = self._made
        if made is None:
            with torch.enable_grad():  # without it another library may serve, with other bits
                made = self._make().detach()
        self._users -= 1
        self._made = made if self._users > 0 else None
        return made


def made_again(
    lean: bool, x: Tensor, make: Callable[..., Tensor], *inputs: Any
) -> contextlib.AbstractContextManager[None]:
    """A context: whoever saves `x` in it for a backward has it from make(*inputs), which gives the same bits,
    if `lean`. The inputs must be kept for other reasons, or nothing is gained.
    """
    if not lean:
        return contextlib.nullcontext()
    held = [value.detach() if isinstance(value, Tensor) else value for value in inputs]
    again = _Again(partial(make, *held))
    own = _place(x)  # not x itself, which the hooks would keep alive

    def pack(tensor: Tensor) -> Tensor | _Again:
        return again.keep() if _place(tensor) == own else tensor

    def unpack(kept: Tensor | _Again) -> Tensor:
        return kept.take() if isinstance(kept, _Again) else kept

    return saved_tensors_hooks(pack, unpack)


def _place(x: Tensor) -> tuple[Any, ...]:
    """The same of two tensors that live at once where they are one."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()
