"""What a checkpoint decides where no setting says it: the type of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from duologue.grpo.config import load_config
from duologue.grpo.unsaid import kept_of, unsaid
from duologue.kernels import backend
from tiny import model_config

FEW, MANY = {"hidden_size": 32}, {"hidden_size": 1024, "vocab_size": 100_000, "head_dim": 256}


def folder_of(path: Path, dtype: str, **sizes: int) -> Path:
    """A checkpoint's config.json; nothing else is read here."""
    path.mkdir(exist_ok=True)
    config = {**model_config(**sizes).to_hf(), "dtype": dtype, "torch_dtype": dtype}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return path


def dtype_of(folder: Path, *overrides: str) -> str:
    return load_config("deal", [f"model.path={folder}", *overrides]).model.dtype


@pytest.mark.parametrize("instruction_set", ["amx", "avx512bf16", "avx512", "avx2", ""])
def test_a_cpu_takes_bfloat16_where_the_processor_has_it(
    instruction_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "instruction_set", lambda device, dtype: instruction_set)
    has = instruction_set in ("amx", "avx512bf16")
    folder = folder_of(tmp_path / "a", "bfloat16")
    assert dtype_of(folder) == unsaid(folder)["model.dtype"] == ("bfloat16" if has else "float32")
    assert dtype_of(folder, "model.dtype=float32") == "float32"
    assert dtype_of(folder_of(tmp_path / "b", "float16")) == "float32"
    assert dtype_of(folder_of(tmp_path / "c", "float32")) == "float32"
    adapter = {"base_model_name_or_path": str(folder), "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **adapter}), "utf-8")
    assert dtype_of(tmp_path / "d") == dtype_of(folder)


def test_a_gpu_takes_the_type_of_the_checkpoint_but_float32_of_many_parameters(tmp_path: Path) -> None:
    on_gpu = "model.device=cuda"
    for dtype in ("bfloat16", "float16"):  # of which the second has no scaled losses here
        assert dtype_of(folder_of(tmp_path / dtype, dtype, **MANY), on_gpu) == "bfloat16"
    assert dtype_of(folder_of(tmp_path / "few", "float32", **FEW), on_gpu) == "float32"
    many = folder_of(tmp_path / "many", "float32", **MANY)
    with pytest.raises(
        ValueError, match=r"model\.dtype: .*many is in float32, .* 109M parameters slowly; acc"
    ):
        dtype_of(many, on_gpu)
    assert dtype_of(many, on_gpu, "model.dtype=float32") == "float32"
    assert dtype_of(many, on_gpu, "model.dtype=bfloat16") == "bfloat16"
    assert dtype_of(many) == "float32"


def test_a_file_of_ones_own_may_be_called_as_a_runs(tmp_path: Path) -> None:
    text = f'[model]\npath = "{folder_of(tmp_path / "a", "bfloat16")}"\n'
    for name in ("config.toml", "mine.toml"):
        (tmp_path / name).write_text(text, "utf-8")
    of_run, own = (load_config(str(tmp_path / name)) for name in ("config.toml", "mine.toml"))
    assert of_run == own
    assert own.game.telling == "english"  # type: ignore[attr-defined]


def test_a_run_goes_on_in_its_type_and_nothing_else_has_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", "bfloat16")
    run = tmp_path / "run"
    run.mkdir()
    started = load_config("deal", [f"model.path={folder}", "model.dtype=float32"])
    (run / "config.toml").write_text(started.to_toml(), "utf-8")
    assert load_config("deal", [f"model.path={folder}"], kept_of(run)) == started
    assert load_config(str(run / "config.toml")) == started
    other = load_config("deal", [f"model.path={folder}", "model.dtype=float16"], kept_of(run))
    assert other.model.dtype == "float16"  # which a resume refuses
    assert (
        load_config("deal").model.dtype
        == load_config("deal", ["model.path=nowhere"]).model.dtype
        == "float32"
    )
    assert kept_of(tmp_path) == {} == unsaid(tmp_path / "nowhere")
