"""Sums in order, an update, and the head of untruncated rows, in the interpreter: see test_gpu_path.py."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import interpreter
import pytest
import torch
from duologue.grpo.loss import LossConfig
from duologue.grpo.packing import Row
from duologue.grpo.update import accumulate_policy_gradient
from duologue.kernels import backend, fused, gather, head, ops
from duologue.kernels.gpu import gather as gpu_gather
from duologue.kernels.gpu import launcher
from duologue.kernels.gpu import linear as gpu_linear
from duologue.kernels.linear import PLACE
from duologue.model.lora import Adapter, AdapterRows, LoraSettings
from tiny import decoder
from torch import Tensor

assert backend.triton(torch.ones(1)), "TRITON_INTERPRET=1 must be set"
interpreter.replace_language_once()
NUMBERS = torch.tensor([3, 0, 3, 5, 0, 3, 1, 1, 6, 3])  # of 0 to 7: some many times, 2, 4 and 7 never


def grads(x: Tensor) -> Tensor:
    return torch.randn(len(NUMBERS), *x.shape[1:], generator=torch.Generator().manual_seed(1)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 1100)])
def test_sums_are_in_the_order_of_the_index(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As PyTorch adds them on CPU in fp32, rounded once; both as a backward and as a forward."""
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    index, grad = gather.Index(NUMBERS, 8), grads(x)
    taken = index.take(x)
    assert torch.equal(taken, x[NUMBERS])
    ordered = torch.zeros(8, *shape).index_add(0, NUMBERS, grad.float()).to(dtype)
    assert torch.equal(*torch.autograd.grad(taken, x, grad), ordered)
    rows = grad.clone().requires_grad_()
    assert torch.equal(index.sum(rows), ordered)
    back = torch.randn(8, *shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(*torch.autograd.grad(index.sum(rows), rows, back), back[NUMBERS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [5, 1100])
def test_rows_of_an_embedding_are_added_in_order_where_gradients_are_summed(
    width: int, dtype: torch.dtype
) -> None:
    """In fp32, to what is there; without such a place in a gradient that is rounded once."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, width, generator=generator).to(dtype).requires_grad_()
    before, grad = torch.randn(8, width, generator=generator), grads(weight)
    ordered = torch.zeros(8, width).index_add(0, NUMBERS, grad.float())
    taken = gather.embedding(weight, NUMBERS)
    assert torch.equal(taken, weight[NUMBERS])
    assert torch.equal(*torch.autograd.grad(taken, weight, grad), ordered.to(dtype))
    for there in (True, False):
        total = before.clone()
        setattr(weight, PLACE, lambda total=total, there=there: (total, there))
        (none,) = torch.autograd.grad(gather.embedding(weight, NUMBERS), weight, grad, allow_unused=True)
        assert none is None
        assert torch.equal(total, before + ordered if there else ordered)
    never = torch.tensor([2, 4, 7])
    assert torch.equal(total[never], torch.zeros(3, width))


def one_update(variant: str) -> list[Tensor]:
    """The gradients of rows that begin alike."""
    model = decoder(vocab_size=20, num_layers=1)
    rows = [
        Row(
            token_ids=[5, 6, 7 + i, 11],
            loss_mask=[False, False, True, True],
            logprobs=[0.0, 0.0, -3.0, -3.0],
            advantage=1.0 if i % 2 else -0.7,
            dialogue_id=i,
            role=0,
        )
        for i in range(3)
    ]
    accumulate_policy_gradient(model, rows, LossConfig(variant=variant), temperature=1.0, max_tokens=1000)
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_an_update_sums_shared_prefixes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same bits, by the kernel: for q, k and v of each layer and the last hidden states."""
    launched: list[Any] = []
    launch = gpu_gather.launch

    def recorded(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(arguments[0].shape)
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(gpu_gather, "launch", recorded)
    first = one_update("gspo")
    # A layer's q, k and v, the last hidden states; gspo's lengths, twice, and its sum of log-ratios; tokens.
    assert len(launched) == 3 + 1 + 3 + 1
    second = one_update("gspo")
    assert len(first) > 10
    assert all(map(torch.equal, first, second))


def test_untruncated_rows_of_a_sparse_batch_take_the_head_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    N, H, V = 9, 12, 50
    hidden, weight = (torch.randn(n, H, generator=generator).requires_grad_() for n in (N, V))
    targets = torch.arange(N) * 3
    sizes = torch.tensor([0, 2, 0, 0, 2, 0, 0, 0, 0])
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    ids = torch.cat([torch.stack([t, t + 1]) for t in targets[sizes > 0]]).int()
    chunks: list[int] = []
    project = head.Head.project

    def recorded(self: head.Head, rows: Any) -> Tensor:
        logits = project(self, rows)
        chunks.append(len(logits))
        return logits

    monkeypatch.setattr(head, "MIN_ROWS", 1)
    monkeypatch.setattr(head, "CPU_BYTES", 3 * V * 4)
    monkeypatch.setattr(head.Head, "project", recorded)
    logprob, entropy = ops.sparse_linear_logprob(hidden, weight, targets, ids, offsets, 0.8)
    found = torch.autograd.grad((logprob - 0.1 * entropy).sum(), (hidden, weight))
    assert chunks == [3, 3, 1] * 2  # of seven rows, forward and backward
    whole = torch.log_softmax(hidden @ weight.T / 0.8, 1)
    among = torch.log_softmax((hidden @ weight.T / 0.8).gather(1, torch.stack([targets, targets + 1], 1)), 1)
    kept = sizes > 0
    expected = torch.where(kept, among[:, 0], whole[torch.arange(N), targets])
    spread = torch.where(kept, -(among.exp() * among).sum(1), -(whole.exp() * whole).sum(1))
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(entropy, spread)
    theirs = torch.autograd.grad((expected - 0.1 * spread).sum(), (hidden, weight))
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "biased"), [(1, True), (7, False), (66, True)])
def test_products_of_one_launch_are_the_single_ones(T: int, biased: bool, dtype: torch.dtype) -> None:
    K, sizes = 70, (37, 20, 16)
    x = random(T, K, dtype=dtype, seed=0)
    weights = [random(O, K, dtype=dtype, seed=O) / 8 for O in sizes]
    biases = [random(O, dtype=dtype, seed=1) if biased else None for O in sizes]
    with torch.no_grad():
        assert fused.serves(x)
        single = [ops.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        assert all(map(torch.equal, fused.linears(x, weights, biases), single))
        up, bias = random(37, K, dtype=dtype, seed=9), biases[0]
        expected = ops.silu_mul(single[0], ops.linear(x, up, bias))
        assert torch.equal(fused.gate_up(x, weights[0], up, [bias, bias]), expected)


def test_every_tile_gives_the_same_bits() -> None:
    """Rows that fill no tile, of one product and of two in one program."""
    x, gate, up = (random(n, 136, dtype=torch.float16, seed=n) for n in (130, 40, 40))
    with torch.no_grad():
        single = ops.linear(x, gate)
        both = fused.gate_up(x, gate, up, [None] * 2)
        assert torch.equal(both, ops.silu_mul(single, ops.linear(x, up)))
        for tile in gpu_linear.TILES:
            with mock.patch.object(gpu_linear, "tile", lambda *_, tile=tile: {**tile, "STEP": 64}):
                assert torch.equal(ops.linear(x, gate), single)
                if tile in gpu_linear.fitting(2):
                    assert torch.equal(fused.gate_up(x, gate, up, [None] * 2), both)


def test_a_tile_is_chosen_for_what_it_takes() -> None:
    """The more rows and outputs, the larger; no sums that do not fit the registers; two programs fit a
    multiprocessor's memory, or three stages do not."""
    by_rows = [gpu_linear.tile(M, (4096,), True) for M in (1, 64, 65, 256, 512, 513)]
    areas = [tile["ROWS"] * tile["COLUMNS"] for tile in by_rows]
    assert areas == sorted(areas)
    assert by_rows[1]["ROWS"] == 64
    for M, O, weights in itertools.product((1, 65, 256), (512, 4096, 150_000), (1, 2)):
        tile = gpu_linear.tile(M, (O,), True, weights)
        width = tile["COLUMNS"] * weights
        assert tile["ROWS"] * width <= 128 * 32 * tile["num_warps"]  # sums of a thread: 128
        shared = 2 * tile["STEP"] * (tile["ROWS"] + width) * tile["num_stages"]
        assert shared <= (gpu_linear.HALF if tile["num_stages"] > 3 else 227 << 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("Hq", "Hk", "D", "normed"), [(4, 2, 16, True), (3, 1, 12, True), (5, 5, 2, False)])
def test_norm_rotation_and_write_of_one_launch_are_the_single_ones(
    Hq: int, Hk: int, D: int, normed: bool, dtype: torch.dtype
) -> None:
    """Heads that fill no program, a token out of range, pages that keep what nobody writes."""
    T, P, B = 9, 4, 16
    q, k, v = (random(T, H, D, dtype=dtype, seed=H + i) for i, H in enumerate((Hq, Hk, Hk)))
    norms = (random(D, dtype=dtype, seed=5), random(D, dtype=dtype, seed=6)) if normed else None
    angles = random(30, D // 2, dtype=torch.float32, seed=7)
    positions = torch.tensor([3, 0, 29, 7, 30, 11, -1, 2, 5])
    rotary = (angles.cos(), angles.sin(), positions)
    slots = torch.tensor([63, 0, 17, 5, 40, 41, 2, 16, 33])
    before = random(2, P, B, Hk, D, dtype=dtype, seed=8)
    with torch.no_grad():
        found = before.clone()
        out = fused.rotate_write(q, k, v, norms, 1e-6, rotary, (found[0], found[1]), slots)
        if norms is not None:
            q, k = ops.rms_norm(q, norms[0], 1e-6), ops.rms_norm(k, norms[1], 1e-6)
        q, k = ops.rope(q, k, *rotary)
        expected = before.clone()
        ops.write_kv(k, v, expected[0], expected[1], slots)
    assert torch.equal(out.nan_to_num(-77.0), q.nan_to_num(-77.0))
    assert bool(out.isnan().any())
    assert torch.equal(found.nan_to_num(-77.0), expected.nan_to_num(-77.0))


def test_an_adapter_in_few_launches_has_the_bits_of_the_training_forward() -> None:
    """A gradient is wanted there, so each of the four ops is one of its own."""
    names, T, K = (
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"),
        70,
        24,
    )
    dtype = torch.float16
    sizes = (40, 16, 16)
    pairs = {
        name: (random(8, K, dtype=dtype, seed=i), random(O, 8, dtype=dtype, seed=i + 10))
        for i, (name, O) in enumerate(zip(names, sizes, strict=True))
    }
    rows = AdapterRows([(Adapter(LoraSettings(rank=8, alpha=11.0), pairs), None)])
    x = random(T, K, dtype=dtype, seed=20)
    outs = [random(T, O, dtype=dtype, seed=i + 30) for i, O in enumerate(sizes)]
    launched: list[str] = []

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        launcher.launch(kernel, *arguments, **constants)

    expected = [rows.add(name, x, out.clone()) for name, out in zip(names, outs, strict=True)]
    assert all(out.requires_grad for out in expected)
    with torch.no_grad(), mock.patch.object(gpu_linear, "launch", launch):
        each = [rows.add(name, x, out.clone()) for name, out in zip(names, outs, strict=True)]
        assert launched == ["linear_kernel", "add_scaled_kernel"] * 3
        launched.clear()
        found = rows.add_each(names, x, [out.clone() for out in outs])
    assert launched == ["linears_kernel", *["add_scaled_kernel"] * 3]
    for a, b, c, out in zip(expected, each, found, outs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert not torch.equal(a, out)


def test_fused_ops_refuse_what_does_not_fit() -> None:
    x = torch.ones(2, 8)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"linears: weights\[1\] has shape \(4, 7\)"):
            fused.linears(x, [torch.ones(4, 8), torch.ones(4, 7), torch.ones(4, 8)], [None] * 3)
        with pytest.raises(ValueError, match=r"gate_up: up has shape \(5, 8\)"):
            fused.gate_up(x, torch.ones(4, 8), torch.ones(5, 8), [None] * 2)


def test_gradients_are_left_to_the_single_ops() -> None:
    assert not fused.serves(torch.ones(1))
