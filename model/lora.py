"""LoRA (Hu et al. 2021, arXiv 2106.09685): a low-rank addition to frozen linears. Its files are in `peft.py`.

    y = W x + b + (alpha / r) B A x        A [r, in], B [out, r]

for the tokens that go through an adapter. A forward may send each token through another adapter or through
none: a token in none has the bits of the base model, and a token's bits do not depend on where its neighbours
go.

Shapes: T tokens, K in, O out, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from duologue.kernels import fused, ops
from duologue.model.decoder import Decoder, Linear, empty_decoder
from duologue.model.settings import setting
from torch import Tensor, nn

T = TypeVar("T")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """`base` is the folder of the weights that the adapter belongs to. rslora scales by alpha / sqrt(r)
    (arXiv 2312.03732).
    """

    rank: int
    alpha: float = setting(32.0, "the adapter's part is scaled by alpha / rank", least=1e-6)
    targets: tuple[str, ...] = setting(TARGETS, "the linears that have a part", one_of=TARGETS)
    dropout: float = setting(
        0.0, "in updates only, so the ratio to the rollout's log-probs carries its noise", least=0, most=0.99
    )
    base: str = ""
    rslora: bool = False
    rank_pattern: dict[str, int] = field(
        default_factory=dict, hash=False
    )  # of linears that a pattern matches
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)
    # The object of the adapter_config.json that this came from: what is said there beyond the above is kept.
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def rank_of(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What the part of the linear `name` is multiplied by."""
        rank = self.rank_of(name)
        return _by_pattern(self.alpha_pattern, name, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: dict[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches the end of the linear's name, as in peft."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", f"model.{name}"):
            return value
    return default


class Adapter(nn.Module):
    """`pairs[name]` is (A, B) of the linear `name`, as in "layers.0.self_attn.q_proj"."""

    def __init__(self, settings: LoraSettings, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.settings = settings
        self.scales = {name: settings.scale_of(name) for name in pairs}
        self.pairs = {name: (nn.Parameter(a), nn.Parameter(b)) for name, (a, b) in pairs.items()}
        for name, (a, b) in self.pairs.items():  # a parameter's name has no dots
            self.register_parameter(f"{name.replace('.', '_')}_A", a)
            self.register_parameter(f"{name.replace('.', '_')}_B", b)

    @torch.no_grad()
    def write_over(self, other: Adapter) -> None:
        """Take the other's values, in place."""
        assert self.settings == other.settings, "the two have other shapes or scales"
        for mine, new in zip(self.parameters(), other.parameters(), strict=True):
            mine.copy_(new)

    @property
    def changes_nothing(self) -> bool:
        return not any(bool(b.detach().any()) for _, b in self.pairs.values())


class AdapterRows:
    """Which tokens of a forward go through which adapter: rows [n] int64 of each, None for all. No token is
    in two.

    `dropout_seed` given, the adapters' dropout falls on what enters A; the masks follow from the seed and the
    order of the linears.
    """

    def __init__(
        self, parts: Sequence[tuple[Adapter, Tensor | None]], dropout_seed: int | None = None
    ) -> None:
        self.parts = parts
        self._seed = dropout_seed
        self._generator: torch.Generator | None = None

    def add(self, name: str, x_TK: Tensor, out_TO: Tensor) -> Tensor:
        """What the linear `name` makes of x is `out`; the adapters' part is added to it in place."""
        for adapter, rows in self.parts:
            if name not in adapter.pairs:
                continue
            a, b = adapter.pairs[name]
            if rows is None and self._in_one_launch(x_TK, out_TO):
                fused.add_scaled(ops.linear(x_TK, a), b, adapter.scales[name], out_TO)
                continue
            x = self._drop(x_TK if rows is None else x_TK.index_select(0, rows), adapter.settings.dropout)
            delta = ops.linear(ops.linear(x, a), b) * adapter.scales[name]
            out_TO = out_TO.add_(delta) if rows is None else out_TO.index_add_(0, rows, delta)
        return out_TO

    def add_each(self, names: Sequence[str], x_TK: Tensor, outs: Sequence[Tensor]) -> Sequence[Tensor]:
        """`add` of three linears of one x; where one adapter has all rows and all three, with one launch for
        their A.
        """
        pairs = [adapter.pairs.get(name) for adapter, _ in self.parts for name in names]
        known = [pair for pair in pairs if pair is not None]
        whole = len(self.parts) == 1 and self.parts[0][1] is None and len(known) == 3
        if not whole or not all(self._in_one_launch(x_TK, out) for out in outs):
            return [self.add(name, x_TK, out) for name, out in zip(names, outs, strict=True)]
        lows = fused.linears(x_TK, [a for a, _ in known], [None] * 3)
        scales = self.parts[0][0].scales
        of_each = zip(names, lows, known, outs, strict=True)
        return [fused.add_scaled(low, b, scales[name], out) for name, low, (_, b), out in of_each]

    def _in_one_launch(self, x: Tensor, out: Tensor) -> bool:
        """Whether what is added to `out` is a product, its scale and the sum in one, to the same bits."""
        return self._seed is None and fused.serves(x) and x.element_size() == 2 and out.is_contiguous()

    def changes(self, name: str) -> bool:
        return any(name in adapter.pairs for adapter, _ in self.parts)

    @property
    def drawn(self) -> Tensor | None:
        return None if self._generator is None else self._generator.get_state()

    @drawn.setter
    def drawn(self, state: Tensor | None) -> None:
        if state is None or self._generator is None:
            self._generator = None
        else:
            self._generator.set_state(state)

    def _drop(self, x: Tensor, share: float) -> Tensor:
        if self._seed is None or not share:
            return x
        if self._generator is None:
            self._generator = torch.Generator(x.device).manual_seed(self._seed)
        kept = torch.rand(x.shape, generator=self._generator, device=x.device) >= share
        return x * kept / (1 - share)


class LoraDecoder(Decoder):
    """A frozen decoder and an adapter on it, which alone is trained. The modules are the decoder's own:
    nothing is copied.
    """

    def __init__(self, base: Decoder, adapter: Adapter) -> None:
        nn.Module.__init__(self)
        self.config, self.scale, self._tables = base.config, base.scale, base._tables
        self.model, self.lm_head = base.model, base.lm_head
        self.adapter, self.packed = adapter, base.packed
        self.__dict__["base"] = base.requires_grad_(
            False
        )  # past nn.Module, which would list its parameters twice

    @property
    def adapter_off(self) -> Decoder:
        """The base model: same tensors, no adapter."""
        base: Decoder = self.__dict__["base"]
        return base

    def use_exact(self, exact: bool) -> None:
        super().use_exact(exact)
        self.adapter_off.exact = exact

    def rows(self, dropout_seed: int | None = None) -> AdapterRows:
        return AdapterRows([(self.adapter, None)], dropout_seed)


def new_adapter(model: Decoder, settings: LoraSettings, seed: int) -> Adapter:
    """A is uniform in +-1 / sqrt(in) and B is 0, as in peft: at first the adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, weight in linears(model).items():
        if name.rpartition(".")[2] in settings.targets:
            a = (2 * torch.rand(settings.rank, weight.shape[1], generator=generator) - 1) / math.sqrt(
                weight.shape[1]
            )
            pairs[name] = (a.to(weight), weight.new_zeros(weight.shape[0], settings.rank))
    return Adapter(settings, pairs)


def linears(model: Decoder) -> dict[str, Tensor]:
    """The weights that an adapter can have a part of, by their names in the body."""
    return {
        name: module.weight.detach()
        for name, module in model.model.named_modules()
        if isinstance(module, Linear)
    }


@torch.no_grad()
def merged(model: LoraDecoder) -> Decoder:
    """A decoder with the adapter in its weights, W + scale B A in fp32; weights without an adapter are
    shared.
    """
    out = empty_decoder(model.config)
    for name, weight in model.adapter_off.named_parameters():
        owner, _, leaf = name.rpartition(".")
        linear = owner.removeprefix("model.")
        value = weight.detach()
        if leaf == "weight" and linear in model.adapter.pairs:
            a, b = model.adapter.pairs[linear]
            delta = model.adapter.scales[linear] * (b.float() @ a.float())
            value = (weight.float() + delta).to(weight.dtype)
        setattr(out.get_submodule(owner), leaf, nn.Parameter(value))
    return out
