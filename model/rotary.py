"""The angles of rotary embedding (Su et al. 2021) by configuration: plain, linear, Llama 3.1's and YaRN's.

Shapes: D head dim.
"""

from __future__ import annotations

import math

import torch
from duologue.model.config import ModelConfig, RopeScaling
from torch import Tensor


def rope_frequencies(config: ModelConfig) -> Tensor:
    """[D / 2] fp32 angular frequencies; "llama3" slows those whose wave exceeds the original context (Llama
    3.1).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    slowed = frequency / scaling.factor
    if scaling.kind == "linear":
        return slowed
    if scaling.kind == "yarn":
        kept = _yarn_kept(config, scaling)
        return slowed * (1 - kept) + frequency * kept
    waves = (
        scaling.original_max_position * frequency / (2 * math.pi)
    )  # how often it turns in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (waves - low) / (high - low)
    return torch.where(
        waves < low, slowed, torch.where(waves > high, frequency, torch.lerp(slowed, frequency, blend))
    )


def _yarn_kept(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """[D / 2] the share of each pair's own frequency that YaRN keeps: 1 for fast ones, 0 for slow ones."""
    D, original = config.head_dim, scaling.original_max_position

    def pair(turns: float) -> float:  # the one that turns so often in the original context
        return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    width = high - low if high != low else 0.001
    return 1 - ((torch.arange(D // 2, device="cpu").float() - low) / width).clamp(0, 1)


def rope_tables(config: ModelConfig, rows: int) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0 to rows - 1, each [rows, D / 2] fp32."""
    angles = torch.arange(rows, device="cpu").float().unsqueeze(1) * rope_frequencies(config)
    factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return angles.cos() * factor, angles.sin() * factor
