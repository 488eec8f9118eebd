"""Attention held to float64 and to torch's own, and the promise that a row's bits depend on that row's keys
alone."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import random
from collections.abc import Iterator

import pytest
import torch
from duologue.kernels import attention, backend, ops, reference
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
ISAS = [isa for isa in backend.ISAS if backend.runs(isa)]
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = [1, 7, 15, 16, 17, 64, 127, 129]


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


def rows(
    lengths: list[int], Hq: int, Hk: int, D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(D + Hq)
    q, k, v = (torch.randn(sum(lengths), heads, D, generator=generator).to(dtype) for heads in (Hq, Hk, Hk))
    return q, k, v, offsets(lengths)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    out = []
    for a, b in itertools.pairwise(cu_seqlens.tolist()):
        part = [x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        out.append(
            scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(
                0, 1
            )
        )
    return torch.cat(out)


def with_gradients(
    fn, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = fn(*inputs, cu, q.shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


def test_reference_is_torch_attention() -> None:
    q, k, v, cu = rows(LENGTHS, 4, 2, 20, torch.float64)
    ours, theirs = (
        with_gradients(fn, q, k, v, cu, torch.ones_like(q), torch.float64)
        for fn in (reference.packed_attention, torch_attention)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@functools.cache
def with_torch_errors(
    D: int, ratio: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(q, k, v, cu_seqlens, output gradient; exact output and gradients; the norms of torch's errors in
    these)."""
    inputs = rows(LENGTHS, 2 * ratio, 2, D, dtype)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = with_gradients(reference.packed_attention, *inputs, grad, torch.float64)
    theirs = with_gradients(torch_attention, *inputs, grad, dtype)
    return [*inputs, grad], exact, [(a - b).norm() for a, b in zip(theirs, exact, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "ratio"), [(16, 4), (20, 2), (32, 1), (64, 2), (80, 4), (128, 3)])
def test_error_is_no_larger_than_torch(isa: str, dtype: torch.dtype, D: int, ratio: int) -> None:
    inputs, exact, errors = with_torch_errors(D, ratio, dtype)
    ours = with_gradients(ops.packed_attention, *inputs, dtype)
    for name, factor, x, truth, error in zip(
        ("out", "q", "k", "v"), (2, 3, 3, 3), ours, exact, errors, strict=True
    ):
        assert x.dtype == dtype
        assert (x - truth).norm() <= factor * error, name


def pages_of(k: Tensor, v: Tensor, lengths: list[int], B: int) -> tuple[Tensor, Tensor, Tensor]:
    """The keys scattered over random pages; whatever holds no token is NaN, and unused table entries are
    -1."""
    counts = [-(-n // B) for n in lengths]
    order = torch.randperm(sum(counts) + 3).int()
    pages = torch.full((2, len(order), B, *k.shape[1:]), float("nan"), dtype=k.dtype)
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    start = 0
    for s, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[s, :count] = order[sum(counts[:s]) : sum(counts[:s]) + count]
        slots = table[s].long()[torch.arange(n) // B] * B + torch.arange(n) % B
        ops.write_kv(k[start : start + n], v[start : start + n], pages[0], pages[1], slots)
        start += n
    return pages[0], pages[1], table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "ratio"), [(16, 1), (32, 2), (64, 4), (80, 2), (128, 1), (20, 3)])
def test_paged_is_packed_bit_for_bit(isa: str, dtype: torch.dtype, D: int, ratio: int) -> None:
    torch.manual_seed(D)
    rng = random.Random(D)
    q, k, v, cu = rows(LENGTHS, 2 * ratio, 2, D, dtype)
    packed = ops.packed_attention(q, k, v, cu, 0.2)
    k_pages, v_pages, table = pages_of(k, v, LENGTHS, 16 * rng.randint(1, 3))
    for decode in (
        False,
        True,
        False,
        True,
    ):  # prefill in random pieces, single tokens, and in the first case everything
        ends = [rng.randint(1, n) for n in LENGTHS] if decode else LENGTHS
        new = [1 if decode and rng.random() < 0.7 else rng.randint(1, end) for end in ends]
        order = rng.sample(range(len(LENGTHS)), k=rng.randint(1, len(LENGTHS)))
        token = torch.cat([torch.arange(cu[s] + ends[s] - new[s], cu[s] + ends[s]) for s in order])
        out = ops.paged_attention(
            q[token],
            k_pages,
            v_pages,
            table[order],
            offsets([new[s] for s in order]),
            torch.tensor([ends[s] for s in order], dtype=torch.int32),
            0.2,
        )
        assert torch.equal(out, packed[token])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_keeps_its_bits_in_any_company(isa: str, dtype: torch.dtype) -> None:
    q, k, v, cu = rows(LENGTHS, 6, 2, 32, dtype)
    grad = torch.randn(q.shape).to(dtype)
    together = with_gradients(ops.packed_attention, q, k, v, cu, grad, dtype)
    for a, b in itertools.pairwise(cu.tolist()):
        alone = with_gradients(
            ops.packed_attention, q[a:b], k[a:b], v[a:b], offsets([b - a]), grad[a:b], dtype
        )
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[a:b], y)


def test_threads_do_not_change_bits() -> None:
    q, k, v, cu = rows(LENGTHS, 4, 2, 64, torch.float32)
    results = []
    before = backend.lib().threads()
    try:
        for threads in (1, 2, 5):
            backend.lib().set_threads(threads)
            results.append(with_gradients(ops.packed_attention, q, k, v, cu, q, torch.float32))
    finally:
        backend.lib().set_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_scores_do_not_overflow() -> None:
    q, k, v, cu = rows([33, 70], 2, 2, 16, torch.float32)
    out = ops.packed_attention(100 * q, 100 * k, v, cu, 1.0)  # scores of some 1e5: the softmax is an argmax
    exact = reference.packed_attention(100 * q.double(), 100 * k.double(), v.double(), cu, 1.0)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-2)


def test_empty_inputs() -> None:
    q, k = torch.empty(0, 4, 16), torch.empty(0, 2, 16)
    assert ops.packed_attention(q, k, k, offsets([]), 1.0).shape == (0, 4, 16)
    assert ops.packed_attention(q, k, k, offsets([0, 0]), 1.0).shape == (0, 4, 16)
    q, k, v, _ = rows([5], 4, 2, 16, torch.float32)
    with_hole = with_gradients(ops.packed_attention, q, k, v, offsets([0, 5, 0]), q, torch.float32)
    without = with_gradients(ops.packed_attention, q, k, v, offsets([5]), q, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(with_hole, without, strict=True))


def test_strided_inputs_are_copied() -> None:
    q, k, v, cu = rows([9, 21], 4, 2, 32, torch.float32)
    wide = torch.cat((q, k, v), dim=1)  # as a fused projection leaves them
    q_view, k_view, v_view = wide.split((4, 2, 2), dim=1)
    assert torch.equal(
        ops.packed_attention(q_view, k_view, v_view, cu, 0.1), ops.packed_attention(q, k, v, cu, 0.1)
    )


def test_library_ops_are_sound() -> None:
    q, k, v, cu = rows([3, 20], 4, 2, 16, torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention.packed_op, (*inputs, cu, 0.25))
    k_pages, v_pages, table = pages_of(k.detach(), v.detach(), [3, 20], 16)
    lengths = torch.tensor([3, 20], dtype=torch.int32)
    torch.library.opcheck(
        attention.paged_op, (q.detach(), k_pages.nan_to_num(), v_pages.nan_to_num(), table, cu, lengths, 0.25)
    )


def test_compiled_is_eager() -> None:
    q, k, v, cu = rows([3, 20], 4, 2, 16, torch.float32)
    k_pages, v_pages, table = pages_of(k, v, [3, 20], 16)
    lengths = torch.tensor([3, 20], dtype=torch.int32)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        paged = ops.paged_attention(q.detach(), k_pages, v_pages, table, cu, lengths, 0.25)
        return ops.packed_attention(q, k, v, cu, 0.25) * paged

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        with_gradients(lambda q, k, v, *_: both(q, k, v), q, k, v, cu, q, torch.float32),
        with_gradients(lambda q, k, v, *_: compiled(q, k, v), q, k, v, cu, q, torch.float32),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(5, 3, 16), "v": torch.zeros(5, 3, 16)}, "4 query heads are no multiple of 3"),
        ({"k": torch.zeros(4, 2, 16)}, r"k has shape \(4, 2, 16\)"),
        (
            {"v": torch.zeros(5, 2, 16, dtype=torch.bfloat16)},
            "v is torch.bfloat16, accepted is torch.float32",
        ),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "rise from 0 to T = 5, its entry 1 "),
        ({"cu_seqlens": torch.tensor([0, 9, 5], dtype=torch.int32)}, "its entry 2 "),
        ({"cu_seqlens": torch.tensor([1, 5], dtype=torch.int32)}, "its entry 0 "),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, "cu_seqlens is empty"),
        ({"q": torch.zeros(5, 64)}, r"q has shape \(5, 64\)"),
    ],
)
def test_packed_refuses(change: dict[str, Tensor], message: str) -> None:
    k = torch.zeros(5, 2, 16)
    args = {"q": torch.zeros(5, 4, 16), "k": k, "v": k, "cu_seqlens": offsets([5])}
    with pytest.raises(ValueError, match=message):
        ops.packed_attention(**{**args, **change}, scale=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": torch.tensor([[0, 4]], dtype=torch.int32)}, r"pages \[0, 4\].*from 0 to 3"),
        ({"block_table": torch.tensor([[0, -1]], dtype=torch.int32)}, r"pages \[0, -1\]"),
        (
            {"block_table": torch.tensor([[0]], dtype=torch.int32)},
            r"context_lens 20 and the pages \[0\] of 16",
        ),
        ({"context_lens": torch.tensor([1], dtype=torch.int32)}, "2 queries, context_lens 1 "),
        ({"cu_seqlens": offsets([3])}, "rise from 0 to T = 2"),
        ({"k_pages": torch.zeros(4, 8, 2, 16), "v_pages": torch.zeros(4, 8, 2, 16)}, "page size is 8"),
        ({"k_pages": torch.zeros(2, 16, 4, 16).transpose(0, 2)[:, :, :2]}, "v_pages has shape|contiguous"),
    ],
)
def test_paged_refuses(change: dict[str, Tensor], message: str) -> None:
    args = {
        "q": torch.zeros(2, 4, 16),
        "k_pages": torch.zeros(4, 16, 2, 16),
        "v_pages": torch.zeros(4, 16, 2, 16),
        "block_table": torch.tensor([[0, 3]], dtype=torch.int32),
        "cu_seqlens": offsets([2]),
        "context_lens": torch.tensor([20], dtype=torch.int32),
    }
    ops.paged_attention(**args, scale=1.0)
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(**{**args, **change}, scale=1.0)


@pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx", "amx-emulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (7, 1, 20), (3, 3, 128)])
def test_a_shared_prefix_changes_no_bit(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, isa: str
) -> None:
    """Decoding rows whose tables begin with the same pages, against the same keys in pages of their own."""
    if not backend.lib().use(isa):
        pytest.skip(f"this machine cannot run {isa}")
    try:
        generator = torch.Generator().manual_seed(0)
        B, shared, S = 16, (13, 13, 8, 20, 0, 9), 6
        lengths = [13 * B + 5, 13 * B + 77, 8 * B + 1, 20 * B + 40, 33, 9 * B + 1]
        groups = [(0, 1, 2), (3,), (4,), (5,)]  # 3 shares nothing with 2 but follows it
        n_pages = sum(-(-n // B) for n in lengths)
        k, v = (torch.randn(2 * n_pages, B, kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
        apart = torch.zeros(S, max(-(-n // B) for n in lengths), dtype=torch.int32)
        at = 0
        for s, n in enumerate(lengths):
            pages = -(-n // B)
            apart[s, :pages] = torch.arange(at, at + pages)
            at += pages
        together = apart.clone()
        for first, *others in groups:
            for s in others:
                together[s, : shared[s]] = apart[first, : shared[s]]
                k[apart[s, : shared[s]].long()] = k[apart[first, : shared[s]].long()]
                v[apart[s, : shared[s]].long()] = v[apart[first, : shared[s]].long()]
        q = torch.randn(S, heads, dim, generator=generator).to(dtype)
        cu, lens = torch.arange(S + 1, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
        assert not torch.equal(apart, together)
        out = [ops.paged_attention(q, k, v, table, cu, lens, dim**-0.5) for table in (apart, together)]
        assert torch.equal(*out)
        expected = reference.paged_attention(
            q.double(), k.double(), v.double(), together, cu, lens, dim**-0.5
        )
        torch.testing.assert_close(
            out[1].double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2
        )
    finally:
        backend.use("")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this platform")
@pytest.mark.parametrize("ratio", [1, 8, 96])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_work_of_a_decode_step_has_each_chunk_once(grouped: bool, ratio: int) -> None:
    """Each (sequence, chunk of 256 keys) is in one item; an item's sequences are of one group, which has that
    chunk in common, and their rows fit a tile."""
    from duologue.kernels.gpu import attention_decode

    lengths = [600, 700, 601, 1, 1025, 513, 640, 530, *[900] * 70]
    starts, shared = [0, 3, 4, 8, 78, 78], [599, 0, 512, 768, 0]  # 599 keys are two whole chunks
    tensors = [torch.tensor(x, dtype=torch.int32) for x in (lengths, starts, shared)]
    groups = (tensors[1], tensors[2]) if grouped else None
    items, n = attention_decode.work_of(tensors[0], 2048, ratio, groups, narrow=True)
    done: list[tuple[int, int]] = []
    for s, sequences, chunk in items[: int(n)].tolist():
        done += [(i, chunk) for i in range(s, s + sequences)]
        if sequences > 1:
            group = next(g for g in range(5) if starts[g] <= s < starts[g + 1])
            assert grouped
            assert s + sequences <= starts[group + 1]
            assert (chunk + 1) * 256 <= shared[group]
            assert sequences * ratio <= 64
    assert sorted(done) == [(s, c) for s, length in enumerate(lengths) for c in range(-(-length // 256))]
    assert (int(n) < len(done)) == (grouped and ratio < 96)  # 64 rows and no more


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this platform")
@pytest.mark.parametrize("ratio", [1, 8, 96])
def test_rows_whose_first_has_stopped_miss_no_chunk(ratio: int) -> None:
    """A row that stops within a call of the engine sees one key, and stays in its group."""
    from duologue.kernels.gpu import attention_decode

    lengths, starts, shared = [1, 601, 601, 1, 900, *[700] * 70], [0, 4, 5, 75, 75, 75], [512, 0, 640, 0, 0]
    lengths[5] = 1
    tensors = [torch.tensor(x, dtype=torch.int32) for x in (lengths, starts, shared)]
    items, n = attention_decode.work_of(tensors[0], 1024, ratio, (tensors[1], tensors[2]), narrow=True)
    done = [(s + i, chunk) for s, many, chunk in items[: int(n)].tolist() for i in range(many)]
    assert len(done) == len(set(done))
    assert {*done} >= {(s, c) for s, length in enumerate(lengths) for c in range(-(-length // 256))}
