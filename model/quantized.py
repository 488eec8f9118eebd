"""A frozen base in four bits (NF4, Dettmers et al. 2023, arXiv 2305.14314) under an adapter, by bitsandbytes
where it is installed.

Only the weights of the layers' linears are packed; embedding, head and norms stay as they are. Each use
unpacks one weight, in the forward and again in the backward, so that no unpacked copy outlives its layer.
Rollout and training unpack to the same values: their log-probs agree as they do without.
"""

from __future__ import annotations

from typing import Any

import torch
from duologue.kernels import ops
from duologue.kernels.linear import backward_op as linear_backward
from duologue.model.decoder import Decoder, Linear
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale


class QuantizedLinear(Linear):
    """Stands where a `Linear` of the same weights stood."""

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)
        functional = _functional()
        self.name, self.exact = linear.name, linear.exact
        self.bias = linear.bias
        packed, self.state = functional.quantize_4bit(
            linear.weight.detach().contiguous(), blocksize=BLOCK, quant_type="nf4"
        )
        self.register_buffer("packed", packed)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in], unpacked for this use."""
        weight: Tensor = _functional().dequantize_4bit(self.packed, self.state)
        return weight

    def forward(self, x: Tensor, lora: Any = None) -> Tensor:
        out: Tensor = _Unpacked.apply(x, self)  # type: ignore[no-untyped-call]
        out = out if self.bias is None else out + self.bias
        return out if lora is None else lora.add(self.name, x, out)


class _Unpacked(torch.autograd.Function):
    """x @ W^T without W in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return ops.linear(x, module.weight, exact=module.exact)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight = ctx.module.weight
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = linear_backward(rows.new_empty((len(rows), weight.shape[1])), weight, rows, True, False)[0]
        return grad_x.view(*grad.shape[:-1], weight.shape[1]), None


def _functional() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(
            f"lora.quantize = 'nf4' needs bitsandbytes ({error}): pip install bitsandbytes"
        ) from None
    return functional


def quantize(model: Decoder, device: str | torch.device | None = None) -> Decoder:
    """Pack the layers' linears of `model` in place; what they took before is free when nobody else
    holds it. On `device`, where it is given: one linear at a time goes there unpacked."""
    model.requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Linear:
                setattr(module, name, QuantizedLinear(child if device is None else child.to(device)))
                module.__dict__[name] = module._modules[name]
    model.packed = True
    return model if device is None else model.to(device)
