"""What bench/gpu_suite.py measures: kernels of one transformer's shapes beside torch, torch.compile, Liger
and TRL where installed.

A `Work` is one line of the table: its sides (provider -> call), and the bytes and FLOP that the work needs at
least, from which the suite takes the share of the roofline. Sides are made when asked for, so that only one
work's tensors are alive at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from duologue.grpo.loss import LossConfig, Normaliser, policy_loss
from duologue.kernels import ops, reference
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A transformer's sizes, and how much of it is measured."""

    name: str
    rows: int  # N of the head and the row-wise kernels
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    batches: tuple[int, ...]  # of decode


COMMON: dict[str, Any] = {
    "rows": 16_384,
    "kv_heads": 8,
    "head_dim": 128,
    "vocab": 151_936,
    "context": 1024,
    "batches": (64, 256),
}
SHAPES = (
    Shape(name="8B", hidden=4096, inner=12_288, heads=32, **COMMON),
    Shape(name="0.6B", hidden=1024, inner=3072, heads=16, **COMMON),
)
DRY = (
    Shape(
        name="dry",
        rows=24,
        hidden=32,
        inner=48,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=301,
        context=40,
        batches=(3,),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Work:
    op: str
    shape: str
    sides: dict[str, Callable[[], Any]]
    flops: float = 0.0
    bytes_: float = 0.0
    error: Callable[[Any], float] | None = None  # of a side's result, relative, against float64
    missing: tuple[str, ...] = ()  # peers that are not installed


def _peer(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def works(shape: Shape, device: str, dtype: torch.dtype, compiled: bool) -> Iterator[Callable[[], Work]]:
    """All of them, not yet made."""
    make = Maker(shape, device, dtype, compiled)
    yield make.head
    for M in (1, 16, 64, 256, shape.rows // 4):
        yield lambda M=M: make.linear(M)
    yield from (
        make.add_rms_norm,
        make.silu_mul,
        make.rope,
        make.logprob,
        make.sample,
        make.sparse,
        make.advantages,
        make.training,
    )
    for S in shape.batches:
        yield lambda S=S: make.decode(S)
        yield lambda S=S: make.decode(S, shared=True)


class Maker:
    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, compiled: bool) -> None:
        self.shape, self.device, self.dtype, self.compiled = shape, device, dtype, compiled
        self.generator = torch.Generator(device).manual_seed(0)
        self.size = torch.empty(0, dtype=dtype).element_size()

    def randn(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*sizes, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def compile(self, fn: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        return {"torch.compile": torch.compile(fn)} if self.compiled else {}

    # ---- the head ------------------------------------------------------------------------------------------

    def head(self) -> Work:
        """Forward and backward of a clipped policy loss, from hidden states to the gradients of these and of
        the weight."""
        s, N = self.shape, self.shape.rows
        hidden = self.randn(N, s.hidden).requires_grad_()
        weight = (self.randn(s.vocab, s.hidden) * s.hidden**-0.5).requires_grad_()
        targets = torch.randint(0, s.vocab, (N,), device=self.device, generator=self.generator)
        advantage = self.randn(N, dtype=torch.float32)
        total = Normaliser(tokens=float(N), rows=1.0)
        segments = torch.zeros(N, dtype=torch.int64, device=self.device)

        def loss(logp: Tensor, entropy: Tensor, rows: Any = slice(None)) -> Tensor:
            weights = (advantage[rows], segments[rows], 1, total)
            return policy_loss(LossConfig(), logp, logp.detach() + 0.01, *weights, entropy=entropy)[0]

        def run(logprob: Callable[[], Tensor]) -> Tensor:
            hidden.grad = weight.grad = None
            logp = logprob()
            loss(logp, logp).backward()
            return logp.detach()

        def ours(exact: bool) -> Tensor:
            hidden.grad = weight.grad = None
            result = ops.linear_policy_loss(hidden, weight, targets, loss, exact=exact)
            result.loss.backward()
            return result.logprob

        def plain(hidden: Tensor, weight: Tensor) -> Tensor:
            return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

        def fused() -> Tensor:
            return ops.linear_logprob(hidden, weight, targets, exact=False)[0]

        sides: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours(False),
            "ours exact": lambda: ours(True),
            "ours linear_logprob": lambda: run(fused),
            "torch": lambda: run(lambda: plain(hidden, weight)),
            **{k: lambda f=f: run(lambda: f(hidden, weight)) for k, f in self.compile(plain).items()},
        }
        missing = []
        if _peer("trl"):
            from trl.kernels import ChunkedLogProbFunction

            def chunked() -> Tensor:
                settings = (None, targets, 1.0, 32_768, None, 1.0, ())
                return ChunkedLogProbFunction.apply(hidden, weight, *settings)[0]

            sides["trl chunked"] = lambda: run(chunked)
        else:
            missing.append("trl")
        if _peer("liger_kernel") and self.device != "cpu":
            sides |= self._liger_head(hidden, weight, targets, advantage, run)
        else:
            missing.append("liger-kernel")
        some = torch.arange(0, N, max(1, N // 64), device=self.device)
        logits = hidden.detach()[some].double() @ weight.detach().double().t()
        exact = logits.log_softmax(-1).gather(1, targets[some, None])[:, 0]
        return Work(
            op="head forward and backward",
            shape=f"N={N} H={s.hidden} V={s.vocab}",
            sides=sides,
            flops=6.0 * N * s.hidden * s.vocab,
            bytes_=self.size * (2.0 * N * s.hidden + 3 * s.vocab * s.hidden),
            error=lambda logp: float((logp[some].double() - exact).abs().max()),
            missing=tuple(missing),
        )

    def _liger_head(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, advantage: Tensor, run: Any
    ) -> dict[str, Any]:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction,
        )
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        S = max(1, len(hidden) // 1024)
        L = len(hidden) // S
        fused = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
        ids = targets.view(S, L)
        mask = torch.ones(S, L, device=self.device)
        of_sequence = advantage.view(S, L)[:, 0]

        def flsce() -> Tensor:
            loss = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
            return -(loss[0] if isinstance(loss, tuple) else loss)

        def grpo() -> None:
            hidden.grad = weight.grad = None
            fused(hidden.view(S, L, -1), weight, ids, mask, of_sequence)[0].backward()

        def triton_grpo() -> None:
            hidden.grad = weight.grad = None
            logits = torch.nn.functional.pad((hidden @ weight.t()).view(S, L, -1), (0, 0, 0, 1))
            loss = triton_grpo_loss(logits, None, None, ids, of_sequence, temperature=1.0, beta=0.0)[0]
            loss.sum().backward()

        return {
            "liger FLSCE": lambda: run(flsce),
            "liger fused linear GRPO": grpo,
            "liger Triton GRPO": triton_grpo,
        }

    # ---- row-wise and linear -------------------------------------------------------------------------------

    def linear(self, M: int) -> Work:
        s = self.shape
        x, weight = self.randn(M, s.hidden), self.randn(s.inner, s.hidden)
        exact = (x.double() @ weight.double().t()) if M <= 64 else None
        return Work(
            op="linear",
            shape=f"M={M} K={s.hidden} O={s.inner}",
            sides={
                "ours": lambda: ops.linear(x, weight),
                "torch": lambda: torch.nn.functional.linear(x, weight),
            },
            flops=2.0 * M * s.hidden * s.inner,
            bytes_=self.size * float(M * s.hidden + s.inner * s.hidden + M * s.inner),
            error=None if exact is None else lambda out: float((out.double() - exact).norm() / exact.norm()),
        )

    def _rows(self, op: str, args: tuple[Any, ...], moved: float, shape: str) -> Work:
        ours, plain = getattr(ops, op), getattr(reference, op)
        compiled = {k: lambda f=f: f(*args) for k, f in self.compile(plain).items()}
        return Work(
            op=op,
            shape=shape,
            sides={"ours": lambda: ours(*args), "torch": lambda: plain(*args), **compiled},
            bytes_=moved,
        )

    def add_rms_norm(self) -> Work:
        s, N = self.shape, self.shape.rows
        args = (self.randn(N, s.hidden), self.randn(N, s.hidden), self.randn(s.hidden), 1e-6)
        return self._rows("add_rms_norm", args, 4.0 * self.size * N * s.hidden, f"N={N} K={s.hidden}")

    def silu_mul(self) -> Work:
        s, N = self.shape, self.shape.rows
        args = (self.randn(N, s.inner), self.randn(N, s.inner))
        return self._rows("silu_mul", args, 3.0 * self.size * N * s.inner, f"N={N} I={s.inner}")

    def rope(self) -> Work:
        s, N = self.shape, self.shape.rows
        angles = torch.rand(2 * s.context, s.head_dim // 2, device=self.device, generator=self.generator)
        positions = torch.arange(N, device=self.device) % s.context
        q, k = (self.randn(N, heads, s.head_dim) for heads in (s.heads, s.kv_heads))
        args = (q, k, angles.cos(), angles.sin(), positions)
        moved = 2.0 * self.size * N * (s.heads + s.kv_heads) * s.head_dim
        return self._rows("rope", args, moved, f"N={N} heads={s.heads}+{s.kv_heads}")

    def logprob(self) -> Work:
        s, N = self.shape, max(1, self.shape.rows // 16)
        logits = self.randn(N, s.vocab, dtype=torch.float32)
        targets = torch.arange(N, device=self.device) % s.vocab
        return self._rows("logprob", (logits, targets, 0.9), 4.0 * N * s.vocab, f"N={N} V={s.vocab}")

    def sample(self) -> Work:
        s, N = self.shape, max(self.shape.batches)
        ones, ids = torch.ones(N, device=self.device), torch.arange(N, device=self.device)
        args = (self.randn(N, s.vocab, dtype=torch.float32), ones, (0 * ids).int(), ones, 0 * ones, ids, ids)
        return Work(
            op="sample",
            shape=f"N={N} V={s.vocab}",
            bytes_=4.0 * N * s.vocab,
            sides={
                "ours": lambda: ops.sample(*args),
                "torch": lambda: torch.multinomial(args[0].softmax(-1), 1),
            },
        )

    def sparse(self) -> Work:
        """Supports of 8 ids, forward and backward."""
        s, N, kept = self.shape, self.shape.rows, 8
        hidden = self.randn(N, s.hidden).requires_grad_()
        weight = self.randn(s.vocab, s.hidden).requires_grad_()
        starts = torch.randint(0, s.vocab - kept, (N, 1), device=self.device, generator=self.generator)
        ids = (starts + torch.arange(kept, device=self.device)).int()
        offsets, targets = torch.arange(N + 1, device=self.device) * kept, ids[:, 3].long()

        def ours() -> None:
            hidden.grad = weight.grad = None
            ops.sparse_linear_logprob(hidden, weight, targets, ids.flatten(), offsets)[0].sum().backward()

        def plain() -> None:
            hidden.grad = weight.grad = None
            logits = (weight[ids.long()] * hidden[:, None]).sum(-1, dtype=torch.float32)
            logits.log_softmax(-1)[:, 3].sum().backward()

        return Work(
            op="sparse_linear_logprob",
            shape=f"N={N} kept={kept} H={s.hidden}",
            sides={"ours": ours, "torch": plain},
            bytes_=self.size * (3.0 * N * s.hidden + 2 * N * kept * s.hidden + s.vocab * s.hidden),
        )

    def advantages(self) -> Work:
        N, groups = self.shape.rows, max(1, self.shape.rows // 8)
        rewards, ids = self.randn(N, dtype=torch.float32), torch.arange(N, device=self.device) // 8
        scored = torch.ones(N, dtype=torch.bool, device=self.device)

        def plain() -> Tensor:
            total = torch.zeros(groups, device=self.device).index_add_(0, ids, rewards)
            centred = rewards - (total / 8)[ids]
            variance = torch.zeros(groups, device=self.device).index_add_(0, ids, centred**2) / 7
            return centred / (variance.sqrt()[ids] + 1e-4)

        return Work(
            op="group_advantages",
            shape=f"N={N} G=8",
            bytes_=4.0 * 2 * N + 8.0 * N,
            sides={
                "ours": lambda: ops.group_advantages(rewards, ids, scored, method="std", n_groups=groups),
                "torch": plain,
            },
        )

    # ---- attention -----------------------------------------------------------------------------------------

    def training(self) -> Work:
        """Causal attention on packed rows, forward and backward."""
        s = self.shape
        S, L = max(1, s.rows // s.context), s.context
        q, k, v = (
            self.randn(S * L, h, s.head_dim).requires_grad_() for h in (s.heads, s.kv_heads, s.kv_heads)
        )
        cu, scale = (torch.arange(S + 1, device=self.device) * L).int(), s.head_dim**-0.5

        def run(fn: Callable[[], Tensor]) -> None:
            q.grad = k.grad = v.grad = None
            fn().sum().backward()

        def torch_sdpa() -> Tensor:
            split = (x.view(S, L, -1, s.head_dim).transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(
                *split, is_causal=True, scale=scale, enable_gqa=True
            )

        sides = {
            "ours exact": lambda: run(lambda: ops.packed_attention(q, k, v, cu, scale)),
            "ours": lambda: run(lambda: ops.packed_attention(q, k, v, cu, scale, exact=False, max_seqlen=L)),
            "torch": lambda: run(torch_sdpa),
        }
        return Work(
            op="attention forward and backward",
            shape=f"S={S} L={L} heads={s.heads}/{s.kv_heads}",
            sides=sides,
            flops=7.0 * S * L * (L + 1) * s.heads * s.head_dim,
        )

    def decode(self, S: int, shared: bool = False) -> Work:
        """One query for each of S sequences; with `shared`, groups of 8 that have half of their pages in
        common."""
        s, page = self.shape, 16
        count = -(-s.context // page)
        pages = self.randn(2, S * count, page, s.kv_heads, s.head_dim)
        table = torch.randperm(S * count, device=self.device, generator=self.generator).view(S, count).int()
        if shared:
            for row in range(S):
                table[row, : count // 2] = table[row // 8 * 8, : count // 2]
        q, cu = self.randn(S, s.heads, s.head_dim), torch.arange(S + 1, device=self.device).int()
        lengths = torch.full((S,), s.context, dtype=torch.int32, device=self.device)
        scale = s.head_dim**-0.5
        slots = table[:, :, None] * page + torch.arange(page, device=self.device)
        whole = slots.flatten(1)[:, : s.context].long()

        def plain() -> Tensor:
            keys, values = (x.flatten(0, 1)[whole].transpose(1, 2) for x in pages)
            return torch.nn.functional.scaled_dot_product_attention(
                q[:, :, None], keys, values, scale=scale, enable_gqa=True
            )

        n_keys = (S * s.context + -(-S // 8) * s.context) // 2 if shared else S * s.context
        return Work(
            op="paged_attention decode" + (", shared halves" if shared else ""),
            shape=f"S={S} context={s.context}",
            sides={
                "ours": lambda: ops.paged_attention(q, pages[0], pages[1], table, cu, lengths, scale),
                "torch gather": plain,
            },
            bytes_=2.0 * self.size * n_keys * s.kv_heads * s.head_dim,
        )
