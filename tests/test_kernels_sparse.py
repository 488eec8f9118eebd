"""Kept supports, sampling fused with the head, group advantages: held to float64, to brute force, to each
other's bits.

The Triton kernels run in Triton's interpreter on the same cases: interpreted_sparse.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from duologue.kernels import backend, ops, reference, sparse
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from bench import cases_sparse  # noqa: E402

sys.path.pop(0)

pytestmark = pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
ISAS = [isa for isa in backend.ISAS if backend.runs(isa)]
DTYPES = (torch.float32, torch.bfloat16)
ODD = [case for case in cases_sparse.CASES["sparse_linear_logprob"] if case.kind == "odd"]
METHODS = ("std", "mean", "leave_one_out", "running")


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """torch's OpenMP threads spin after each call; on few cores they starve the kernels under test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    backend.use(request.param)
    yield request.param
    backend.use(os.environ.get("DUOLOGUE_CPU", ""))


def with_gradients(fn: Any, arguments: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """(log-prob, entropy, gradients of hidden, weight and bias) with the floating arguments in `dtype`."""
    hidden, weight, targets, ids, offsets, temperature, *more = arguments
    wide = dtype if dtype == torch.float64 else torch.float32
    inputs = [x.to(dtype).detach().requires_grad_() for x in (hidden, weight, *more[:1])]
    logprob, entropy = fn(*inputs[:2], targets, ids, offsets, temperature.to(wide), *inputs[2:], *more[1:])
    weights = torch.linspace(-1, 1, len(logprob), dtype=logprob.dtype)
    loss = (weights * logprob + weights.flip(0) * entropy).sum()
    return [logprob.detach(), entropy.detach(), *torch.autograd.grad(loss, inputs)]


def assert_no_worse(
    ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], dtype: torch.dtype
) -> None:
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        # torch may be lucky on a few short rows: below some roundings of what is summed nothing is owed
        rounding = (2.0**-22 if i < 2 else torch.finfo(dtype).eps) * max(
            float(e.norm()), len(exact[0]) ** 0.5
        )
        assert float((a.double() - e).norm()) <= (2 if i < 2 else 3) * max(
            float((b.double() - e).norm()), rounding
        ), i


def drawn(case: Any, dtype: torch.dtype, top_p: float = 0.8) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """Hidden states, weights and settings of a case, and what is sampled with half of the rows truncated."""
    hidden, weight, _, _, _, temperature, *more = case.make(dtype)
    n = torch.arange(len(hidden))
    p = torch.where(n % 2 == 0, top_p, 1.0)
    args = (temperature, 0 * n.int(), p, 0 * p, n * 977, n + 5)
    return (hidden, weight, args, more), ops.linear_sample(hidden, weight, *args, *more)


# ---- log-probs over a support ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=lambda c: c.name)
def test_error_is_at_most_that_of_plain_torch(isa: str, case: Any, dtype: torch.dtype) -> None:
    if isa == "generic" and "151936" in case.name:
        pytest.skip("the plain path in float64 is slow enough once")
    arguments = case.make(dtype)
    exact = with_gradients(reference.sparse_linear_logprob, arguments, torch.float64)
    theirs = with_gradients(reference.sparse_linear_logprob, arguments, dtype)
    ours = with_gradients(ops.sparse_linear_logprob, arguments, dtype)
    assert ours[2].dtype == ours[3].dtype == dtype
    assert_no_worse(ours, theirs, exact, dtype)


def test_float64_gradient_is_that_of_differences() -> None:
    hidden, weight, targets, ids, offsets, temperature, bias, cap = ODD[1].make(torch.float64)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def call(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rest = (targets, ids, offsets, temperature.double(), b, cap)
        return reference.sparse_linear_logprob(h, w, *rest)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD[1:], ids=lambda c: c.name)
def test_what_was_sampled_is_what_is_trained(isa: str, case: Any, dtype: torch.dtype) -> None:
    """Behaviour log-prob and entropy are those of the training op at the same weights, bit for bit, truncated
    or not."""
    (hidden, weight, args, more), (token, logprob, entropy, ids, offsets) = drawn(case, dtype)
    counts = offsets.diff()
    assert int((counts > 0).sum()) > 0
    again = ops.sparse_linear_logprob(hidden, weight, token, ids, offsets, args[0], *more)
    if more:  # softcap: rows of all tokens are capped by the same function
        assert more[1] == 4.0
    assert torch.equal(again[0], logprob)
    assert torch.equal(again[1], entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize(
    ("N", "H", "V"), [(1, 7, 1), (5, 33, 511), (70, 64, 513), (129, 32, 2_049), (3, 16, 50_257)]
)
def test_linear_sample_is_linear_then_sample(
    isa: str, dtype: torch.dtype, top_p: float, N: int, H: int, V: int
) -> None:
    hidden, weight, bias = (cases_sparse.randn(*s, dtype=dtype) for s in ((N, H), (V, H), (V,)))
    n = torch.arange(N)
    temperature = torch.where(n % 5 == 3, 0.0, 0.3 + n / N)
    args = (temperature, (n % 3).int() * 4 * (top_p < 1), torch.full((N,), top_p), 0 * temperature, n * 31, n)
    before = backend.lib().threads()
    try:
        for threads in (1, 3):
            backend.lib().set_threads(threads)
            fused = ops.linear_sample(hidden, weight, *args, bias)
            two = ops.sample(ops.linear(hidden, weight, bias, torch.float32), *args)
            assert all(torch.equal(a, b) for a, b in zip(fused, two, strict=True))
    finally:
        backend.lib().set_threads(before)


def test_equal_logits_give_the_lowest_token_to_greedy_rows_in_any_tile() -> None:
    weight = torch.zeros(1_700, 3)
    weight[[520, 1_100, 1_699]] = 1.0
    zero, one, ids = torch.zeros(2), torch.ones(2), torch.arange(2)
    token = ops.linear_sample(torch.ones(2, 3), weight, zero, zero.int(), one, zero, ids, ids)[0]
    assert token.tolist() == [520, 520]


def test_bits_do_not_depend_on_company_or_threads(isa: str) -> None:
    hidden, weight, targets, ids, offsets, temperature = ODD[2].make(torch.float32)
    together = with_gradients(
        ops.sparse_linear_logprob, (hidden, weight, targets, ids, offsets, temperature), torch.float32
    )
    bounds = offsets.tolist()
    for n in (0, 1, 17, 128):  # row 0 has no support, nor has every fifth
        alone = ops.sparse_linear_logprob(
            hidden[n : n + 1],
            weight,
            targets[n : n + 1],
            ids[bounds[n] : bounds[n + 1]],
            torch.tensor([0, bounds[n + 1] - bounds[n]]),
            temperature[n : n + 1],
        )
        assert torch.equal(alone[0], together[0][n : n + 1])
        assert torch.equal(alone[1], together[1][n : n + 1])
    before = backend.lib().threads()
    try:
        for threads in (1, 3):
            backend.lib().set_threads(threads)
            again = with_gradients(
                ops.sparse_linear_logprob, (hidden, weight, targets, ids, offsets, temperature), torch.float32
            )
            assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    finally:
        backend.lib().set_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_a_support_is_the_full_head(isa: str, dtype: torch.dtype) -> None:
    hidden, weight, targets, *_ = ODD[2].make(dtype)
    none, offsets = torch.empty(0, dtype=torch.int32), torch.zeros(len(hidden) + 1, dtype=torch.int64)
    arguments = (hidden, weight, targets, none, offsets, torch.full((len(hidden),), 0.7))

    def composed(
        h: Tensor, w: Tensor, t: Tensor, i: Tensor, o: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        return ops.logprob(ops.linear(h, w, None, torch.float32), t, temperature)

    ours, theirs = (with_gradients(f, arguments, dtype) for f in (ops.sparse_linear_logprob, composed))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    exact = with_gradients(reference.sparse_linear_logprob, arguments, torch.float64)
    assert_no_worse(ours, theirs, exact, dtype)


def test_large_supports_take_the_bits_of_small_ones(isa: str) -> None:
    """Above an eighth of the vocabulary all logits are computed instead of gathered."""
    hidden, weight = (
        cases_sparse.randn(70, 33, dtype=torch.float32),
        cases_sparse.randn(300, 33, dtype=torch.float32),
    )
    small, large = torch.tensor([3, 40, 299], dtype=torch.int32), torch.arange(0, 300, 3, dtype=torch.int32)
    targets, padding = torch.full((70,), 3), torch.zeros(70, 33)
    mixed = torch.cat((large.repeat(35), small.repeat(35)))
    offsets = torch.tensor([0] + [100] * 35 + [3] * 35).cumsum(0)
    together = ops.sparse_linear_logprob(hidden, weight, targets, mixed, offsets)[
        0
    ]  # 3,605 of 21,000 are kept
    few = torch.cat((large.repeat(35), small.repeat(35), small.repeat(2_000)))
    many = torch.tensor([0] + [100] * 35 + [3] * 2_035).cumsum(0)
    rows = torch.cat((hidden, padding.repeat(29, 1)[:2_000]))
    gathered = ops.sparse_linear_logprob(rows, weight, torch.full((2_070,), 3), few, many)[0]
    assert torch.equal(together, gathered[:70])


def test_draws_are_distributed_as_the_training_op_says(isa: str) -> None:
    """Chi-square of 20,000 truncated draws against brute force in float64, and the op's own probabilities of
    them."""
    draws, H, V, top_p = 20_000, 8, 41, 0.8
    hidden, weight = (
        cases_sparse.randn(1, H, dtype=torch.float32),
        cases_sparse.randn(V, H, dtype=torch.float32) / 3,
    )
    n = torch.arange(draws)
    half = torch.full((draws,), 0.8)
    token, logprob, _, ids, offsets = ops.linear_sample(
        hidden.expand(draws, H), weight, half, 0 * n.int(), half, 0 * half, n, n
    )
    probs = torch.softmax((hidden.double() @ weight.double().T)[0] / 0.8, 0)
    ranked, order = probs.sort(descending=True)
    kept = order[ranked.cumsum(0) - ranked < top_p].sort().values
    size = len(kept)
    assert 3 < size < V
    assert torch.equal(offsets, torch.arange(draws + 1) * size)
    assert torch.equal(ids.long(), kept.repeat(draws))
    share = probs[kept] / probs[kept].sum()
    observed = torch.bincount(torch.searchsorted(kept, token), minlength=size).double()
    assert (
        float(((observed - draws * share) ** 2 / (draws * share)).sum())
        < size - 1 + 5 * (2 * (size - 1)) ** 0.5
    )
    of_op = ops.sparse_linear_logprob(
        hidden.expand(size, H), weight, kept, kept.int().repeat(size), torch.arange(size + 1) * size, 0.8
    )[0]
    torch.testing.assert_close(of_op.double().exp(), share, rtol=1e-5, atol=0)
    assert torch.equal(logprob, of_op[torch.searchsorted(kept, token)])


# ---- Triton ------------------------------------------------------------------------------------------------


def test_triton_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton chooses the interpreter once, when it is imported."""
    interpreter.passes("interpreted_sparse.py")


# ---- group advantages --------------------------------------------------------------------------------------


def members(n: int, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Ragged groups with unscored members and NaN there, some without variance, some empty."""
    g = torch.Generator().manual_seed(seed)
    ids, roles = torch.randint(0, 6, (n,), generator=g), torch.randint(0, 3, (n,), generator=g)
    scored = torch.rand(n, generator=g) > 0.2
    rewards = (torch.randn(n, generator=g, dtype=torch.float64) * 10).to(dtype)
    rewards[ids == 2] = 0.1
    rewards[~scored] = float("nan")
    return {
        "rewards": rewards,
        "group_ids": ids,
        "scored": scored,
        "roles": roles,
        "n_groups": 8,
        "n_roles": 3,
    }


def assert_same_advantages(ours: Any, theirs: Any, exact: Any, scored: Tensor) -> None:
    value, counts, flat, after = ours
    limit = 2 * float((theirs[0] - exact[0]).norm()) + 4 * torch.finfo(torch.float32).eps * max(
        1.0, float(exact[0].norm())
    )
    assert float((value - exact[0]).norm()) <= limit
    assert torch.equal(counts, exact[1])
    assert torch.equal(flat, exact[2])
    torch.testing.assert_close(
        after, exact[3], rtol=0, atol=1e-5, equal_nan=True
    )  # of means of fp32 numbers up to 40
    assert bool((value[~scored] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 7, 127, 129, 1_500])
def test_group_advantages(method: str, n: int, dtype: torch.dtype) -> None:
    """Against the definition in float64; counts and groups without variance exactly."""
    given = members(n, n, dtype)
    nan = float("nan")
    baseline = torch.tensor([nan, 0.25, -3.0], dtype=torch.float64) if method == "running" else None
    rest = (given["roles"], baseline, method, 8, 3, 0.9)
    exact = reference.group_advantages(given["rewards"].double(), given["group_ids"], given["scored"], *rest)
    theirs = reference.group_advantages(given["rewards"], given["group_ids"], given["scored"], *rest)
    ours = ops.group_advantages(**given, method=method, baseline=baseline, decay=0.9)
    assert_same_advantages(ours, theirs, exact, given["scored"])


# ---- contracts ---------------------------------------------------------------------------------------------


def small() -> dict[str, Any]:
    return {
        "hidden": torch.ones(2, 3),
        "weight": torch.arange(15.0).view(5, 3),
        "targets": torch.tensor([1, 4]),
        "kept_ids": torch.tensor([0, 1, 2, 4], dtype=torch.int32),
        "kept_offsets": torch.tensor([0, 2, 4]),
    }


WRONG = [
    ("hidden", torch.ones(2, 4), r"weight has shape \(5, 3\), accepted is \(\*, 4\)"),
    ("hidden", torch.ones(3), r"hidden has shape \(3,\)"),
    ("weight", torch.ones(5, 3).bfloat16(), "weight is torch.bfloat16, accepted is torch.float32"),
    ("weight", torch.ones(5, 3, device="meta"), "weight is on meta"),
    ("weight", torch.ones(0, 3), "weight has an empty vocabulary"),
    ("targets", torch.tensor([1, 5]), r"targets\[1\] = 5, accepted is 0 to 4"),
    ("targets", torch.tensor([-1, 4]), r"targets\[0\] = -1, accepted is 0 to 4"),
    ("targets", torch.tensor([2, 4]), r"targets\[0\] = 2, accepted is one of the kept ids of its row"),
    ("targets", torch.tensor([1, 4]).int(), "targets is torch.int32, accepted is torch.int64"),
    (
        "kept_ids",
        torch.tensor([0, 1, 2, 5]).int(),
        r"kept_ids\[3\] = 5, accepted is 0 to 4, rising within a row",
    ),
    (
        "kept_ids",
        torch.tensor([1, 1, 2, 4]).int(),
        r"kept_ids\[1\] = 1, accepted is 0 to 4, rising within a row",
    ),
    ("kept_ids", torch.tensor([0, 1, 2, 4]), "kept_ids is torch.int64, accepted is torch.int32"),
    (
        "kept_offsets",
        torch.tensor([0, 3, 2]),
        r"kept_offsets\[2\] = 2, accepted is rising from 0 to len\(kept_ids\) = 4",
    ),
    ("kept_offsets", torch.tensor([1, 2, 4]), r"kept_offsets\[0\] = 1, accepted is 0"),
    ("kept_offsets", torch.tensor([0, 2, 5]), r"kept_offsets\[2\] = 5"),
    ("kept_offsets", torch.tensor([0, 2]), r"kept_offsets has shape \(2,\), accepted is \(3\)"),
    ("temperature", 0.0, r"temperature\[0\] = 0.0+, accepted is above 0"),
    ("temperature", torch.ones(3), r"temperature has shape \(3,\), accepted is \(2\)"),
    ("bias", torch.ones(4), r"bias has shape \(4,\), accepted is \(5\)"),
    ("softcap", -1.0, r"softcap = -1.0, accepted is None or a finite number above 0"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_bad_arguments_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"sparse_linear_logprob: {message}"):
        ops.sparse_linear_logprob(**{**small(), name: value})


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    offsets=st.lists(st.integers(-2, 7), min_size=3, max_size=3),
    ids=st.lists(st.integers(-2, 7), max_size=6),
    targets=st.lists(st.integers(-2, 7), min_size=2, max_size=2),
)
def test_any_support_is_taken_or_refused_by_name(
    offsets: list[int], ids: list[int], targets: list[int]
) -> None:
    """Brute force decides which; what is taken has the right value."""
    V = 5
    fine = offsets[0] == 0 and offsets[2] == len(ids) and offsets == sorted(offsets)
    rows = [ids[a:b] for a, b in pairwise(offsets)] if fine else []
    fine = fine and all(r == sorted(set(r)) and all(0 <= i < V for i in r) for r in rows)
    fine = fine and all(0 <= t < V and (not r or t in r) for t, r in zip(targets, rows, strict=True))
    given = {
        **small(),
        "kept_ids": torch.tensor(ids).int(),
        "kept_offsets": torch.tensor(offsets),
        "targets": torch.tensor(targets),
    }
    if not fine:
        with pytest.raises(
            ValueError, match=r"sparse_linear_logprob: (kept_offsets|kept_ids|targets)\[\d\] = .*accepted is"
        ):
            ops.sparse_linear_logprob(**given)
        return
    found = ops.sparse_linear_logprob(**given)[0].tolist()
    logits = (torch.ones(2, 3) @ given["weight"].T).double()
    for n, (t, r) in enumerate(zip(targets, rows, strict=True)):
        expected = logits[n, t] - logits[n, r or slice(None)].logsumexp(0)
        assert found[n] == pytest.approx(float(expected), abs=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "gae"}, "method = 'gae', accepted is one of std, mean, leave_one_out, running"),
        (
            {"rewards": torch.zeros(7).bfloat16()},
            "rewards is torch.bfloat16, accepted is torch.float32 or torch.float64",
        ),
        ({"group_ids": torch.full((7,), 8)}, r"group_ids\[0\] = 8, accepted is 0 to 7"),
        ({"group_ids": torch.zeros(6).long()}, r"group_ids has shape \(6,\), accepted is \(7\)"),
        ({"roles": torch.full((7,), -1)}, r"roles\[0\] = -1, accepted is 0 to 2"),
        ({"scored": torch.ones(7)}, "scored is torch.float32, accepted is torch.bool"),
        ({"method": "running"}, "baseline is None, accepted is one with method 'running' only"),
        (
            {"method": "running", "baseline": torch.zeros(2).double()},
            r"baseline has shape \(2,\), accepted is \(3\)",
        ),
    ],
)
def test_group_advantages_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"group_advantages: {message}"):
        ops.group_advantages(**{**members(7, 0, torch.float32), "method": "std", **change})


def test_empty_batches_work() -> None:
    none, ids = torch.empty(0), torch.empty(0, dtype=torch.int64)
    logprob, entropy = ops.sparse_linear_logprob(
        torch.empty(0, 3), torch.ones(5, 3), ids, ids.int(), torch.zeros(1).long()
    )
    assert logprob.shape == entropy.shape == (0,)
    drawn = ops.linear_sample(torch.empty(0, 3), torch.ones(5, 3), none, none.int(), none, none, ids, ids)
    assert [len(x) for x in drawn] == [0, 0, 0, 0, 1]
    value, counts, flat, _ = ops.group_advantages(none, ids, none.bool(), method="std", n_groups=2)
    assert (len(value), counts.tolist(), flat.tolist()) == (0, [[0], [0]], [[False], [False]])


def test_library_ops_are_sound() -> None:
    hidden, weight, targets, ids, offsets, temperature, bias, cap = ODD[1].make(torch.float32)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    torch.library.opcheck(sparse.logprob_op, (*inputs, targets, ids, offsets, temperature, cap))
    torch.library.opcheck(sparse.logprob_op, (*inputs[:2], None, targets, ids, offsets, temperature, 0.0))
    given = members(9, 0, torch.float32)
    rest = (given["rewards"], given["group_ids"], given["scored"], given["roles"])
    torch.library.opcheck(torch.ops.duologue.group_advantages.default, (*rest, None, "std", 8, 3, 0.9))
    torch.library.opcheck(
        torch.ops.duologue.group_advantages.default, (*rest, torch.zeros(3).double(), "running", 8, 3, 0.9)
    )


def test_compiled_is_eager() -> None:
    arguments = ODD[1].make(torch.float32)
    compiled = torch.compile(ops.sparse_linear_logprob, fullgraph=True, backend="aot_eager")
    ours, again = (with_gradients(f, arguments, torch.float32) for f in (ops.sparse_linear_logprob, compiled))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    given = members(9, 0, torch.float32)
    call = lambda: ops.group_advantages(**given, method="mean")[0]  # noqa: E731
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(), call())
    (hidden, weight, args, _), eager = drawn(ODD[2], torch.float32)
    sampled = torch.compile(lambda h, w: ops.linear_sample(h, w, *args), fullgraph=True, backend="aot_eager")(
        hidden, weight
    )
    assert all(torch.equal(a, b) for a, b in zip(sampled, eager, strict=True))
