"""Cases of the head with sampling or kept supports, and of group advantages, in the form of cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from duologue.kernels import ops, reference
from torch import Tensor

from bench.cases import LARGE, ODD, Case, randn

TRAIN = "sparse_linear_logprob forward and backward"


def support(N: int, V: int, most: int, whole: int) -> tuple[Tensor, Tensor, Tensor]:
    """(targets, kept ids, offsets): 1 to `most` ids per row, the target among them; every `whole`-th row has
    none listed."""
    g = torch.Generator().manual_seed(N + V)
    rows = []
    for n in range(N):
        size = int(torch.randint(1, min(most, V) + 1, (1,), generator=g))
        rows.append(
            torch.randint(V, (size,), generator=g).unique()
            if not whole or n % whole
            else torch.empty(0, dtype=torch.int64)
        )
    targets = [
        r[int(torch.randint(len(r), (1,), generator=g))] if len(r) else torch.randint(V, (), generator=g)
        for r in rows
    ]
    offsets = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0)
    return torch.stack(targets), torch.cat(rows).int(), offsets


def _sparse(
    op: str, N: int, H: int, V: int, most: int, kind: str, *, whole: int = 0, extras: bool = False
) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        head = randn(N, H, dtype=dtype), randn(V, H, dtype=dtype, seed=1) * H**-0.5 * 3
        temperature = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(N))
        more = (randn(V, dtype=dtype, seed=2), 4.0) if extras else ()
        return *head, *support(N, V, most, whole), temperature, *more

    return Case(
        op,
        f"N={N} H={H} V={V} kept<={most}{' bias softcap' if extras else ''}",
        kind,
        make,
        elements=N * most / 2 * H,
    )


def _sample(N: int, H: int, V: int, kind: str, top_p: float = 1.0) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        head = randn(N, H, dtype=dtype), randn(V, H, dtype=dtype, seed=1) * H**-0.5 * 3
        ones, ids = torch.ones(N), torch.arange(N)
        return *head, ones, 0 * ones.int(), top_p * ones, 0 * ones, ids, ids

    return Case("linear_sample", f"N={N} H={H} V={V} top_p={top_p}", kind, make, 2.0 * N * H * V, (N + V) * H)


def _advantages(N: int, groups: int, kind: str) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(N)
        rewards = torch.randint(0, 5, (N,), generator=g) / 4
        ids, roles = torch.randint(0, groups, (2, N), generator=g)
        return rewards, ids, torch.rand(N, generator=g) > 0.1, roles % 2, None, "std", groups, 2, 0.95

    return Case("group_advantages", f"N={N} groups={groups}", kind, make, elements=N * 6)


CASES: dict[str, list[Case]] = {
    "sparse_linear_logprob": [
        _sparse("sparse_linear_logprob", 1, 7, 1, 1, ODD),
        _sparse("sparse_linear_logprob", 7, 33, 127, 9, ODD, whole=3, extras=True),
        _sparse("sparse_linear_logprob", 129, 127, 129, 129, ODD, whole=5),
        _sparse("sparse_linear_logprob", 127, 64, 8_191, 40, ODD),
        _sparse("sparse_linear_logprob", 7, 16, 50_257, 300, ODD, whole=4, extras=True),
        _sparse("sparse_linear_logprob", 3, 16, 151_936, 2_000, ODD),
    ],
    TRAIN: [
        _sparse(TRAIN, 2048, 128, 512, 20, LARGE),
        _sparse(TRAIN, 1024, 256, 4_096, 60, LARGE),
        _sparse(TRAIN, 64, 512, 50_257, 200, LARGE),
    ],
    "linear_sample": [
        _sample(7, 33, 129, ODD),
        _sample(64, 128, 512, LARGE),
        _sample(64, 256, 4_096, LARGE),
        _sample(16, 256, 50_257, LARGE),
        _sample(64, 256, 50_257, LARGE),
        _sample(64, 256, 4_096, LARGE, 0.9),
    ],
    "group_advantages": [_advantages(7, 3, ODD), _advantages(256, 32, LARGE), _advantages(4096, 256, LARGE)],
}


def _trained(op: Callable[..., Any], hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        logprob, entropy = op(*inputs, *rest)
        return torch.autograd.grad(logprob.sum() + entropy.sum(), inputs)


def _two_calls(hidden: Tensor, weight: Tensor, *settings: Tensor) -> Any:
    return ops.sample(ops.linear(hidden, weight, None, torch.float32), *settings)


def _our_advantages(*args: Any) -> Any:
    rewards, ids, scored, roles, baseline, method, n_groups, n_roles, decay = args
    return ops.group_advantages(
        rewards,
        ids,
        scored,
        method=method,
        n_groups=n_groups,
        roles=roles,
        n_roles=n_roles,
        baseline=baseline,
        decay=decay,
    )


OURS: dict[str, Callable[..., Any]] = {
    "sparse_linear_logprob": ops.sparse_linear_logprob,
    TRAIN: lambda *args: _trained(ops.sparse_linear_logprob, *args),
    "linear_sample": ops.linear_sample,
    "group_advantages": _our_advantages,
}
PLAIN: dict[str, Callable[..., Any]] = {  # for linear_sample: our own two calls
    "sparse_linear_logprob": reference.sparse_linear_logprob,
    TRAIN: lambda *args: _trained(reference.sparse_linear_logprob, *args),
    "linear_sample": _two_calls,
    "group_advantages": reference.group_advantages,
}
