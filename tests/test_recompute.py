"""A backward that computes the layers' forwards anew has the bits of one that kept everything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from duologue.grpo.loss import LossConfig
from duologue.grpo.packing import Row
from duologue.grpo.update import accumulate_policy_gradient
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from tiny import decoder, policy_rows


def some_rows() -> list[Row]:
    return policy_rows([9, 14, 5, 20])


def gradients(model: Decoder, **how: Any) -> list[torch.Tensor]:
    accumulate_policy_gradient(
        model, some_rows(), LossConfig(), temperature=1.0, max_tokens=30, dropout_seed=3, **how
    )
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("recompute", ["norms", "layer"])
@pytest.mark.parametrize("dropout", [None, 0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_same_bits(dtype: torch.dtype, dropout: float | None, recompute: str) -> None:
    """Of all weights, and of an adapter whose dropout draws the same again."""
    model = decoder(1, num_layers=3).to(dtype)
    if dropout is not None:
        adapter = new_adapter(model, LoraSettings(rank=2, dropout=dropout), 0)
        for _, b in adapter.pairs.values():
            torch.nn.init.normal_(b, generator=torch.Generator().manual_seed(0))
        model = LoraDecoder(model, adapter)
    kept = gradients(copy.deepcopy(model))
    model.recompute = recompute
    again = gradients(model)
    assert len(kept) == len(again) > 10
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
