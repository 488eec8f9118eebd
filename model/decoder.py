"""One decoder for training and rollout: Llama, Qwen2 and Qwen3 by configuration.

The modules mirror Hugging Face's names, so a checkpoint's tensors are this model's parameters. Attention is
computed elsewhere: layers hand q, k and v to a context object, which trains on packed rows or reads the
rollout engine's pages.

A decode step of a small model is all overhead, so what runs per token avoids the slow parts of nn.Module:
`.forward` skips the hooks (a Layer is the smallest unit with hooks), `_parameters` and `_at_hand` the search
for an attribute.

Shapes: B batch, T tokens, N rows, H hidden, A query and G key heads, D head dim, V vocabulary, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from duologue.kernels import backend, fused, ops
from duologue.kernels.gather import embedding
from duologue.kernels.paged_decoder import LayerTensors, PagedDecoder
from duologue.model.config import ModelConfig
from duologue.model.recompute import LAYER, NORMS, NOTHING, Drawing, made_again, recomputed
from duologue.model.rotary import rope_tables
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor, Tensor]  # cos and sin [rows, D / 2] fp32, positions [T] int64
ROPE_ROWS = 262_144  # positions tabled from the start; beyond, the tables grow with the positions that come


class AttentionContext(Protocol):
    """What the decoder asks for attention: q [T, A, D], k and v [T, G, D] of a layer, already rotated -> [T,
    A, D].
    """

    def __call__(self, layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor: ...


class Adapters(Drawing, Protocol):
    """What a forward adds to what the linear `name` makes of x [T, K]: to `out` [T, O], in place."""

    def add(self, name: str, x_TK: Tensor, out_TO: Tensor) -> Tensor: ...

    def add_each(self, names: Sequence[str], x_TK: Tensor, outs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of three linears of one x."""

    def changes(self, name: str) -> bool:
        """Whether some token has such a part."""


class PackedAttention:
    """Causal attention within each of the sequences that lie one after the other; differentiable."""

    def __init__(self, cu_seqlens: Tensor, scale: float, exact: bool = True) -> None:
        self.exact = exact
        self.cu_seqlens = cu_seqlens  # [S + 1] int32
        self.scale = scale

    def __call__(self, layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        return ops.packed_attention(q_TAD, k_TGD, v_TGD, self.cu_seqlens, self.scale, self.exact)


class Linear(nn.Module):
    """weight [out, in] and an optional bias [out], as in the checkpoint. `name` is where it stands in the
    body.
    """

    name = ""
    exact = True

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor, lora: Adapters | None = None) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        out = ops.linear(x, weight, self.bias, exact=self.exact)
        return out if lora is None else lora.add(self.name, x, out)


def one_launch(linears: Sequence[Linear], x: Tensor) -> bool:
    """Whether the rows x go through all of these in one launch, where a decode step asks for few of them."""
    return len(x) <= fused.FEW and fused.serves(x) and all(type(linear) is Linear for linear in linears)


def project(linears: tuple[Linear, Linear, Linear], x: Tensor, lora: Adapters | None) -> Sequence[Tensor]:
    """What each makes of x [T, K]."""
    if not one_launch(linears, x):
        return [linear.forward(x, lora) for linear in linears]
    outs = fused.linears(x, [linear.weight for linear in linears], [linear.bias for linear in linears])
    if lora is None:
        return outs
    return lora.add_each([linear.name for linear in linears], x, outs)


class RMSNorm(nn.Module):
    """weight [K]; `add` first adds to the residual stream."""

    exact = True

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return ops.rms_norm(x, weight, self.eps, self.exact)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)"""
        weight = self._parameters["weight"]
        assert weight is not None
        return ops.add_rms_norm(x, residual, weight, self.eps, self.exact)

    def again(self, total: Tensor, added: bool) -> Tensor:
        """The norm of `total` once more, by the library that made it: `added` says that it was a sum."""
        sum_of_two = added and not self.exact
        return self.add(torch.zeros_like(total), total)[0] if sum_of_two else self.forward(total)


def _at_hand(module: nn.Module) -> None:
    """Let plain attribute access find the submodules. Replacing one by setattr undoes it for that one."""
    module.__dict__.update(module._modules)


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
        _at_hand(self)

    def forward(self, x_TH: Tensor, rotary: Rotary, attn: AttentionContext, lora: Adapters | None) -> Tensor:
        T, D = len(x_TH), self.head_dim
        projected = project((self.q_proj, self.k_proj, self.v_proj), x_TH, lora)
        q_TAD, k_TGD, v_TGD = (x.view(T, -1, D) for x in projected)
        paged = getattr(attn, "rotated", None) if fused.serves(x_TH) else None
        if paged is not None:
            attended = paged(self.layer, q_TAD, k_TGD, v_TGD, self._norms(), rotary)
            return self.o_proj.forward(attended.view(T, -1), lora)
        if self.q_norm is not None and self.k_norm is not None:
            q_TAD, k_TGD = self.q_norm.forward(q_TAD), self.k_norm.forward(k_TGD)
        q_TAD, k_TGD = ops.rope(q_TAD, k_TGD, *rotary)
        return self.o_proj.forward(attn(self.layer, q_TAD, k_TGD, v_TGD).view(T, -1), lora)

    def _norms(self) -> tuple[Tensor, Tensor, float] | None:
        """Weights of the norms of queries and keys, and their eps."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return self.q_norm.weight, self.k_norm.weight, self.q_norm.eps


class MLP(nn.Module):
    exact = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(H, I, config.mlp_bias)
        self.up_proj = Linear(H, I, config.mlp_bias)
        self.down_proj = Linear(I, H, config.mlp_bias)
        _at_hand(self)

    def forward(self, x_TH: Tensor, lora: Adapters | None, lean: bool = False) -> Tensor:
        pair = (self.gate_proj, self.up_proj)
        if one_launch(pair, x_TH) and not (lora and any(lora.changes(linear.name) for linear in pair)):
            product = fused.gate_up(x_TH, pair[0].weight, pair[1].weight, [linear.bias for linear in pair])
            return self.down_proj.forward(product, lora)
        gate, up = self.gate_proj.forward(x_TH, lora), self.up_proj.forward(x_TH, lora)
        product = ops.silu_mul(gate, up, self.exact)
        with made_again(lean, product, ops.silu_mul, gate, up, self.exact):
            return self.down_proj.forward(product, lora)


class Layer(nn.Module):
    """Takes what the previous layer adds to the residual stream (None at the first) and returns what this one
    adds.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        _at_hand(self)

    def forward(
        self,
        update_TH: Tensor | None,
        residual_TH: Tensor,
        rotary: Rotary,
        attn: AttentionContext,
        lora: Adapters | None = None,
        lean: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`lean`: a backward makes the norms and the MLP's product again."""
        if update_TH is None:
            x_TH = self.input_layernorm.forward(residual_TH)
        else:
            x_TH, residual_TH = self.input_layernorm.add(update_TH, residual_TH)
        with made_again(lean, x_TH, self.input_layernorm.again, residual_TH, update_TH is not None):
            attended_TH = self.self_attn.forward(x_TH, rotary, attn, lora)
        x_TH, residual_TH = self.post_attention_layernorm.add(attended_TH, residual_TH)
        with made_again(lean, x_TH, self.post_attention_layernorm.again, residual_TH, True):
            return self.mlp.forward(x_TH, lora, lean), residual_TH

    def tensors(self) -> LayerTensors:
        attn, mlp = self.self_attn, self.mlp
        return LayerTensors(
            input_norm=self.input_layernorm.weight,
            q=attn.q_proj.weight,
            q_bias=attn.q_proj.bias,
            k=attn.k_proj.weight,
            k_bias=attn.k_proj.bias,
            v=attn.v_proj.weight,
            v_bias=attn.v_proj.bias,
            q_norm=None if attn.q_norm is None else attn.q_norm.weight,
            k_norm=None if attn.k_norm is None else attn.k_norm.weight,
            o=attn.o_proj.weight,
            o_bias=attn.o_proj.bias,
            post_norm=self.post_attention_layernorm.weight,
            gate=mlp.gate_proj.weight,
            gate_bias=mlp.gate_proj.bias,
            up=mlp.up_proj.weight,
            up_bias=mlp.up_proj.bias,
            down=mlp.down_proj.weight,
            down_bias=mlp.down_proj.bias,
        )


class Body(nn.Module):
    """Embedding, layers and final norm: what the checkpoints call `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        V, H = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(V, H, _weight=torch.empty(V, H))  # a draw imports torch._dynamo
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.name = name


class Decoder(nn.Module):
    """`model(token_ids [B, T]) -> logits [B, T, V]`; `hidden` and `head` are its halves on packed tokens."""

    exact = True
    packed = False  # whether the layers' weights are in four bits
    recompute = NOTHING  # what a backward computes a second time
    library_backward = False  # whether a library may take that of attention

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.scale = config.head_dim**-0.5
        self._tables: tuple[Tensor, Tensor] | None = None

    def use_exact(self, exact: bool) -> None:
        """Whether rollout and training have one set of bits. Without it CUDA may use libraries that are
        faster; on CPU the kernels are both.
        """
        for module in self.modules():
            if isinstance(module, (Decoder, Linear, RMSNorm, MLP)):
                module.exact = exact

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def rows(self, dropout_seed: int | None = None) -> Adapters | None:
        """Where tokens go when nothing else is said: through the model's adapter, which this one has not."""
        return None

    def hidden(
        self, token_ids: Tensor, positions: Tensor, attn: AttentionContext, lora: Adapters | None = None
    ) -> Tensor:
        """token_ids and positions [T] int64 -> the final norm's output [T, H]. `lora` None is `rows()`."""
        body = self.model
        lora = self.rows() if lora is None else lora
        rotary = (*self.rotary_tables(positions), positions)
        update_TH, residual_TH = None, embedding(body.embed_tokens.weight, token_ids)
        again = self.recompute if torch.is_grad_enabled() else NOTHING
        for layer in body.layers:
            run = recomputed(layer, lora) if again == LAYER else layer
            update_TH, residual_TH = run(update_TH, residual_TH, rotary, attn, lora, again == NORMS)
        assert update_TH is not None
        return body.norm.add(update_TH, residual_TH)[0]

    def paged_layers(self) -> PagedDecoder | None:
        """The layers as one call over paged keys; None where the single ops must serve (no C++ kernels for
        this device, dtype or packing).
        """
        body, weight = self.model, self.model.embed_tokens.weight
        if not backend.cpp(weight) or self.packed:
            return None
        layers = [layer.tensors() for layer in body.layers if isinstance(layer, Layer)]
        return PagedDecoder(
            weight, layers, body.norm.weight, self.config.head_dim, self.config.rms_norm_eps, self.scale
        )

    def head(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> fp32 logits [N, V]."""
        return ops.linear(hidden_NH, self.head_weight, None, torch.float32, self.exact)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> fp32 logits [B, T, V]. ValueError when T is more than the model holds."""
        B, T = token_ids.shape
        limit = self.config.max_position_embeddings
        if limit < T:
            raise ValueError(f"the rows have {T} tokens, accepted is {limit} at most")
        positions = torch.arange(T, device=token_ids.device).repeat(B)
        cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=token_ids.device) * T
        hidden_NH = self.hidden(
            token_ids.flatten(), positions, PackedAttention(cu_seqlens, self.scale, self.exact)
        )
        return self.head(hidden_NH).view(B, T, self.config.vocab_size)

    def rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [rows, D / 2], on the positions' device, made once.

        No buffers, because a cast of the model must not reach them: in bf16 positions blur beyond 256.
        """
        known = self._tables
        limit = self.config.max_position_embeddings
        if known is not None and known[0].device == positions.device:
            if len(known[0]) == limit or int(positions.max()) < len(known[0]):
                return known
            rows = limit
        else:
            rows = min(limit, max(ROPE_ROWS, int(positions.max()) + 1)) if limit > ROPE_ROWS else limit
        with torch.inference_mode(False):  # a later backward may use them
            cos, sin = rope_tables(self.config, rows)
            self._tables = cos.to(positions.device), sin.to(positions.device)
        return self._tables

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, 0.02), projections into the residual stream over sqrt(2 layers) (GPT-2), norms 1, biases
        0.
        """
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


def empty_decoder(config: ModelConfig) -> Decoder:
    """A decoder on the meta device, for weights that are put in afterwards."""
    with torch.device("meta"):
        return Decoder(config)


def score(model: Decoder, sequences: list[list[int]], temperature: float = 1.0) -> list[Tensor]:
    """Log-prob of each token given those before it, [T - 1] per sequence, by the training forward on packed
    rows.

    Differentiable when grad is on. Raises ValueError for an id outside the vocabulary or a sequence beyond
    the context.
    """
    limit, V = model.config.max_position_embeddings, model.config.vocab_size
    for i, ids in enumerate(sequences):
        if len(ids) > limit:
            raise ValueError(f"sequence {i} has {len(ids)} tokens, accepted is {limit} at most")
        for bad in (t for t in ids if not 0 <= t < V):
            raise ValueError(f"sequence {i} has the token id {bad}, accepted is 0 to {V - 1}")
    lengths = [len(ids) for ids in sequences]
    device = model.head_weight.device
    if max(lengths, default=0) < 2:
        return [torch.empty(0, device=device) for _ in sequences]
    token_ids = torch.tensor([t for ids in sequences for t in ids], device=device)
    positions = torch.tensor([p for n in lengths for p in range(n)], device=device)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    hidden_TH = model.hidden(token_ids, positions, PackedAttention(cu_seqlens, model.scale, model.exact))
    targets = torch.nonzero(positions > 0).squeeze(1)  # every token but each sequence's first
    logprobs, _ = ops.logprob(model.head(hidden_TH[targets - 1]), token_ids[targets], temperature)
    return list(torch.split(logprobs, [max(n - 1, 0) for n in lengths]))
