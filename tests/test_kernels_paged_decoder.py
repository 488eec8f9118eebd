"""All layers in one call: the bits of the single ops, whatever the rows, the split between threads and the
dtype."""

from __future__ import annotations

import pytest
import torch
from duologue.kernels import backend
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder
from duologue.rollout.engine.runner import PagedAttention
from torch import Tensor

pytestmark = pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")

FAMILIES = {
    "qwen3": {},
    "llama": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True},
}
LENGTHS = {  # (new tokens, tokens before them) of each sequence of a step
    "decode-1": [(1, 40)],
    "decode-7": [(1, 16 * i + 3) for i in range(7)],
    "decode-129": [(1, i % 37) for i in range(129)],
    "prefill": [(127, 0), (1, 5), (70, 33)],
    "mixed": [(1, 64), (200, 16), (1, 1), (31, 0), (1, 90)],
}


def decoder(family: str, dtype: torch.dtype) -> Decoder:
    config = ModelConfig(
        model_type=family,
        vocab_size=97,
        hidden_size=48,
        intermediate_size=100,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=20,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **FAMILIES[family],
    )
    model = Decoder(config)
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return model.to(dtype)


def step(model: Decoder, lengths: list[tuple[int, int]]) -> tuple[Tensor, Tensor, PagedAttention]:
    """Tokens, positions and paged context of a step over random keys."""
    config, B = model.config, 16
    generator = torch.Generator().manual_seed(3)
    pages = [-(-(n + past) // B) for n, past in lengths]
    P = sum(pages) + 3
    order = torch.randperm(P, generator=generator)
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    for i, n in enumerate(pages):
        table[i, :n] = order[sum(pages[:i]) : sum(pages[: i + 1])]
    positions = torch.cat([torch.arange(past, past + n) for n, past in lengths])
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor([n for n, _ in lengths]))
    kv = torch.randn(config.num_layers, 2, P, B, config.num_kv_heads, config.head_dim, generator=generator)
    context = PagedAttention(
        kv=kv.to(model.head_weight.dtype),
        slots=table[row, positions // B].long() * B + positions % B,
        block_table=table,
        cu_seqlens=torch.tensor([0, *(n for n, _ in lengths)]).cumsum(0).int(),
        context_lens=torch.tensor([n + past for n, past in lengths]).int(),
        scale=model.scale,
    )
    return torch.randint(0, config.vocab_size, (len(row),), generator=generator), positions, context


def run(
    model: Decoder, ids: Tensor, positions: Tensor, at: PagedAttention, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    kv, layers = at.kv.clone(), model.paged_layers()
    assert layers is not None
    out = layers(
        ids,
        wanted,
        *model.rotary_tables(positions),
        positions,
        kv,
        at.slots,
        at.block_table,
        at.cu_seqlens,
        at.context_lens,
    )
    return out, kv


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512-nobf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_same_bits_as_the_single_ops(family: str, dtype: torch.dtype, isa: str) -> None:
    if not backend.lib().use(isa):
        pytest.skip(f"this machine cannot run {isa}")
    try:
        model = decoder(family, dtype)
        for name, lengths in LENGTHS.items():
            ids, positions, context = step(model, lengths)
            wanted = torch.arange(0, len(ids), 3 if "mixed" in name else 1)
            out, kv = run(model, ids, positions, context, wanted)
            with torch.no_grad():
                expected = model.hidden(ids, positions, context)
            assert torch.equal(out, expected[wanted]), name
            assert torch.equal(kv, context.kv), f"{name}: the keys in the pages"
    finally:
        backend.use("")


@pytest.mark.parametrize("threads", [1, 3])
def test_same_bits_on_any_number_of_threads(threads: int) -> None:
    model = decoder("qwen3", torch.float32)
    ids, positions, context = step(model, LENGTHS["mixed"])
    wanted, before = torch.arange(len(ids)), backend.lib().threads()
    expected = run(model, ids, positions, context, wanted)
    try:
        backend.lib().set_threads(threads)
        assert all(map(torch.equal, run(model, ids, positions, context, wanted), expected))
    finally:
        backend.lib().set_threads(before)


def test_out_of_range_is_refused() -> None:
    model = decoder("qwen3", torch.float32)
    far = [(name, 10**6) for name in ("ids", "positions", "slots", "block_table", "wanted")]
    for field, bad in [*far, ("ids", -1), ("slots", -1), ("block_table", -1)]:
        ids, positions, context = step(model, LENGTHS["mixed"])
        wanted = torch.arange(len(ids))
        target = {"ids": ids, "positions": positions, "wanted": wanted}.get(field)
        target = getattr(context, field) if target is None else target
        if field == "positions":
            model.rotary_tables(torch.tensor([511]))
        target.view(-1)[-1 if field == "wanted" else 0] = bad
        with pytest.raises(ValueError, match="one is not in its range"):
            run(model, ids, positions, context, wanted)


def test_what_lies_elsewhere_is_refused_by_name() -> None:
    model = decoder("qwen3", torch.float32)
    layer = model.model.layers[1].tensors()
    layers = [model.model.layers[0].tensors(), layer]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(48, 100).t())
    layers[1] = model.model.layers[1].tensors()
    from duologue.kernels.paged_decoder import PagedDecoder

    with pytest.raises(ValueError, match=r"layers\[1\].up must be contiguous"):
        PagedDecoder(model.head_weight, layers, model.model.norm.weight, 20, 1e-6, 1.0)
