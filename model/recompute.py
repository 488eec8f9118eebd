"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a layer keeps what goes into it, and its
forward is computed a second time when its backward comes, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
