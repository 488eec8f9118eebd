"""All layers of a decoder over paged keys in one call: inference on the C++ kernels, without a Python step
per op.

It is made of the same functions as the single ops, so its bits are theirs: the definition is the loop over
layers with `ops.add_rms_norm`, `linear`, `rms_norm`, `rope`, `write_kv`, `paged_attention` and `silu_mul`
(duologue.model.decoder). Blocks of rows go through a layer on one thread each, where their activations stay
in the cache; fewer rows than that share every op.

Shapes: T tokens, S sequences, L layers, H hidden, I intermediate, Hq/Hk query and key heads, D head dim, P
pages, B page size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from duologue.kernels.backend import DTYPES, check, lib, pointers
from duologue.kernels.softmax import Settings, check_settings, take_supports
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTensors:
    """One layer's weights, each contiguous and of one dtype, in the order of `LayerTensors` in
    csrc/kernels.h."""

    input_norm: Tensor  # [H]
    q: Tensor  # [Hq * D, H]
    q_bias: Tensor | None
    k: Tensor  # [Hk * D, H]
    k_bias: Tensor | None
    v: Tensor  # [Hk * D, H]
    v_bias: Tensor | None
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Tensor  # [H, Hq * D]
    o_bias: Tensor | None
    post_norm: Tensor  # [H]
    gate: Tensor  # [I, H]
    gate_bias: Tensor | None
    up: Tensor  # [I, H]
    up_bias: Tensor | None
    down: Tensor  # [H, I]
    down_bias: Tensor | None


def _check_place(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"PagedDecoder: {name} must be contiguous, it is read where it lies")


class PagedDecoder:
    """Embedding [V, H], layers and final norm [H], checked once. They stay the caller's: each call reads them
    as they are then."""

    def __init__(
        self,
        embedding: Tensor,
        layers: Sequence[LayerTensors],
        final_norm: Tensor,
        head_dim: int,
        eps: float,
        scale: float,
    ) -> None:
        op = "PagedDecoder"
        D = head_dim
        first = layers[0]
        self._dtype = dtype = first.q.dtype
        H, I, Q, G = len(final_norm), len(first.gate), len(first.q), len(first.k)
        if dtype not in DTYPES or Q % D or G % D or Q % G:
            given = f"{dtype}, {Q} and {G} query and key rows for a head dim of {D}"
            raise ValueError(f"{op}: {given} are no decoder")
        shapes = {
            "q": (Q, H), "k": (G, H), "v": (G, H), "o": (H, Q),
            "q_bias": (Q,), "k_bias": (G,), "v_bias": (G,), "o_bias": (H,),
            "gate": (I, H), "up": (I, H), "down": (H, I),
            "gate_bias": (I,), "up_bias": (I,), "down_bias": (H,),
            "input_norm": (H,), "post_norm": (H,), "q_norm": (D,), "k_norm": (D,),
        }  # fmt: skip
        self._weights: list[Tensor | None] = []
        for i, layer in enumerate(layers):
            for field in fields(layer):
                tensor: Tensor | None = getattr(layer, field.name)
                if tensor is not None:
                    name = f"layers[{i}].{field.name}"
                    check(op, "cpu", **{name: (tensor, shapes[field.name], dtype)})
                    _check_place(name, tensor)
                self._weights.append(tensor)
        check(op, "cpu", final_norm=(final_norm, (H,), dtype), embedding=(embedding, (None, H), dtype))
        _check_place("embedding", embedding)
        self._embedding, self._final_norm = embedding, final_norm
        self._eps, self._scale = eps, scale
        self._n_layers = len(layers)
        self._sizes = (H, I, Q // D, G // D, D)

    def __call__(
        self,
        token_ids: Tensor,
        wanted: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        kv: Tensor,
        slots: Tensor,
        block_table: Tensor,
        cu_seqlens: Tensor,
        context_lens: Tensor,
    ) -> Tensor:
        """token_ids [T] int64 -> the final norm's output [N, H] of the rows wanted [N] int64, which rise.

        cos, sin [max_position, D / 2] fp32, positions and slots [T] int64, kv [L, 2, P, B, Hk, D] (written at
        the slots), block_table [S, max_pages], cu_seqlens [S + 1] and context_lens [S] int32 as for
        `ops.paged_attention`.
        """
        out = torch.empty((len(wanted), self._sizes[0]), dtype=self._dtype)
        arrays = (out, token_ids, wanted, cos, sin, positions, slots, block_table, cu_seqlens, context_lens)
        sizes = self._check(arrays, kv)
        weights = self._pointers(kv)
        if lib().decoder(*self._addresses(weights, arrays, sizes)):
            raise self._refusal(arrays, kv)
        return out

    def decode(
        self,
        weight: Tensor,
        settings: Settings,
        token_ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv: Tensor,
        block_table: Tensor,
        stops: Sequence[Collection[int]],
        steps: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Up to `steps` tokens for each of N sequences that lack the KV of one token each, drawn from the
        logits of `weight` [V, H].

        The same as so many calls of this decoder and of `ops.linear_sample`. token_ids [N] int64 are the
        tokens to compute; `settings` are those of `ops.sample`, whose `position`, the index of the token to
        draw, says what came before. block_table [N, max_pages] reaches as far as the steps. Ends after a step
        in which some sequence drew one of its `stops`.

        Returns tokens [k, N] int64, log-probs and entropies [k, N] fp32, the sizes of the supports [k, N]
        int64 (0: all tokens) and their ids, one after the other, int32.
        """
        op = "PagedDecoder.decode"
        N, H = len(token_ids), self._sizes[0]
        check(op, "cpu", weight=(weight, (len(self._embedding), H), self._dtype))
        weight = weight.contiguous()
        *how, next_position = check_settings(op, settings, N, "cpu")
        next_position = next_position.clone()  # these four are moved on in place, step by step
        token_ids = token_ids.clone()
        positions = next_position - 1
        context_lens = next_position.to(torch.int32)
        slots = torch.zeros_like(positions)
        hidden = torch.empty((N, H), dtype=self._dtype)
        rows = torch.arange(N)
        cu_seqlens = torch.arange(N + 1, dtype=torch.int32)
        of_step = (positions, slots, block_table, cu_seqlens, context_lens)
        arrays = (hidden, token_ids, rows, cos, sin, *of_step)
        sizes = self._check(arrays, kv)
        weights = self._pointers(kv)
        stop_ids = torch.tensor([token for row in stops for token in row], dtype=torch.int64)
        stop_ends = torch.tensor([0, *accumulate(map(len, stops))])
        token, counts, stash = (torch.zeros((steps, N), dtype=torch.int64) for _ in range(3))
        logprob, entropy = (torch.empty((steps, N), dtype=torch.float32) for _ in range(2))
        outputs = (token, logprob, entropy, counts, stash)
        loop = pointers(weight, *how, next_position, *outputs, stop_ids, stop_ends)
        k = lib().decode(*self._addresses(weights, arrays, sizes), *loop, steps)
        if k < 0:
            raise self._refusal(arrays, kv)
        support_ids = take_supports(counts[:k], stash[:k])
        return token[:k], logprob[:k], entropy[:k], counts[:k], support_ids

    def _check(self, arrays: tuple[Tensor, ...], kv: Tensor) -> Tensor:
        """The sizes of a call, of the tensors that it takes."""
        _, token_ids, wanted, cos, sin, positions, slots, block_table, cu_seqlens, context_lens = arrays
        op = "PagedDecoder"
        H, I, Hq, Hk, D = self._sizes
        T, N, S, L = len(token_ids), len(wanted), len(context_lens), self._n_layers
        P, B = kv.shape[2:4]
        contracts: dict[str, Any] = {
            "positions": (positions, (T,), torch.int64),
            "slots": (slots, (T,), torch.int64),
            "cos": (cos, (None, D // 2), torch.float32),
            "sin": (sin, (len(cos), D // 2), torch.float32),
            "block_table": (block_table, (S, None), torch.int32),
            "cu_seqlens": (cu_seqlens, (S + 1,), torch.int32),
            "context_lens": (context_lens, (S,), torch.int32),
            "kv": (kv, (L, 2, P, B, Hk, D), self._dtype),
            "token_ids": (token_ids, (T,), torch.int64),
            "wanted": (wanted, (N,), torch.int64),
        }
        check(op, "cpu", **contracts)
        for name, (tensor, _, _) in contracts.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{op}: {name} must be contiguous")
        if B % 16:
            raise ValueError(f"{op}: the page size is {B}, accepted is a multiple of 16")
        V, max_pages = len(self._embedding), block_table.shape[1]
        return torch.tensor((V, L, T, N, S, H, I, Hq, Hk, D, B, max_pages, P, len(cos)))

    def _addresses(self, weights: Tensor, arrays: tuple[Tensor, ...], sizes: Tensor) -> list[int | float]:
        tensors = pointers(weights, self._embedding, self._final_norm, *arrays, sizes)
        return [*tensors, self._eps, self._scale, DTYPES[self._dtype]]

    def _refusal(self, arrays: tuple[Tensor, ...], kv: Tensor) -> ValueError:
        P, B = kv.shape[2:4]
        limits = f"token ids reach to {len(self._embedding) - 1}, positions to {len(arrays[3]) - 1}"
        limits += f", slots to {P * B - 1}, pages to {P - 1}, wanted rows rise to {len(arrays[1]) - 1}"
        return ValueError(f"PagedDecoder: {limits}; one is not in its range")

    def _pointers(self, kv: Tensor) -> Tensor:
        """[L, 20] int64, taken anew for each call: a parameter's storage may have been replaced."""
        per_layer = len(self._weights) // self._n_layers
        weights = [0 if w is None else w.data_ptr() for w in self._weights]
        start, step = kv.data_ptr(), kv[0, 0].nbytes
        rows = []
        for layer in range(self._n_layers):
            pages = start + 2 * layer * step
            rows += [*weights[layer * per_layer : (layer + 1) * per_layer], pages, pages + step]
        return torch.tensor(rows)
