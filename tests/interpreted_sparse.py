"""The Triton kernels of supports and group advantages in Triton's interpreter; run by
test_kernels_sparse.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.kernels import reference
from duologue.kernels.gpu import advantage as gpu_advantage
from duologue.kernels.gpu import sparse as gpu_sparse

spec = importlib.util.spec_from_file_location(
    "shared_sparse", Path(__file__).with_name("test_kernels_sparse.py")
)
assert spec is not None
assert spec.loader is not None
shared = importlib.util.module_from_spec(spec)
sys.modules["shared_sparse"] = shared
spec.loader.exec_module(shared)
ODD, METHODS, assert_no_worse, with_gradients = (
    shared.ODD,
    shared.METHODS,
    shared.assert_no_worse,
    shared.with_gradients,
)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("case", ODD[1:3], ids=lambda c: c.name)
def test_triton_sparse(case: Any, dtype: torch.dtype) -> None:
    """Rows without a support are left out: on CUDA they take the full head, outside the kernels."""
    hidden, weight, targets, ids, offsets, temperature, *more = case.make(dtype)
    rows = (offsets.diff() > 0).nonzero()[:40, 0]
    bounds = [(int(offsets[n]), int(offsets[n + 1])) for n in rows]
    ids = torch.cat([ids[a:b] for a, b in bounds])
    offsets = torch.tensor([0, *(b - a for a, b in bounds)]).cumsum(0)
    bias, softcap = (more[0], more[1]) if more else (None, 0.0)
    arguments = (hidden[rows], weight, targets[rows], ids, offsets, temperature[rows], *more)
    exact = with_gradients(reference.sparse_linear_logprob, arguments, torch.float64)
    theirs = with_gradients(reference.sparse_linear_logprob, arguments, dtype)
    inputs = (hidden[rows], weight, bias, targets[rows], ids, offsets, temperature[rows])
    logprob, entropy, logits, stats = gpu_sparse.forward(inputs, softcap)
    weights = torch.linspace(-1, 1, len(rows))
    grads = (
        torch.empty_like(hidden[rows]),
        torch.zeros_like(weight),
        None if bias is None else torch.zeros_like(bias),
    )
    gpu_sparse.backward(inputs, softcap, (entropy, logits, stats, weights, weights.flip(0)), grads)
    assert_no_worse([logprob, entropy, *(g for g in grads if g is not None)], theirs, exact, dtype)


def test_triton_says_nan_for_a_target_that_is_not_kept() -> None:
    one = torch.ones(1)
    inputs = (
        torch.ones(1, 4),
        torch.ones(6, 4),
        None,
        torch.tensor([2]),
        torch.tensor([1, 3]).int(),
        torch.tensor([0, 2]),
        one,
    )
    assert gpu_sparse.forward(inputs, 0.0)[0].isnan().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 7, 127, 129, 1_500])
def test_triton_advantages(method: str, n: int) -> None:
    given = shared.members(n, n, torch.float32)
    baseline = torch.tensor([float("nan"), 0.25, -3.0], dtype=torch.float64) if method == "running" else None
    rest = (given["group_ids"], given["scored"], given["roles"], baseline, method, 8, 3, 0.9)
    exact = reference.group_advantages(given["rewards"].double(), *rest)
    theirs = reference.group_advantages(given["rewards"], *rest)
    ours = tuple(torch.full(x.shape, 1, dtype=theirs[i].dtype) for i, x in enumerate(theirs))
    args = (given["rewards"], given["group_ids"], given["roles"], given["scored"], baseline)
    gpu_advantage.launch(args, ours, METHODS.index(method), 0.9)
    shared.assert_same_advantages(ours, theirs, exact, given["scored"])
