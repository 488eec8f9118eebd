"""liger-kernel's generic layers, where it is installed: they train on CUDA when bits need not be those of the rollout."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("liger_kernel") is not None


def serves(x: Tensor) -> bool:
    """Whether gradients are wanted of a CUDA tensor and the package is there."""
    return INSTALLED and x.is_cuda and torch.is_grad_enabled()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    out: Tensor = LigerRMSNormFunction.apply(x.contiguous(), weight, eps, 0.0, "llama", False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    normed, total = LigerFusedAddRMSNormFunction.apply(
        x.contiguous(), residual.contiguous(), weight, eps, 0.0, "llama", False
    )
    return normed, total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    out: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return out
