"""One list of cases per op, shared by its tests, its gradient checks and its bench. Odd sizes are for the
tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from duologue.kernels import ops, reference
from torch import Tensor

ODD, LARGE = "odd", "large"


@dataclass(frozen=True, slots=True)
class Case:
    """`make(dtype)` gives the arguments of the op; `flops` and `bytes_` (per element size) what a call must
    do at least."""

    op: str
    name: str
    kind: str
    make: Callable[[torch.dtype], tuple[Any, ...]]
    flops: float = 0.0
    elements: float = 0.0  # read and written


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The same numbers for a shape and seed every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def _linear(M: int, K: int, O: int, kind: str, bias: bool = False) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return randn(M, K, dtype=dtype), randn(O, K, dtype=dtype), randn(O, dtype=dtype) if bias else None

    return Case("linear", f"M={M} K={K} O={O}", kind, make, 2.0 * M * K * O, M * K + K * O + M * O)


def _norm(N: int, K: int, kind: str, residual: bool) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        x = randn(N, K, dtype=dtype)
        return (x, x.flip(0), randn(K, dtype=dtype), 1e-6) if residual else (x, randn(K, dtype=dtype), 1e-6)

    return Case(
        "add_rms_norm" if residual else "rms_norm",
        f"N={N} K={K}",
        kind,
        make,
        elements=(4 if residual else 2) * N * K,
    )


def _silu(N: int, K: int, kind: str) -> Case:
    return Case(
        "silu_mul",
        f"N={N} I={K}",
        kind,
        lambda d: (randn(N, K, dtype=d), randn(N + 1, K, dtype=d)[1:].contiguous()),
        elements=3 * N * K,
    )


def _rope(T: int, H: int, G: int, D: int, kind: str) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        angles = torch.arange(256).float().unsqueeze(1) * torch.arange(1, D // 2 + 1).float() / D
        positions = torch.arange(T) * 7 % 256
        return (
            randn(T, H, D, dtype=dtype),
            randn(T, G, D, dtype=dtype),
            angles.cos(),
            angles.sin(),
            positions,
        )

    return Case("rope", f"T={T} heads={H}+{G} D={D}", kind, make, elements=2 * T * (H + G) * D)


def _logprob(N: int, V: int, kind: str) -> Case:
    return Case(
        "logprob",
        f"N={N} V={V}",
        kind,
        lambda d: (3 * randn(N, V, dtype=d), torch.arange(N) * 31 % V, 0.7),
        elements=N * V,
    )


CASES: dict[str, list[Case]] = {
    "linear": [
        *(
            _linear(M, K, O, ODD, bias)
            for M, K, O, bias in ((1, 7, 5, True), (7, 129, 127, False), (129, 33, 13, True))
        ),
        *(_linear(M, 256, 768, LARGE) for M in (1, 16, 64, 4096)),
        *(_linear(M, 768, 768, LARGE) for M in (16, 64, 4096)),
        _linear(64, 256, 4096, LARGE),
    ],
    "rms_norm": [_norm(7, 129, ODD, False), _norm(1, 1, ODD, False), _norm(4096, 256, LARGE, False)],
    "add_rms_norm": [_norm(33, 127, ODD, True), _norm(4096, 256, LARGE, True)],
    "rope": [_rope(7, 4, 2, 18, ODD), _rope(129, 2, 1, 64, ODD), _rope(4096, 4, 2, 64, LARGE)],
    "silu_mul": [_silu(7, 129, ODD), _silu(4096, 768, LARGE)],
    "logprob": [_logprob(7, 129, ODD), _logprob(1024, 4096, LARGE), _logprob(64, 50257, LARGE)],
}


def ours(case: Case) -> Callable[..., Any]:
    return getattr(ops, case.op)  # type: ignore[no-any-return]


def plain(case: Case) -> Callable[..., Any]:
    """The same in plain PyTorch."""
    return getattr(reference, case.op)  # type: ignore[no-any-return]
