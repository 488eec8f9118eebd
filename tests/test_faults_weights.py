"""Weights and settings as people have them: whole sets, damaged ones, NaN, and what an export keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.cli import main
from duologue.model.checkpoint import INDEX, SINGLE, load_model, save_model
from safetensors.torch import load_file, save_file

Get = Callable[[str], tuple[Path, Any]]
IDS = torch.arange(40).view(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def theirs(folder: Path) -> torch.Tensor:
    import transformers

    return logits(transformers.AutoModelForCausalLM.from_pretrained(folder).eval())


def scaled(tensors: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    return {name: tensor * factor for name, tensor in tensors.items()}


@pytest.fixture
def sharded(checkpoint: Get, tmp_path: Path) -> Path:
    model, tokenizer = load_model(checkpoint("qwen3")[0])
    save_model(model, tokenizer, tmp_path / "sharded", max_shard_bytes=60_000)
    return tmp_path / "sharded"


def put_single(folder: Path, source: Path, factor: float) -> None:
    save_file(scaled(load_file(source / SINGLE), factor), folder / SINGLE, metadata={"format": "pt"})


# ---- which weights ----------------------------------------------------------------------------------------


def test_a_single_file_beside_old_shards_counts_as_in_transformers(sharded: Path, checkpoint: Get) -> None:
    old = logits(load_model(sharded)[0])
    put_single(sharded, checkpoint("qwen3")[0], 1.5)
    ours = logits(load_model(sharded)[0])
    torch.testing.assert_close(ours, theirs(sharded), atol=1e-4, rtol=1e-4)
    assert (ours - old).abs().max() > 0.5


def damage(folder: Path, how: str) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    index = folder / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    match how:
        case "no index":
            index.unlink()
        case "an index of other shards":
            index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "gone.safetensors")}))
        case "an index that is cut":
            index.write_text(index.read_text()[:50])
        case "an index of half the tensors":
            first = shards[0].name
            index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, first)}))
        case "an index of numbers":
            index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, 3)}))
        case "a single file that is cut":
            (folder / SINGLE).write_bytes(shards[0].read_bytes()[:300])
        case "a single file of half the tensors":
            shutil.copy(shards[0], folder / SINGLE)
        case "shards of another count":
            shutil.copy(shards[0], folder / "model-00001-of-00009.safetensors")


DAMAGES = [
    "no index",
    "an index of other shards",
    "an index that is cut",
    "an index of half the tensors",
    "an index of numbers",
    "a single file that is cut",
    "a single file of half the tensors",
    "shards of another count",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_one_whole_set_is_loaded_whatever_else_lies_there(how: str, sharded: Path) -> None:
    expected = logits(load_model(sharded)[0])
    damage(sharded, how)
    assert torch.equal(logits(load_model(sharded)[0]), expected)


@pytest.mark.parametrize("how", ["no index", "an index that is cut", "a single file that is cut"])
def test_where_no_set_is_whole_the_first_problem_is_named(how: str, sharded: Path) -> None:
    sorted(sharded.glob("model-*.safetensors"))[1].unlink()
    damage(sharded, how)
    named = {"no index": "has neither", "an index that is cut": INDEX, "a single file that is cut": SINGLE}
    with pytest.raises(ValueError, match=named[how]) as caught:
        load_model(sharded)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_shards_and_two_sets_without_an_index_are_refused(
    sharded: Path, checkpoint: Get
) -> None:
    model, tokenizer = load_model(checkpoint("qwen3")[0])
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    tensors = load_file(first)
    save_file({**load_file(last), **tensors}, last, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"is in .*{first.name} and in .*{last.name}: accepted is one"):
        load_model(sharded)
    save_model(model, tokenizer, sharded.parent / "other", max_shard_bytes=40_000)
    for file in (sharded.parent / "other").glob("model-*.safetensors"):
        shutil.copy(file, sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(ValueError, match="has shards of two models"):
        load_model(sharded)


# ---- NaN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_weights_that_are_no_numbers_are_named(
    name: str, value: float, checkpoint: Get, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen3")[0], tmp_path / "nan"))
    tensors = load_file(folder / SINGLE)
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} has NaN or infinity .*: accepted are"):
        load_model(folder)


def test_weights_beyond_the_asked_dtype_are_named(checkpoint: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen3")[0], tmp_path / "large"))
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    assert load_model(folder)[0].head_weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"model\.norm\.weight has NaN or infinity as torch\.float16"):
        load_model(folder, dtype=torch.float16)


def test_eval_and_train_refuse_such_weights(
    checkpoint: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen3")[0], tmp_path / "nan"))
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    for words in (
        ["eval", str(folder), "--recipe", "deal"],
        ["train", "deal", "--model", str(folder), "--run-dir", str(tmp_path / "r"), *SMALL],
    ):
        assert main(words) in (1, 2)
        error = capsys.readouterr().err
        assert "model.norm.weight has NaN" in error
        assert "Traceback" not in error


# ---- what is kept -----------------------------------------------------------------------------------------

GENERATION = {
    "bos_token_id": 0,
    "do_sample": True,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
}


@pytest.fixture
def settled(checkpoint: Get, tmp_path: Path) -> Path:
    """A checkpoint with settings of its user."""
    folder = Path(shutil.copytree(checkpoint("qwen3")[0], tmp_path / "settled"))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"pad_token_id": 0, "initializer_range": 0.01, "mystery": {"a": [1, None]}, "use_cache": False}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    (folder / "LICENSE").write_text("free")
    return folder


def kept(folder: Path, source: Path) -> None:
    generation = json.loads((folder / "generation_config.json").read_text())
    eos = generation.pop("eos_token_id")
    expected = dict(GENERATION)
    assert set(expected.pop("eos_token_id")) <= set(eos)
    assert generation == expected
    raw, before = (json.loads((path / "config.json").read_text()) for path in (folder, source))
    changed = {"eos_token_id", "bos_token_id", "dtype", "torch_dtype", "rope_theta", "rope_scaling"}
    assert {key: raw[key] for key in before.keys() - changed} == {
        key: before[key] for key in before.keys() - changed
    }
    for name in ("special_tokens_map.json", "LICENSE", "tokenizer.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_an_export_keeps_what_it_does_not_change(settled: Path, tmp_path: Path) -> None:
    assert main(["export", str(settled), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    kept(tmp_path / "out", settled)
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    kept(tmp_path / "again", settled)
    import transformers

    loaded = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (loaded.temperature, loaded.top_p, loaded.pad_token_id) == (0.6, 0.95, 0)


SMALL = [
    "game.telling=plain",
    "dialogue.max_rounds=1",
    "dialogue.max_tokens_per_turn=4",
    "dialogue.max_tokens_final=4",
    "grpo.group_size=2",
    "grpo.groups_per_step=1",
    "train.steps=1",
    "train.save_every=1",
    "eval.dialogues=1",
    "eval.partners=[]",
    "eval.ability=false",
    "imitation.steps=0",
]


@pytest.mark.parametrize("lora", [False, True])
def test_the_checkpoints_of_a_run_keep_it_too(lora: bool, settled: Path, tmp_path: Path) -> None:
    raw = json.loads((settled / "config.json").read_text())
    (settled / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 4096}))
    run = tmp_path / "run"
    more = ["lora.rank=2"] if lora else []
    words = ["train", "deal", "--model", str(settled), "--run-dir", str(run), *SMALL, *more]
    assert main(words) == 0
    last = run / "checkpoints" / "step_000001"
    if lora:
        for name in ("special_tokens_map.json", "LICENSE", "tokenizer.json"):
            assert (last / name).read_bytes() == (settled / name).read_bytes()
        assert main(["export", str(run), str(tmp_path / "out"), "--merge"]) == 0
        last = tmp_path / "out"
    kept(last, settled)
    assert not (tmp_path / "out" / "trainer_state.json").exists()
