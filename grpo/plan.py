"""What a run takes of a device's memory, by kind, before anything is loaded.

The sizes are counted on the decoder itself, on the meta device; what autograd keeps of a token is the list
of `ctx.save_for_backward` in kernels/. With more ranks than one, or fixed shares, the optimizer is that of
grpo/distributed/sharded.py: gradients, masters and moments in parts, weights whole.

Bytes, unless a name says otherwise. H hidden, I MLP, V vocabulary, A query heads, G key heads, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.blocks import block_of
from duologue.grpo.config import Config
from duologue.grpo.mix import START
from duologue.grpo.space import stored_bytes
from duologue.kernels import backend, cores
from duologue.kernels.head import CPU_BYTES, MIN_ROWS, gpu_bytes
from duologue.model.checkpoint import parse_dtype, read_config
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, empty_decoder
from duologue.model.hub import local
from duologue.model.lora import linears
from duologue.model.recompute import LAYER, NORMS, NOTHING
from duologue.rollout.engine.pages import CACHE_TOKENS
from torch import nn

GB = 10**9
GRAPHS = 2 * GB  # of a CUDA context, its libraries and captured graphs: an assumption, not measured
# In place of all weights.
ADAPTERS: tuple[dict[str, Any], ...] = ({"lora.rank": 16}, {"lora.rank": 16, "lora.quantize": "nf4"})
POOL_SHARE = 0.85  # of what is free, with rollout.cache_tokens = 0 (rollout/engine/runner.py)
NF4 = 0.5 + 4 / 64  # of a weight: four bits, and an fp32 scale for 64 of them
# family, hidden, intermediate, layers, query heads, key heads, head dim, vocabulary, tied or not
SHAPES = {
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 64, 49_152, True),
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, True),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151_936, True),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151_936, True),
    "Qwen3-8B": ("qwen3", 4096, 12_288, 36, 32, 8, 128, 151_936, False),
    "Qwen3-14B": ("qwen3", 5120, 17_408, 40, 40, 8, 128, 151_936, False),
    "Qwen3-32B": ("qwen3", 5120, 25_600, 64, 64, 8, 128, 151_936, False),
    "Llama-3.1-8B": ("llama", 4096, 14_336, 32, 32, 8, 128, 128_256, False),
}


def shape(name: str) -> ModelConfig:
    """Of a checkpoint's folder, a config.json or a well-known name."""
    if name in SHAPES:
        family, H, I, layers, A, G, D, V, tied = SHAPES[name]
        return ModelConfig(
            model_type=family,
            hidden_size=H,
            intermediate_size=I,
            num_layers=layers,
            num_heads=A,
            num_kv_heads=G,
            head_dim=D,
            vocab_size=V,
            tie_word_embeddings=tied,
            max_position_embeddings=32_768,
        )
    path = Path(name)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        known = ", ".join(SHAPES)
        raise ValueError(f"--model {name!r}: accepted is a folder with a config.json, or one of {known}")
    return read_config(folder)


def shape_of(config: Config) -> ModelConfig | None:
    """Of the model that a run starts from; None where its folder does not say (an adapter, or nothing)."""
    m = config.model
    if m.path:
        folder = local(m.path, weights=False)
        return read_config(folder) if (folder / "config.json").is_file() else None
    return ModelConfig(
        model_type="qwen3",
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.head_dim or m.hidden_size // m.num_heads,
        vocab_size=m.vocab_size,
        max_position_embeddings=m.max_position,
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of a rank by kind. `pool_tokens` is how many tokens the KV pool holds."""

    weights: int
    gradients: int  # fp32 sums, once they are all there
    masters: int
    moments: int
    activations: int  # of a micro-batch
    again: int  # of the layer that a backward computes a second time, which begins when the head is through
    head: int
    transit: int  # gradients that the backward has made, or that are sent, and nobody has added up
    pool: int
    frozen: int  # other weights, with their pools
    graphs: int
    copy: int  # of a checkpoint in host memory while it is written, where that is the device's
    pool_tokens: int
    released: bool  # whether the pool's memory is given back during an update
    parameters: int
    trained: int

    @property
    def sure(self) -> int:
        """What an update cannot do without."""
        return self.weights + self.gradients + self.masters + self.moments

    @property
    def update(self) -> int:
        """At the peak of an update: the head's, or that of the last layer's backward, or its end."""
        pool = 0 if self.released else self.pool
        backward = max(self.activations + max(self.head, self.again), self.transit)
        return self.sure + backward + pool + self.frozen + self.graphs + self.copy

    @property
    def rollout(self) -> int:
        state = self.weights + self.masters + self.moments
        return state + self.pool + self.frozen + self.graphs + self.copy

    @property
    def peak(self) -> int:
        return max(self.update, self.rollout)


def activation_bytes(
    shape: ModelConfig, *, nodes: int, tokens: int, itemsize: int, rank: int = 0, recompute: str = NOTHING
) -> int:
    """What a forward over `nodes` keeps for its backward, rows of `tokens` tokens in attention (as many
    where no prefix is shared). `rank` is an adapter's, 0 for none.
    """
    H, I = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    node = 2 * H + 2 * I  # two sums; gate and up
    node += 0 if recompute == NORMS else 2 * H + I  # two norms; the product of gate and up
    node += (q + kv) if shape.qk_norm else 0
    shared = tokens != nodes
    node += q if shared else 0  # attention's output, taken back from the rows
    node += 7 * rank
    row = 2 * q + 2 * kv  # query, output, key and value
    layer = itemsize * (nodes * node + tokens * row) + tokens * shape.num_heads * 8
    ends = itemsize * nodes * 2 * H  # the last sum and the last norm
    if recompute == LAYER:
        layer = itemsize * nodes * 2 * H
    return shape.num_layers * layer + ends


def head_bytes(
    shape: ModelConfig,
    *,
    rows: int,
    itemsize: int,
    trained: bool,
    device: str,
    memory: int,
    step: int = 0,
    fused: bool = False,
) -> int:
    """Of kernels/head.py over `rows` trained tokens on a device with `memory`; `step` rows at a time, 0 for
    its own choice. `fused`: the weight's gradient is never cast.
    """
    H, V = shape.hidden_size, shape.vocab_size
    native = device == "cpu" and backend.available()
    per_logit = 4 if native or (device != "cpu" and itemsize == 4) else 16 if device == "cpu" else 6
    budget = max(CPU_BYTES if device == "cpu" else gpu_bytes(memory), MIN_ROWS * V * per_logit)
    chunk = (step or max(1, min(rows, budget // (V * per_logit)))) * V * per_logit
    weight = V * H * 4 if trained else 0
    cast = V * H * itemsize if trained and itemsize < 4 and not fused else 0
    narrow = native and backend.multiplies_bf16(torch.empty(0, dtype=torch.bfloat16))
    wide = V * H * 4 if native and itemsize < 4 and not narrow else 0
    return chunk + weight + max(cast, 0) + wide + 2 * rows * H * itemsize


def make_plan(
    config: Config, shape: ModelConfig, *, ranks: int = 1, memory: int = 0, device: str | None = None
) -> Plan:
    """Of each of `ranks`; `memory` of the device says how large a pool is that takes what is free."""
    r, lora, t = config.rollout, config.lora, config.train
    device = device or config.model.device.partition(":")[0]
    model = empty_decoder(shape)
    itemsize = parse_dtype(config.model.dtype).itemsize
    parameters = sum(p.numel() for p in model.parameters())
    weights = parameters * itemsize
    trained, largest = parameters, max(p.numel() for p in model.parameters())
    if lora.rank:
        sizes = _adapter_sizes(model, config)
        trained, largest = sum(sizes), max(sizes)
        if lora.quantize:
            packed = sum(w.numel() for w in linears(model).values())
            weights -= int(packed * (itemsize - NF4))
        weights += trained * itemsize
    sharded = bool(t.shares) or (ranks > 1 and not lora.rank)  # otherwise an adapter is whole on every rank
    parts = ranks if sharded else 1
    tokens = t.tokens_per_microbatch
    kv = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * itemsize
    activations = activation_bytes(
        shape, nodes=tokens, tokens=tokens, itemsize=itemsize, rank=lora.rank, recompute=t.recompute
    )
    transit = _transit(config, largest, itemsize)
    if sharded and not lora.rank:
        transit = _sharded_transit(model, itemsize, ranks)
    of_head: dict[str, Any] = {"rows": tokens, "itemsize": itemsize, "device": device, "memory": memory}
    sums = 1 + (t.shares // ranks - 1).bit_length() if t.shares > ranks else 1
    plan = Plan(
        weights=weights,
        gradients=trained * 4 * sums // parts,
        masters=trained * 4 // parts if itemsize < 4 else 0,
        moments=0 if t.offload_moments else trained * 8 // parts,
        activations=activations,
        head=head_bytes(shape, **of_head, trained=not lora.rank, fused=t.gradient_accumulation_fusion),
        again=_again(config, shape, itemsize) if t.recompute == LAYER else 0,
        transit=transit,
        pool=r.cache_tokens * kv,
        frozen=_frozen(config, parameters * itemsize, kv),
        graphs=GRAPHS if device != "cpu" else 0,
        copy=stored_bytes(trained, itemsize) if device == "cpu" else 0,
        pool_tokens=r.cache_tokens,
        released=r.released,
        parameters=parameters,
        trained=trained,
    )
    return plan if r.cache_tokens else _with_pool(plan, kv, r.page_size, memory, device)


def _adapter_sizes(model: Decoder, config: Config) -> list[int]:
    """Parameters of the adapter, linear by linear."""
    own = [w for n, w in linears(model).items() if n.rpartition(".")[2] in config.lora.targets]
    return [config.lora.rank * sum(w.shape) for w in own]


def _with_pool(plan: Plan, kv: int, page_size: int, memory: int, device: str) -> Plan:
    """A KV pool that takes what is free."""
    free = int(POOL_SHARE * max(memory - plan.rollout, 0))
    most = free // kv // page_size * page_size if device != "cpu" else CACHE_TOKENS
    return dataclasses.replace(plan, pool=most * kv, pool_tokens=most)


def _again(config: Config, shape: ModelConfig, itemsize: int) -> int:
    """Of the last layer, computed a second time, with the gradients of its MLP's inside; and the gradient of
    a tied head, which waits for the embedding's.
    """
    tokens, one = config.train.tokens_per_microbatch, dataclasses.replace(shape, num_layers=1)
    rank = config.lora.rank
    layer = activation_bytes(one, nodes=tokens, tokens=tokens, itemsize=itemsize, rank=rank)
    waits = shape.tie_word_embeddings and not rank and not config.train.gradient_accumulation_fusion
    head = shape.vocab_size * shape.hidden_size if waits else 0
    return layer + (3 * tokens * shape.intermediate_size + head) * itemsize


def _transit(config: Config, largest: int, itemsize: int) -> int:
    """Of a gradient that autograd makes and of its sum in fp32; of none where these are put where they are
    added up.
    """
    return 0 if config.train.gradient_accumulation_fusion else largest * (itemsize + 4)


def _sharded_transit(model: nn.Module, itemsize: int, ranks: int) -> int:
    """Of the largest two blocks that follow each other in a backward: both in fp32, and with other ranks what
    comes from these beside it; and the gradient that was made last.
    """
    blocks: dict[str, int] = {}
    for name, p in reversed([*model.named_parameters()]):
        key = block_of(name, p)
        blocks[key] = blocks.get(key, 0) + p.numel()
    sizes = [0, *blocks.values()]
    copies = 2 if ranks > 1 else 1
    largest = max(p.numel() for p in model.parameters())
    return max(a + b for a, b in pairwise(sizes)) * 4 * copies + largest * itemsize


def _frozen(config: Config, weights: int, kv: int) -> int:
    """The reference of a KL, and weights of opponents and a judge: an adapter's base serves as its start."""
    o, adapters = config.opponent, config.lora.rank > 0
    pool = (config.rollout.cache_tokens or CACHE_TOKENS) * kv
    sets = o.held or o.sets(adapters)
    sets += config.judge.backend == "policy"
    reference = bool(config.grpo.kl_coef or config.train.kl_every) and not adapters
    shared = START in o.parts and bool(sets)
    return sets * (weights + pool) + (weights if reference and not shared else 0)


def advice(config: Config, shape: ModelConfig, ranks: int, memory: int, device: str) -> list[str]:
    """The settings of which each alone makes the run fit; otherwise all of them together, or what is left."""

    def fits(changed: Config, n: int = ranks) -> bool:
        return make_plan(changed, shape, ranks=n, memory=memory, device=device).peak <= memory

    found: list[str] = []
    all_of_them = config
    for words, changes in _changes(config, device):
        changed = _with(config, changes)
        all_of_them = _with(all_of_them, changes)
        name = words.partition("=")[0]
        if fits(changed) and not any(other.startswith(name) for other in found):  # the least change
            found.append(words)
    more = [n for n in (2, 4, 8, 16, 32, 64) if n > ranks and not config.lora.rank and fits(config, n)]
    found += [f"--ranks {more[0]}"] if more else []
    if found:
        return found
    names = ", ".join({words.partition("=")[0]: words for words, _ in _changes(config, device)}.values())
    if fits(all_of_them):
        return [f"all of {names}"]
    short = make_plan(all_of_them, shape, ranks=ranks, memory=memory, device=device).peak - memory
    with_all = [n for n in (2, 4, 8, 16, 32, 64) if n > ranks and fits(all_of_them, n)]
    ways = [f"{names} and --ranks {with_all[0]}"] if with_all and not config.lora.rank else []
    for adapter in () if config.lora.rank else ADAPTERS:
        words = " and ".join(f"{key}={value}" for key, value in adapter.items())
        if fits(_with(config, adapter)):
            return [*ways, words]
        if fits(_with(all_of_them, adapter)):
            return [*ways, f"{words} and {names}"]
    return ways or [f"a device with {short / GB:,.1f} GB more, {names} included"]


def _changes(config: Config, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings that take less, in words and as they are made."""
    if config.rollout.cache_tokens:
        yield "rollout.cache_tokens=0", {"rollout.cache_tokens": 0}
    if config.train.kl_every and not config.grpo.kl_coef and not config.lora.rank:
        yield "train.kl_every=0", {"train.kl_every": 0}
    for less in (NORMS, LAYER):
        if config.train.recompute not in (less, LAYER):
            yield f"train.recompute={less}", {"train.recompute": less}
    if not config.train.offload_moments and device != "cpu":
        yield "train.offload_moments=true", {"train.offload_moments": True}
    for tokens in (8192, 4096, 2048):
        if config.train.tokens_per_microbatch > tokens:
            yield f"train.tokens_per_microbatch={tokens}", {"train.tokens_per_microbatch": tokens}


def _with(config: Config, changes: dict[str, Any]) -> Config:
    for key, value in changes.items():
        section, name = key.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


# ---- before a run ------------------------------------------------------------------------------------------


def memory_limits(device: str) -> tuple[int, int]:
    """(bytes that a process can ever have, bytes that are free now) of a device; 0 where nobody says."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(torch.device(device))
        return total, free
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    total, free = sizes["MemTotal"] + sizes.get("SwapTotal", 0), sizes.get("MemAvailable", 0)
    most = cores.memory_limit()
    return int(min(total, most)), int(min(free, most))


def check_memory(config: Config, limits: tuple[int, int] | None = None, ranks: int = 1) -> str:
    """A note where a run of so many ranks may not fit, "" otherwise. MemoryError where what it surely needs
    is more than there is: weights, gradients, masters and moments.
    """
    own = shape_of(config)
    if own is None:
        return ""
    limit, free = limits or memory_limits(config.model.device)
    plan = make_plan(config, own, ranks=ranks, memory=limit)
    if limit and plan.sure > limit:
        raise MemoryError(
            f"the run needs {plan.sure / GB:.2f} GB on {config.model.device} at least (weights "
            f"{plan.weights / GB:.2f}, gradients {plan.gradients / GB:.2f}, masters {plan.masters / GB:.2f}, "
            f"moments {plan.moments / GB:.2f}), accepted is {limit / GB:.2f}: see duologue plan"
        )
    if free and plan.peak > free:
        return (
            f"the run may take {plan.peak / GB:.2f} GB on {config.model.device}, of which {free / GB:.2f} "
            "are free: see duologue plan"
        )
    return ""
