"""config.json as people have it: a key that changes the numbers is honoured as in transformers or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.cli import main
from duologue.grpo.config import load_config
from duologue.model.checkpoint import load_model, save_model
from duologue.model.config import ModelConfig

Get = Callable[[str], tuple[Path, Any]]
IDS = torch.arange(2 * 120).view(2, 120) % 283
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def theirs(folder: Path) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return logits(model.eval())


def edited(folder: Path, to: Path, drop: tuple[str, ...] = (), **change: Any) -> Path:
    """A copy whose config.json has these keys changed, and others dropped."""
    shutil.copytree(folder, to)
    raw = json.loads((to / "config.json").read_text()) | change
    kept = {key: value for key, value in raw.items() if key not in drop}
    (to / "config.json").write_text(json.dumps(kept))
    return to


ROPES: dict[str, dict[str, Any]] = {
    "linear beside default parameters": {"rope_scaling": LINEAR},
    "linear, the old name": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10_000.0},
    "both names of the type": {"rope_scaling": {**LINEAR, "type": "linear"}},
    "yarn": {"rope_scaling": YARN},
    "yarn in the new key": {"rope_parameters": {**YARN, "rope_theta": 5e5}},
    "yarn, theta beside it": {"rope_scaling": YARN, "rope_theta": 1e6, "rope_parameters": None},
    "yarn with attention_factor": {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    "yarn with betas": {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 0.5}},
    "yarn with a beta of 0": {"rope_scaling": {**YARN, "beta_fast": 0, "beta_slow": None}},
    "yarn, betas the wrong way": {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 8}},
    "yarn not truncated": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn with mscale": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    "yarn with one mscale": {"rope_scaling": {**YARN, "mscale": 2.0}},
    "yarn with a factor below 1": {"rope_scaling": {**YARN, "factor": 0.5}},
    "yarn on the whole context": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "yarn, the original context outside": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "yarn, settings nobody reads": {"rope_scaling": {**YARN, "finetuned": True, "factor_of_safety": 3}},
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rope_settings_give_the_logits_of_transformers(
    family: str, name: str, checkpoint: Get, tmp_path: Path
) -> None:
    plain = logits(load_model(checkpoint(family)[0])[0])
    folder = edited(checkpoint(family)[0], tmp_path / "edited", **ROPES[name])
    model, tokenizer = load_model(folder)
    expected = theirs(folder)
    torch.testing.assert_close(logits(model), expected, atol=2e-3, rtol=1e-3)
    assert (expected - plain).abs().max() > 0.05
    save_model(model, tokenizer, tmp_path / "saved")
    torch.testing.assert_close(theirs(tmp_path / "saved"), expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(logits(load_model(tmp_path / "saved")[0]), logits(model))


HARMLESS: dict[str, dict[str, Any]] = {
    "a window that is off": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    "a window beyond every layer": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "a window of nothing": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "a window as long as the context": {
        "use_sliding_window": True,
        "sliding_window": 256,
        "max_window_layers": 0,
    },
    "full layers by name": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention"] * 2,
    },
    "another name of silu": {"hidden_act": "swish"},
    "no rope settings at all": {"rope_parameters": None, "rope_scaling": {}},
    "keys nobody knows": {"auto_map": {"AutoModel": "x.Y"}, "use_cache": False, "mystery": [1, {"a": None}]},
    "other heads": {"num_labels": 3, "pretraining_tp": 1, "attention_dropout": 0.0, "tie_last": None},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_alters_no_layer_is_accepted_and_kept(name: str, checkpoint: Get, tmp_path: Path) -> None:
    change = HARMLESS[name]
    folder = checkpoint("qwen2")[0]
    drop = () if "layer_types" in change else ("layer_types",)
    folder = edited(folder, tmp_path / "edited", drop, **change)
    model, tokenizer = load_model(folder)
    torch.testing.assert_close(logits(model), theirs(folder), atol=2e-3, rtol=1e-3)
    save_model(model, tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    ours = {"rope_parameters", "rope_scaling"}
    assert {key: saved[key] for key in change.keys() - ours} == {
        key: change[key] for key in change.keys() - ours
    }


BASE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 4,
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"rope_scaling": LINEAR, "rope_parameters": {**YARN, "rope_theta": 10_000.0}},
        r"rope_scaling = .* disagrees with rope_parameters = .*: accepted is one of them",
    ),
    (
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "disagrees with rope_parameters",
    ),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": LINEAR},
        "rope_type = 'dynamic'",
    ),
    ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "dynamic"}}, "rope_type = 'dynamic'"),
    (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        "rope_theta = 10000 .* and 1e.06 in rope_par",
    ),
    (
        {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
        "type = 'yarn' in rope_scaling",
    ),
    ({"rope_scaling": "linear"}, "rope_scaling = 'linear' in config.json: accepted is null or an object"),
    ({"rope_scaling": {**LINEAR, "factor": "4"}}, "factor = '4' in config.json: accepted is a finite number"),
    ({"rope_scaling": {**LINEAR, "factor": 0}}, "factor = 0 in"),
    ({"rope_scaling": {**LINEAR, "factor": float("nan")}}, "factor = nan in"),
    ({"rope_scaling": {**LINEAR, "factor": True}}, "factor = True in"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type = 'yarn' in config.json lacks factor"),
    (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}},
        "original_max_position_embeddings = 0",
    ),
    (
        {"rope_scaling": {**YARN, "truncate": "no"}},
        "truncate = 'no' in config.json: accepted is true or false",
    ),
    ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, "attention_factor = -1.0 in"),
    ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta = 1 in config.json"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, r"speaks of \['full_attention'\]"),
    ({"rope_theta": "1e6"}, "rope_theta = '1e6'"),
    ({"model_type": ["qwen3"]}, r"model_type = \['qwen3'\] in config\.json: accepted is one of llama"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' in config.json: accepted is true or"),
    ({"attention_bias": 1}, "attention_bias = 1 in config.json: accepted is true or false"),
    (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "use_sliding_window = True .* 8",
    ),
    ({"use_sliding_window": True, "sliding_window": "8"}, "sliding_window = '8'"),
    ({"layer_types": "full_attention"}, "layer_types = 'full_attention'"),
    ({"layer_types": ["full_attention"]}, "layer_types in config.json has 1 entries: accepted is 2"),
    ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config = "),
    ({"is_causal": False}, "is_causal = False in config.json: accepted is True"),
    ({"is_causal": None}, "is_causal = None"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights = 'other.safetensors'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 in config.json: accepted is 1.0"),
    ({"quantization_config": {}}, "quantization_config = {}"),
    ({"max_position_embeddings": None}, "max_position_embeddings = None"),
    ({"max_position_embeddings": 256.0}, "max_position_embeddings = 256.0"),
    ({"num_key_value_heads": 0}, "num_kv_heads = 0"),
    ({"head_dim": "4"}, "head_dim = '4'"),
    ({"num_hidden_layers": 100_000}, "num_layers = 100000: accepted is 1024 at most"),
    ({"vocab_size": 10**30}, r"vocab_size = 10+ in config.json: accepted is an integer from 1 to"),
    ({"eos_token_id": "2"}, "eos_token_id = '2' in config.json: accepted is null or an integer, or a list"),
    ({"eos_token_id": [2, None]}, r"eos_token_id = \[2, None\]"),
    ({"bos_token_id": [1]}, r"bos_token_id = \[1\] in config.json: accepted is null or an integer"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_the_rest_is_refused_by_key_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_hf({**BASE, "num_key_value_heads": 2, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_null_is_what_transformers_makes_of_it(family: str) -> None:
    import transformers

    raw = {**BASE, "model_type": family.lower(), "num_key_value_heads": None, "head_dim": None}
    ours, config = ModelConfig.from_hf(raw), getattr(transformers, f"{family}Config")(**raw)
    assert (ours.num_kv_heads, ours.head_dim) == (config.num_key_value_heads, 4)


def test_a_game_that_is_no_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text('game = "deal"\n', "utf-8")
    assert main(["config", str(tmp_path / "mine.toml")]) == 2
    assert "game = 'deal': accepted is a section [game] of keys" in capsys.readouterr().err


def test_a_telling_in_quotes_is_that_telling() -> None:
    quoted, plain = (load_config("deal", [f"game.telling={text}"]) for text in ('"english"', "english"))
    assert quoted == plain
    assert plain.dialogue.max_tokens_per_turn == 128
