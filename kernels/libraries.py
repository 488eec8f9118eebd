"""Other people's kernels, where they are installed: they serve CUDA tensors when bits need not be those of
the rollout (`exact=False`), and promise less of them. liger-kernel trains the layers; flash-attn, or torch's
own variable-length attention, serves 16-bit attention. Either can also take the backward alone, behind the
exact forward: a gradient owes no bits to the rollout."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from duologue.kernels import backend
from torch import Tensor

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None

# (q, k, v, cu_seqlens, scale, longest sequence, out, log-sum-exp [Hq, T], grad) -> gradients of q, k and v
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
# The arguments of aten::_flash_attention_backward as it is called here
RAW_BACKWARD = "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
RAW_BACKWARD += "rng_state unused scale window_size_left window_size_right"


def liger(x: Tensor, exact: bool) -> bool:
    """Whether liger-kernel serves `x`: on CUDA, where a gradient may be wanted."""
    return HAS_LIGER and not exact and x.is_cuda and backend.triton(x) and torch.is_grad_enabled()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    out: Tensor = LigerRMSNormFunction.apply(x.contiguous(), weight, eps, 0.0, "llama", False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    x, residual = x.contiguous(), residual.contiguous()
    normed, total = LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)
    return normed, total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    out: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return out


def attention(q: Tensor, exact: bool) -> Callable[..., Tensor] | None:
    """Attention (q, k, v, cu_seqlens, scale, longest sequence) by the library that serves `q`; None where
    none does."""
    if exact or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256:
        return None
    if HAS_FLASH_ATTN:
        return _flash_attn
    return _torch_varlen if varlen_options() is not None else None


def describe_attention() -> str:
    """One line on what serves 16-bit attention on CUDA without exact."""
    if HAS_FLASH_ATTN:
        return "flash-attn"
    options = varlen_options()
    if options is None:
        return f"Triton (torch {torch.__version__} has no varlen_attn with scale and window_size)"
    told = "" if "enable_gqa" in options else " (without enable_gqa)"
    return f"torch's varlen_attn{told}"


@functools.cache
def varlen_options() -> dict[str, Any] | None:
    """What makes torch's own attention causal, with fewer key heads than query heads; None where it is absent
    or takes no scale. Before 2.12 it has no enable_gqa: its kernel takes fewer key heads without being told.
    """
    if not importlib.util.find_spec("torch.nn.attention.varlen"):
        return None
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters.keys()
    if not {"scale", "window_size"} <= accepted:
        return None
    return {"window_size": (-1, 0), **({"enable_gqa": True} if "enable_gqa" in accepted else {})}


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out: Tensor = flash_attn_varlen_func(q, k, v, *lengths, softmax_scale=scale, causal=True)
    return out


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: int
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    causal = varlen_options() or {}
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    attend: Any = varlen_attn
    out: Tensor = attend(q, k, v, *lengths, scale=scale, **causal)
    return out


# ---- the backward of attention alone -----------------------------------------------------------------------


def attention_backward(q: Tensor) -> Backward | None:
    """The library that takes the backward of attention over `q`; None where none does."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or not len(q):
        return None
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return None
    if flash_attn_takes_statistics():
        return _flash_attn_backward
    return _torch_backward if torch_takes_statistics() else None


def describe_attention_backward() -> str:
    """One line on what serves with train.attention_backward = 'library'."""
    if flash_attn_takes_statistics():
        return "flash-attn, on the exact forward's statistics"
    if torch_takes_statistics():
        return "torch's flash attention, on the exact forward's statistics"
    return f"Triton (torch {torch.__version__} takes other statistics)"


def describe_gpu() -> str:
    """One line on what decides the bits of a run on CUDA, beside its settings and our kernels."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "absent"
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton}"
    return f"{device}, attention's backward by {describe_attention_backward()}"


@functools.cache
def flash_attn_takes_statistics() -> bool:
    """From 2.7 on its backward has the arguments below, and statistics [Hq, T]; 3 is another package."""
    if not HAS_FLASH_ATTN:
        return False
    found = re.match(r"2\.(\d+)", importlib.metadata.version("flash-attn"))
    return found is not None and int(found[1]) >= 7


@functools.cache
def torch_takes_statistics() -> bool:
    """Whether the op that varlen_attn calls for its gradients has the arguments that are given here."""
    op = getattr(torch.ops.aten, "_flash_attention_backward", None)
    return op is not None and [x.name for x in op.default._schema.arguments] == RAW_BACKWARD.split()


def log_sum_exp(stats: Tensor) -> Tensor:
    """[Hq, T] fp32, natural, of each row's scaled scores: `stats` [T, Hq, 2] has the largest one in base 2
    and 1 / the sum of the powers of two relative to it.
    """
    return (stats[..., 0] * math.log(2) - stats[..., 1].log()).t().contiguous()


def _flash_attn_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    longest: int,
    out: Tensor,
    statistics: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attn_varlen_backward(
        dout=grad,
        q=q,
        k=k,
        v=v,
        out=out,
        softmax_lse=statistics,
        dq=grads[0],
        dk=grads[1],
        dv=grads[2],
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=True,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,  # the same update twice has the same bits
    )
    return grads


def _torch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    longest: int,
    out: Tensor,
    statistics: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    no_dropout = (torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # otherwise it adds up by atomics
    try:
        run: Any = torch.ops.aten._flash_attention_backward
        grads = run(grad, q, k, v, out, statistics, *lengths, 0.0, True, *no_dropout, scale=scale)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
    return grads[0], grads[1], grads[2]
