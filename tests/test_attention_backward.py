"""The backward of attention by a library, fed with the exact forward's statistics. The oracles are PyTorch's:
log-sum-exps and gradients in float64, and its CPU kernel that takes statistics as flash-attn does.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from duologue.grpo.config import load_config
from duologue.grpo.loss import LossConfig
from duologue.grpo.packing import Row, pack
from duologue.grpo.update import accumulate_policy_gradient
from duologue.kernels import attention, libraries, ops
from tiny import decoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LENGTHS, HEADS, KV_HEADS, D = [5, 1, 70, 33], 4, 2, 16
SCALE = 0.3


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, the gradient, cu_seqlens."""
    draws = torch.Generator().manual_seed(0)
    T = sum(LENGTHS)
    q, k, v, grad = (torch.randn(T, n, D, generator=draws) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return 2 * q.to(dtype), k.to(dtype), v.to(dtype), grad.to(dtype), cu


def alike(x: Tensor) -> Tensor:
    """[t, heads, D] -> [1, query heads, t, D]"""
    return x.repeat_interleave(HEADS // x.shape[1], 1).transpose(0, 1)[None]


def exact(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp [Hq, T]) in float64, differentiable."""
    outs, sums = [], []
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        scores = SCALE * alike(q[a:b].double()) @ alike(k[a:b].double()).transpose(2, 3)
        scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), -torch.inf)
        outs.append((scores.softmax(-1) @ alike(v[a:b].double()))[0].transpose(0, 1))
        sums.append(scores.logsumexp(-1)[0])
    return torch.cat(outs), torch.cat(sums, 1)


def gradients_of_torch(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, cu: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """By PyTorch's kernel for the CPU, which takes these statistics, sequence by sequence."""
    run: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    every = []
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        given = [alike(x[a:b]).contiguous() for x in (dout, q, k, v, out)]
        of_q, of_k, of_v = run(*given, sums[None, :, a:b].contiguous(), 0.0, True, scale=scale)
        grouped = [x[0].unflatten(0, (KV_HEADS, -1)).sum(1).transpose(0, 1) for x in (of_k, of_v)]
        every.append((of_q[0].transpose(0, 1), *grouped))
    return tuple(torch.cat(parts) for parts in zip(*every, strict=True))


def close(found: Any, expected: Any, bound: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def in_float64(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, cu: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(exact(*leaves, cu)[0], leaves, grad.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_statistics_are_what_such_a_backward_takes(dtype: torch.dtype) -> None:
    q, k, v, grad, cu = inputs(dtype)
    out, stats = attention.packed_with_stats(q, k, v, cu, SCALE)
    sums = libraries.log_sum_exp(stats)
    assert sums.is_contiguous()
    torch.testing.assert_close(sums.double(), exact(q, k, v, cu)[1], rtol=0, atol=3e-6)
    found = gradients_of_torch(grad, q, k, v, out, sums, cu, SCALE)
    close(found, in_float64(q, k, v, grad, cu), 1e-5 if dtype == torch.float32 else 1e-2)


# ---- flash-attn --------------------------------------------------------------------------------------------

calls: list[int] = []  # the longest sequence of each


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """With the arguments of flash-attn 2.8, and what its C++ asserts of them."""
    T, Hq, _ = q.shape
    assert dq is not None
    assert dk is not None
    assert dv is not None
    for x in (dout, q, k, v, out, dq, dk, dv):
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert x.dtype == q.dtype
        assert x.is_contiguous()
    assert dout.shape == out.shape == dq.shape == q.shape
    assert k.shape == v.shape == dk.shape == dv.shape
    assert (softmax_lse.shape, softmax_lse.dtype) == ((Hq, T), torch.float32)
    assert softmax_lse.is_contiguous()
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q == max_seqlen_k
    assert causal
    assert deterministic
    assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
    assert (window_size_left, window_size_right) == (-1, -1)
    calls.append(max_seqlen_q)
    for given, made in zip(
        (dq, dk, dv),
        gradients_of_torch(dout, q, k, v, out, softmax_lse, cu_seqlens_q, softmax_scale),
        strict=True,
    ):
        given.copy_(made)
    return softmax_lse


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU where it is installed."""
    package, interface = (types.ModuleType(n) for n in ("flash_attn", "flash_attn.flash_attn_interface"))
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(libraries, "HAS_FLASH_ATTN", True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.8.3")
    libraries.flash_attn_takes_statistics.cache_clear()
    calls.clear()
    yield
    libraries.flash_attn_takes_statistics.cache_clear()


def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, cu: Tensor) -> tuple[Tensor, ...]:
    """What `ops.packed_attention` gives, tensors being on CUDA as far as anybody asks."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = ops.packed_attention(*leaves, cu, SCALE, max_seqlen=max(LENGTHS), library_backward=True)
    assert torch.equal(out, ops.packed_attention(q, k, v, cu, SCALE))
    with mock.patch.object(torch.Tensor, "is_cuda", property(lambda x: True)):
        return torch.autograd.grad(out, leaves, grad.transpose(0, 1).contiguous().transpose(0, 1))


def test_flash_attn_takes_the_backward(flash_attn: None) -> None:
    assert libraries.describe_attention_backward().startswith("flash-attn")
    q, k, v, grad, cu = inputs(torch.bfloat16)
    found = backward(q, k, v, grad, cu)
    assert calls == [max(LENGTHS)]
    close(found, in_float64(q, k, v, grad, cu), 1e-2)
    for x in (q.float(), torch.zeros(0, HEADS, D, dtype=q.dtype), q[:, :, :12]):  # for which it is not made
        with mock.patch.object(torch.Tensor, "is_cuda", property(lambda x: True)):
            assert libraries.attention_backward(x) is None
    assert libraries.attention_backward(q) is None  # on CPU


def test_rows_of_a_shared_prefix_are_laid_out_for_it(flash_attn: None) -> None:
    """An update's gradients are those of our own backward, up to rounding."""
    rows = [
        Row(
            token_ids=[*range(1, 12), *[20 + i] * n],
            loss_mask=[False] * 11 + [True] * n,
            logprobs=[-3.5] * (11 + n),
            advantage=(-1.0) ** i * (1 + i),
            dialogue_id=i,
            role=0,
        )
        for i, n in enumerate([3, 9, 5])
    ]
    assert len(pack(rows).first) < len(pack(rows).nodes)
    model = decoder(1).bfloat16()
    norms = []
    for library in (False, True):
        trained = copy.deepcopy(model)
        trained.library_backward = library

        def on_cuda(loss: Tensor, library: bool = library) -> None:
            chosen = libraries._flash_attn_backward if library else None
            with mock.patch.object(libraries, "attention_backward", return_value=chosen):
                loss.backward()  # type: ignore[no-untyped-call]

        how: Any = {"temperature": 1.0, "max_tokens": 100, "backward": on_cuda}
        accumulate_policy_gradient(trained, rows, LossConfig(), **how)
        norms.append([p.grad for p in trained.parameters()])
    assert calls == [20] * model.config.num_layers
    close(norms[1], norms[0], 3e-2)


@pytest.mark.parametrize(("version", "serves"), [("2.8.3", True), ("2.7.0.post2", True), ("2.6.3", False)])
def test_an_older_flash_attn_has_other_arguments(
    version: str, serves: bool, flash_attn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert libraries.flash_attn_takes_statistics() == serves


# ---- torch's own -------------------------------------------------------------------------------------------


class Served(TorchDispatchMode):
    """In place of the kernel for CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._flash_attention_backward.default:
            return func(*args, **(kwargs or {}))
        grad, q, k, v, out, sums, cu, cu_of_keys, longest, longest_keys, dropout, causal, *_ = args
        assert torch.equal(cu, cu_of_keys)
        assert (longest, longest_keys, dropout, causal) == (max(LENGTHS), max(LENGTHS), 0.0, True)
        assert torch.are_deterministic_algorithms_enabled()  # by which the kernel does not add by atomics
        return gradients_of_torch(grad, q, k, v, out, sums, cu, kwargs["scale"])


@pytest.mark.skipif(not libraries.torch_takes_statistics(), reason="this torch's op has other arguments")
def test_torch_takes_the_backward_without_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "flash_attn_takes_statistics", lambda: False)
    assert libraries.describe_attention_backward().startswith("torch's")
    q, k, v, grad, cu = inputs(torch.bfloat16)
    with Served():
        found = backward(q, k, v, grad, cu)
    assert not torch.are_deterministic_algorithms_enabled()
    close(found, in_float64(q, k, v, grad, cu), 1e-2)
    monkeypatch.setattr(libraries, "torch_takes_statistics", lambda: False)
    assert libraries.describe_attention_backward().startswith("Triton")


def test_it_is_a_setting_of_cuda() -> None:
    assert load_config("deal").train.attention_backward == "own"
    assert load_config("deal", ["model.device=cuda"]).train.attention_backward == "library"
    with pytest.raises(ValueError, match=r"train.attention_backward = \"library\": accepted is 'own' on cpu"):
        load_config("deal", ["train.attention_backward=library"])
