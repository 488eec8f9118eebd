"""Adapters as people have them, against peft: what it computes, or a refusal that names the setting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.cli import main
from duologue.model.checkpoint import load_model, save_model
from duologue.model.lora import LoraDecoder
from safetensors.torch import load_file, save_file

Get = Callable[[str], tuple[Path, Any]]
IDS = torch.arange(40).view(2, 20)
WEIGHTS = "adapter_model.safetensors"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def write(base: Path, folder: Path, **options: Any) -> torch.Tensor:
    """An adapter by peft, moved a little, in `folder`; the logits of peft's own reload."""
    import peft
    import transformers

    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder)
    return reloaded(base, folder)


def reloaded(base: Path, folder: Path) -> torch.Tensor:
    import peft
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    return logits(peft.PeftModel.from_pretrained(plain, folder).eval())


def edit(folder: Path, **change: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


LOADED: dict[str, dict[str, Any]] = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no init": {"init_lora_weights": False},
    "rank_pattern": {"rank_pattern": {"q_proj": 8}},
    "rank_pattern of one layer": {"rank_pattern": {"layers.1.self_attn.v_proj": 2, "v_proj": 6}},
    "rank_pattern, the first counts": {"rank_pattern": {"self_attn.v_proj": 6, "v_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 32, "layers.0.*": 2}},
    "both, with rslora": {
        "rank_pattern": {r"[qv]_proj": 2},
        "alpha_pattern": {"down": 3},
        "use_rslora": True,
    },
    "a pattern of a whole name": {"rank_pattern": {"model.layers.0.mlp.down_proj": 1}},
    "a pattern of part of a name": {"rank_pattern": {"_proj": 9, "proj": 9}},
    "targets by pattern": {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    "all linears": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [1]},
    "one layer of a pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "but some": {"exclude_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
    "but by pattern": {"exclude_modules": r".*\.0\..*"},
}


@pytest.mark.parametrize("name", LOADED)
def test_the_logits_are_those_of_peft(name: str, checkpoint: Get, tmp_path: Path) -> None:
    base = checkpoint("qwen3")[0]
    expected = write(base, tmp_path / "adapter", **LOADED[name])
    edit(tmp_path / "adapter", base_model_name_or_path=str(base))
    model, tokenizer = load_model(tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, atol=2e-3, rtol=1e-3)
    save_model(model, tokenizer, tmp_path / "saved")
    torch.testing.assert_close(reloaded(base, tmp_path / "saved"), expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(logits(load_model(tmp_path / "saved")[0]), logits(model))


def test_a_merged_adapter_of_patterns_and_settings_that_stay(checkpoint: Get, tmp_path: Path) -> None:
    base = checkpoint("qwen3")[0]
    adapter = tmp_path / "adapter"
    expected = write(base, adapter, rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 1})
    edit(adapter, base_model_name_or_path=str(base), revision="main", mystery=[1, None])
    before = json.loads((adapter / "adapter_config.json").read_text())
    assert main(["export", str(adapter), str(tmp_path / "merged"), "--merge"]) == 0
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")[0]), expected, atol=2e-3, rtol=1e-3)
    assert main(["export", str(adapter), str(tmp_path / "out")]) == 0
    after = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "newer", 1]
)
def test_beginnings_that_change_the_base_are_refused(init: Any, checkpoint: Get, tmp_path: Path) -> None:
    base = checkpoint("qwen3")[0]
    write(base, tmp_path)
    edit(tmp_path, init_lora_weights=init, base_model_name_or_path=str(base))
    with pytest.raises(ValueError, match=rf"init_lora_weights = {init!r}, accepted is one of True, False"):
        load_model(tmp_path)


def test_pissa_by_peft_itself_is_refused(checkpoint: Get, tmp_path: Path) -> None:
    base = checkpoint("qwen3")[0]
    write(base, tmp_path, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="init_lora_weights = 'pissa'"):
        load_model(tmp_path, base=base)


def without(part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


@pytest.mark.parametrize("part", ["layers.1.", "q_proj.lora_A", "layers.0.mlp.down_proj.lora_B", "v_proj"])
def test_tensors_that_the_settings_promise_must_be_there(part: str, checkpoint: Get, tmp_path: Path) -> None:
    base = checkpoint("qwen3")[0]
    write(base, tmp_path)
    edit_tensors(tmp_path, without(part))
    with pytest.raises(ValueError, match=rf"lacks base_model.*{part}.*, which target_modules promises"):
        load_model(tmp_path, base=base)


def test_tensors_that_they_do_not_promise_are_refused(checkpoint: Get, tmp_path: Path) -> None:
    """peft leaves them out when it loads."""
    base = checkpoint("qwen3")[0]
    write(base, tmp_path)
    edit(tmp_path, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"v_proj|down_proj.* belongs to no linear"):
        load_model(tmp_path, base=base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapter_weights_that_are_no_numbers_are_named(value: float, checkpoint: Get, tmp_path: Path) -> None:
    base = checkpoint("qwen3")[0]
    write(base, tmp_path)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    edit_tensors(tmp_path, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(ValueError, match=f"{name} has NaN or infinity"):
        load_model(tmp_path, base=base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha = nan, accepted is a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
        ({"lora_alpha": True}, "lora_alpha = True, accepted is a number"),
        ({"lora_dropout": float("nan")}, "lora_dropout = nan"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0, accepted is from 0"),
        ({"lora_dropout": "0"}, "lora_dropout = '0'"),
        ({"alpha_pattern": {"q_proj": float("-inf")}}, "alpha_pattern.q_proj = -inf"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern q_proj = 'x'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern q_proj = 0"),
        ({"rank_pattern": {"q_(proj": 4}}, r"rank_pattern has 'q_\(proj', accepted is a regular expression"),
        ({"rank_pattern": [1]}, r"rank_pattern = \[1\]"),
        ({"megatron_config": {"a": [1.0, float("nan")]}}, "megatron_config.a.1 = nan"),
        ({"r": True}, "r = True"),
        ({"use_rslora": "false"}, "use_rslora = 'false', accepted is true or false"),
        ({"target_modules": {"a": 1}}, "target_modules = {'a': 1}"),
        ({"target_modules": "("}, r"target_modules has '\('"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has lm_head, accepted are q_proj"),
        ({"exclude_modules": 3}, "exclude_modules = 3"),
        ({"layers_to_transform": "1"}, "layers_to_transform = '1'"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path = 5"),
        ({"monteclora_config": {"a": 1}}, "monteclora_config"),
    ],
)
def test_other_settings_are_named(
    change: dict[str, Any], message: str, checkpoint: Get, tmp_path: Path
) -> None:
    base = checkpoint("qwen3")[0]
    write(base, tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path, base=base)
    assert "\n" not in str(caught.value)


def test_no_targets_are_those_of_peft(checkpoint: Get, tmp_path: Path) -> None:
    base = checkpoint("qwen3")[0]
    expected = write(base, tmp_path, target_modules=["q_proj", "v_proj"])
    edit(tmp_path, target_modules=None, base_model_name_or_path=str(base))
    model, _ = load_model(tmp_path)
    assert isinstance(model, LoraDecoder)
    torch.testing.assert_close(logits(model), expected, atol=2e-3, rtol=1e-3)
