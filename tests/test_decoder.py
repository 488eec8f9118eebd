"""The decoder against transformers: logits, log-probs, gradients, rotary tables, parameter names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.model import decoder as decoder_module
from duologue.model.checkpoint import load_weights, read_config
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, Linear, PackedAttention, score
from duologue.model.rotary import rope_frequencies
from tiny import model_config

Get = Callable[[str], tuple[Path, Any]]
LINEAR = {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(read_config(folder))
    load_weights(model, folder, "cpu", dtype)
    return model


def rows(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 283, (B, T), generator=torch.Generator().manual_seed(seed))


def test_logits_equal_transformers(each_checkpoint: tuple[Path, Any]) -> None:
    folder, theirs = each_checkpoint
    ours = load(folder)
    token_ids = rows(2, 131)  # past the original context of the llama3 scaling
    with torch.no_grad():
        expected, actual = theirs(token_ids).logits, ours(token_ids)
    assert actual.dtype == torch.float32
    assert expected.std() > 0.5  # so that the tolerance means something
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_names_and_count_of_parameters_equal_transformers(each_checkpoint: tuple[Path, Any]) -> None:
    folder, theirs = each_checkpoint
    ours = load(folder)
    tied = ["lm_head.weight"] if ours.lm_head is None else []
    assert sorted([*ours.state_dict(), *tied]) == sorted(theirs.state_dict())
    assert theirs.num_parameters() == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("name", ["llama-mlp-bias", "qwen2-tied", "qwen3"])
def test_gradients_equal_transformers(name: str, checkpoint: Get) -> None:
    folder, theirs = checkpoint(name)
    ours = load(folder)
    sequences = [row.tolist() for row in rows(3, 17)]
    sum(s.sum() for s in score(ours, sequences)).backward()
    token_ids = torch.tensor(sequences)
    logprobs = theirs(token_ids[:, :-1]).logits.log_softmax(-1).gather(-1, token_ids[:, 1:, None])
    expected = torch.autograd.grad(logprobs.sum(), list(theirs.parameters()))
    for (parameter, _), gradient in zip(theirs.named_parameters(), expected, strict=True):
        actual = ours.get_parameter(parameter).grad
        torch.testing.assert_close(
            actual, gradient, atol=2e-4 * gradient.abs().max().item(), rtol=1e-3, msg=parameter
        )


def test_bf16_is_as_near_as_transformers_in_bf16(checkpoint: Get) -> None:
    folder, theirs = checkpoint("qwen3-attention-bias")
    token_ids = rows(4, 60)
    with torch.no_grad():
        exact = theirs(token_ids).logits
        expected = copy.deepcopy(theirs).to(torch.bfloat16)(token_ids).logits.float()
        actual = load(folder, torch.bfloat16)(token_ids)
    assert actual.dtype == torch.float32
    assert (actual - exact).square().mean() <= 2**2 * (expected - exact).square().mean()


def test_float64_runs_on_the_reference(checkpoint: Get) -> None:
    folder, theirs = checkpoint("llama")
    token_ids = rows(1, 20)
    with torch.no_grad():
        actual = load(folder, torch.float64)(token_ids)
        torch.testing.assert_close(actual.float(), theirs(token_ids).logits, atol=1e-4, rtol=0)


def test_score_is_the_log_softmax_of_each_sequence_alone(checkpoint: Get) -> None:
    folder, theirs = checkpoint("qwen2")
    ours = load(folder)
    sequences = [rows(1, n, seed=n)[0].tolist() for n in (9, 1, 2, 40, 1, 17)]
    with torch.no_grad():
        actual = score(ours, sequences, temperature=0.7)
    for ids, logprobs in zip(sequences, actual, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, :-1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:]).view(-1, 1)).squeeze(1)
        torch.testing.assert_close(logprobs, expected, atol=2e-4, rtol=0)
        assert not logprobs.requires_grad


def test_score_is_differentiable_and_takes_the_shortest(checkpoint: Get) -> None:
    ours = load(checkpoint("llama-tied")[0])
    assert [s.shape for s in score(ours, [[3], [], [5]])] == [(0,), (0,), (0,)]
    assert score(ours, []) == []
    one, two = score(ours, [[3], [4, 5]])
    assert one.shape == (0,)
    two.sum().backward()
    gradient = ours.model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient[4].abs().max() > 0  # as an input
    assert gradient[5].abs().max() > 0  # as an output of the tied head


@pytest.mark.parametrize("bad", [-1, 283])
def test_score_names_an_id_outside_the_vocabulary(bad: int, checkpoint: Get) -> None:
    with pytest.raises(ValueError, match=f"sequence 1 has the token id {bad}, accepted is 0 to 282"):
        score(load(checkpoint("llama")[0]), [[1, 2], [1, bad]])


def test_too_long_a_context_is_refused(checkpoint: Get) -> None:
    ours = load(checkpoint("llama")[0])
    with pytest.raises(ValueError, match="sequence 0 has 257 tokens, accepted is 256 at most"):
        score(ours, [[1] * 257])
    with pytest.raises(ValueError, match="the rows have 257 tokens, accepted is 256 at most"):
        ours(rows(1, 257))


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e6}, LINEAR, LLAMA3])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rotary_frequencies_equal_transformers(rope: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig(
        num_attention_heads=2, head_dim=head_dim, max_position_embeddings=320, rope_parameters=dict(rope)
    )
    frequencies = rope_frequencies(ModelConfig.from_hf(theirs.to_dict()))
    torch.testing.assert_close(frequencies, LlamaRotaryEmbedding(theirs).inv_freq, rtol=3e-7, atol=0)


def test_rotary_tables_stay_fp32_and_grow(checkpoint: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = checkpoint("llama-llama3")
    with torch.no_grad():
        whole, grown = load(folder), load(folder)
        expected = whole(rows(1, 200))
        monkeypatch.setattr(decoder_module, "ROPE_ROWS", 8)
        torch.testing.assert_close(grown(rows(1, 8)), whole(rows(1, 8)), atol=0, rtol=0)
        assert len(grown.rotary_tables(torch.tensor([0]))[0]) == 8
        torch.testing.assert_close(grown(rows(1, 200)), expected, atol=0, rtol=0)
    cast = load(folder).to(torch.bfloat16)
    assert {t.dtype for t in cast.rotary_tables(torch.tensor([0]))} == {torch.float32}


def test_rotary_tables_made_in_inference_serve_training(checkpoint: Get) -> None:
    ours = load(checkpoint("qwen3")[0])
    with torch.inference_mode():
        ours(rows(1, 4))
    score(ours, [[1, 2, 3]])[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_a_copy_and_a_replaced_module_are_what_runs(checkpoint: Get) -> None:
    """The layers keep their submodules at hand; that must never be an old one."""
    ours = load(checkpoint("qwen3-tied")[0])
    token_ids = rows(1, 9)
    with torch.no_grad():
        before = ours(token_ids)
        twin = copy.deepcopy(ours)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert (twin(token_ids) - before).abs().max() > 0.1
        torch.testing.assert_close(ours(token_ids), before, atol=0, rtol=0)
        mlp = ours.model.layers[0].mlp
        assert isinstance(mlp, torch.nn.Module)
        replaced = Linear(80, 48)
        replaced.weight.zero_()
        mlp.down_proj = replaced
        assert (ours(token_ids) - before).abs().max() > 0.1


def test_hidden_asks_the_context_layer_by_layer(checkpoint: Get) -> None:
    ours = load(checkpoint("qwen3")[0])
    packed = PackedAttention(torch.tensor([0, 5], dtype=torch.int32), ours.scale)
    asked: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        asked.append((layer, tuple(q.shape), tuple(v.shape)))
        return packed(layer, q, k, v)

    token_ids = rows(1, 5)
    with torch.no_grad():
        logits = ours.head(ours.hidden(token_ids[0], torch.arange(5), attention))
        torch.testing.assert_close(logits, ours(token_ids)[0], atol=0, rtol=0)
    assert asked == [(0, (5, 4, 20), (5, 2, 20)), (1, (5, 4, 20), (5, 2, 20))]


def test_init_weights() -> None:
    shape = {"vocab_size": 499, "hidden_size": 96, "intermediate_size": 256, "head_dim": 24}
    config = model_config(model_type="llama", num_layers=8, mlp_bias=True, **shape)
    first, same, other = Decoder(config), Decoder(config), Decoder(config)
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        model.init_weights(seed)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        if parameter.dim() == 1:
            assert set(parameter.tolist()) == ({1.0} if "norm" in name else {0.0})
            continue
        assert not torch.equal(parameter, other.get_parameter(name))
        std = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.05)


GOOD: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            r"model_type = 'mamba' in config.json: accepted is one of llama, qwen2, qwen3",
        ),
        ({"model_type": None}, "model_type = None"),
        ({"hidden_size": None}, "hidden_size = None in config.json: accepted is an integer"),
        ({"vocab_size": "10"}, "vocab_size = '10'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 3}, "num_heads = 2: accepted is a multiple of 3 key heads"),
        ({"head_dim": 5}, "head_dim = 5: accepted is an even number"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' in config.json: accepted is 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types = \['sliding_attention'\]"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "rope_type = 'longrope'.*: accepted is one of default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor, high_freq_factor"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
    ],
)
def test_what_config_json_cannot_mean_here_is_refused(change: dict[str, Any], message: str) -> None:
    assert ModelConfig.from_hf(GOOD).num_layers == 1
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**GOOD, **change})


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"config\.json lacks 'intermediate_size'"):
        ModelConfig.from_hf({k: v for k, v in GOOD.items() if k != "intermediate_size"})


def test_biases_that_the_family_cannot_store_are_refused() -> None:
    config = ModelConfig.from_hf(GOOD)
    with pytest.raises(
        ValueError, match=r"\(qkv_bias, o_bias, mlp_bias\) = \(True, False, False\): accepted for llama"
    ):
        replace(config, qkv_bias=True)


def test_config_survives_a_round_trip(each_checkpoint: tuple[Path, Any]) -> None:
    config = read_config(each_checkpoint[0])
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_what_config_json_leaves_out_has_the_defaults_of_transformers(family: str) -> None:
    import transformers

    raw = {**GOOD, "model_type": family.lower(), "hidden_size": 64 * 32, "num_attention_heads": 32}
    ours, theirs = ModelConfig.from_hf(raw), getattr(transformers, f"{family}Config")(**raw)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert (ours.max_position_embeddings, ours.rms_norm_eps) == (
        theirs.max_position_embeddings,
        theirs.rms_norm_eps,
    )
    assert (ours.rope_theta, ours.tie_word_embeddings) == (
        theirs.rope_parameters["rope_theta"],
        theirs.tie_word_embeddings,
    )


def test_rope_settings_of_transformers_4_mean_the_same() -> None:
    old = {**GOOD, "rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    new = {**GOOD, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old).rope_scaling is not None
