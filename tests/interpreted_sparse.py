"""Supports on Triton, in Triton's interpreter: see test_kernels_sparse.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from duologue.kernels import backend, ops, reference

spec = importlib.util.spec_from_file_location(
    "shared_sparse", Path(__file__).with_name("test_kernels_sparse.py")
)
assert spec is not None
assert spec.loader is not None
shared = importlib.util.module_from_spec(spec)
sys.modules["shared_sparse"] = shared
spec.loader.exec_module(shared)
ODD = shared.ODD

assert backend.triton(torch.ones(1)), "TRITON_INTERPRET=1 must be set"
interpreter.replace_language_once()


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["supports", "some rows whole"])
@pytest.mark.parametrize("case", ODD[1:3], ids=lambda c: c.name)
def test_triton_sparse(case: Any, whole: bool, dtype: torch.dtype) -> None:
    """Rows without a support take the full head, outside of the kernels of supports."""
    hidden, weight, targets, ids, offsets, temperature, *more = case.make(dtype)
    listed = offsets.diff() > 0
    rows = (listed | whole).nonzero()[:40, 0]
    assert bool(listed[rows].all()) is not whole
    bounds = [(int(offsets[n]), int(offsets[n + 1])) for n in rows]
    ids = torch.cat([ids[a:b] for a, b in bounds])
    offsets = torch.tensor([0, *(b - a for a, b in bounds)]).cumsum(0)
    arguments = (hidden[rows], weight, targets[rows], ids, offsets, temperature[rows], *more)
    exact = shared.with_gradients(reference.sparse_linear_logprob, arguments, torch.float64)
    theirs = shared.with_gradients(reference.sparse_linear_logprob, arguments, dtype)
    ours = shared.with_gradients(ops.sparse_linear_logprob, arguments, dtype)
    shared.assert_no_worse(ours, theirs, exact, dtype)


def test_triton_says_nan_for_a_target_that_is_not_kept() -> None:
    ids, offsets = torch.tensor([1, 3]).int(), torch.tensor([0, 2])
    logprob, _ = ops.sparse_linear_logprob(
        torch.ones(1, 4), torch.ones(6, 4), torch.tensor([2]), ids, offsets
    )
    assert logprob.isnan().all()


def test_float64_goes_to_the_definition() -> None:
    hidden, weight, targets, ids, offsets, temperature, *more = ODD[1].make(torch.float64)
    arguments = (hidden, weight, targets, ids, offsets, temperature, *more)
    ours, plain = ops.sparse_linear_logprob(*arguments), reference.sparse_linear_logprob(*arguments)
    assert all(map(torch.equal, ours, plain))
    given = shared.members(9, 0, torch.float64)
    rest = (given["group_ids"], given["scored"], given["roles"], None, "std", 8, 3, 0.95)
    plain = reference.group_advantages(given["rewards"], *rest)
    assert all(map(torch.equal, ops.group_advantages(**given, method="std"), plain))
