"""One decoder for training and rollout: Llama, Qwen2 and Qwen3 by configuration.

The modules mirror Hugging Face's names, so a checkpoint's tensors are this model's parameters. Attention is not computed here:
the layers hand q, k and v to a context object, which trains on packed rows or reads the rollout engine's pages.

Shapes: B batch, T tokens, N rows, H hidden, A query heads, G key heads, D head dim, V vocabulary, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from duologue.kernels import ops
from duologue.model.config import ModelConfig


class AttentionContext(Protocol):
    """What the decoder asks for attention: q [T, A, D], k and v [T, G, D] of one layer, already rotated -> [T, A, D]."""

    def __call__(self, layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor: ...


class PackedAttention:
    """Causal attention within each of the sequences that lie one after the other; differentiable."""

    def __init__(self, cu_seqlens: Tensor, scale: float) -> None:
        self.cu_seqlens = cu_seqlens  # [S + 1] int32
        self.scale = scale

    def __call__(self, layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        return ops.packed_attention(q_TAD, k_TGD, v_TGD, self.cu_seqlens, self.scale)


class Linear(nn.Module):
    """weight [out, in] and an optional bias [out], as in the checkpoint."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        H, D = config.hidden_size, config.head_dim
        self.layer = layer
        self.head_dim = D
        self.q_proj = Linear(H, config.num_heads * D, config.qkv_bias)
        self.k_proj = Linear(H, config.num_kv_heads * D, config.qkv_bias)
        self.v_proj = Linear(H, config.num_kv_heads * D, config.qkv_bias)
        self.o_proj = Linear(config.num_heads * D, H, config.o_bias)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, attn: AttentionContext) -> Tensor:
        T, D = x_TH.shape[0], self.head_dim
        q_TAD = self.q_proj(x_TH).view(T, -1, D)
        k_TGD = self.k_proj(x_TH).view(T, -1, D)
        v_TGD = self.v_proj(x_TH).view(T, -1, D)
        if self.q_norm is not None and self.k_norm is not None:
            q_TAD, k_TGD = self.q_norm(q_TAD), self.k_norm(k_TGD)
        q_TAD, k_TGD = ops.rope(q_TAD, k_TGD, cos, sin, positions)
        out: Tensor = self.o_proj(attn(self.layer, q_TAD, k_TGD, v_TGD).view(T, -1))
        return out


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(H, I, config.mlp_bias)
        self.up_proj = Linear(H, I, config.mlp_bias)
        self.down_proj = Linear(I, H, config.mlp_bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        out: Tensor = self.down_proj(ops.silu_mul(self.gate_proj(x_TH), self.up_proj(x_TH)))
        return out


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Body(nn.Module):
    """Embedding, layers and final norm: what the checkpoints call `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """`model(token_ids [B, T]) -> logits [B, T, V]`; `hidden` and `head` are its two halves on packed tokens."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.scale = config.head_dim**-0.5
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)  # [max_position, D / 2] fp32
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Moves and casts as any module, but the rotary tables stay fp32: positions in bf16 would blur after 256 tokens."""
        super()._apply(fn, recurse)
        if not self.head_weight.is_meta:
            self.cos, self.sin = (table.to(self.head_weight.device) for table in rope_tables(self.config))
        return self

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, token_ids: Tensor, positions: Tensor, attn: AttentionContext) -> Tensor:
        """token_ids [T] and positions [T] int64 -> the final norm's output [T, H]."""
        body = self.model
        residual_TH: Tensor = body.embed_tokens(token_ids)
        update_TH: Tensor | None = None
        for layer in body.layers:
            assert isinstance(layer, Layer)
            norm = layer.input_layernorm
            if update_TH is None:
                x_TH = norm(residual_TH)
            else:
                x_TH, residual_TH = ops.add_rms_norm(update_TH, residual_TH, norm.weight, norm.eps)
            attended_TH = layer.self_attn(x_TH, self.cos, self.sin, positions, attn)
            norm = layer.post_attention_layernorm
            x_TH, residual_TH = ops.add_rms_norm(attended_TH, residual_TH, norm.weight, norm.eps)
            update_TH = layer.mlp(x_TH)
        assert update_TH is not None
        return ops.add_rms_norm(update_TH, residual_TH, body.norm.weight, body.norm.eps)[0]

    def head(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> fp32 logits [N, V]."""
        return ops.linear(hidden_NH, self.head_weight, None, torch.float32)

    def forward(self, token_ids: Tensor) -> Tensor:
        B, T = token_ids.shape
        positions = torch.arange(T, device=token_ids.device).repeat(B)
        cu_seqlens = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=token_ids.device)
        hidden_NH = self.hidden(token_ids.flatten(), positions, PackedAttention(cu_seqlens, self.scale))
        return self.head(hidden_NH).view(B, T, -1)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, 0.02), the projections into the residual stream scaled by 1/sqrt(2 layers) (GPT-2), norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        into_residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                std = into_residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """[D / 2] fp32 angular frequencies; "llama3" slows those whose wavelength exceeds the original context (Llama 3.1)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((scaling.original_max_position / wavelength - low) / (high - low)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / scaling.factor)


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each [max_position, D / 2] fp32."""
    angles = torch.arange(config.max_position_embeddings).float().unsqueeze(1) * rope_frequencies(config)
    return angles.cos(), angles.sin()


def score(model: Decoder, sequences: list[list[int]], temperature: float = 1.0) -> list[Tensor]:
    """Log-prob of each token given those before it, [T - 1] per sequence, by the training forward on packed rows.

    Differentiable when grad is on. Raises ValueError for an id outside the vocabulary or a sequence beyond the context.
    """
    for i, ids in enumerate(sequences):
        if len(ids) > model.config.max_position_embeddings:
            raise ValueError(f"sequence {i} has {len(ids)} tokens, the model holds {model.config.max_position_embeddings}")
        for bad in (t for t in ids if not 0 <= t < model.config.vocab_size):
            raise ValueError(f"sequence {i} has token id {bad}, accepted is 0 to {model.config.vocab_size - 1}")
    lengths = [len(ids) for ids in sequences]
    if sum(lengths) == 0:
        return [torch.empty(0) for _ in sequences]
    device = model.head_weight.device
    token_ids = torch.tensor([t for ids in sequences for t in ids], device=device)
    positions = torch.tensor([p for n in lengths for p in range(n)], device=device)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    hidden_TH = model.hidden(token_ids, positions, PackedAttention(cu_seqlens, model.scale))
    targets = torch.nonzero(positions > 0).squeeze(1)  # every token but each sequence's first
    logprobs, _ = ops.logprob(model.head(hidden_TH[targets - 1]), token_ids[targets], temperature)
    return list(logprobs.split([max(n - 1, 0) for n in lengths]))
