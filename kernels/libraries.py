"""Other people's kernels, where they are installed: they serve CUDA tensors when bits need not be those of
the rollout (`exact=False`), and promise less of them. liger-kernel trains the layers; flash-attn, or torch's
own variable-length attention, serves 16-bit attention."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from duologue.kernels import backend
from torch import Tensor

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


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
