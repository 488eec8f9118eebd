"""Checkpoints against transformers, both ways, and what is said about a damaged one."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from duologue.model import atomic
from duologue.model.checkpoint import INDEX, SINGLE, load_model, load_weights, read_config, save_model
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer
from safetensors.torch import load_file, save_file

Get = Callable[[str], tuple[Path, Any]]
TOKEN_IDS = torch.arange(30).view(2, 15)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def files_limited_to(n_bytes: int) -> Iterator[None]:
    """The kernel refuses to write beyond, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def copied(checkpoint: Get, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(checkpoint("qwen2")[0], tmp_path / "copied"))


def test_transformers_loads_what_we_save(each_checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    import transformers

    folder, original = each_checkpoint
    model, tokenizer = load_model(folder)
    save_model(model, tokenizer, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(theirs) is type(original)
    for name, parameter in original.named_parameters():
        assert torch.equal(theirs.get_parameter(name), parameter)
    with torch.no_grad():
        expected = original(TOKEN_IDS).logits
        torch.testing.assert_close(theirs(TOKEN_IDS).logits, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(
            load_model(tmp_path / "saved")[0](TOKEN_IDS), model(TOKEN_IDS), atol=0, rtol=0
        )
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.bos_token_id) == (4, 0)
    assert theirs.config.tie_word_embeddings == original.config.tie_word_embeddings


def test_shards_both_ways(checkpoint: Get, tmp_path: Path) -> None:
    import transformers

    folder, theirs = checkpoint("llama-attention-bias")
    model, tokenizer = load_model(folder)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    tokenizer.save(tmp_path / "theirs")
    save_model(model, tokenizer, tmp_path / "ours", max_shard_bytes=60_000)
    for path in (tmp_path / "theirs", tmp_path / "ours"):
        shards = sorted(path.glob("*.safetensors"))
        assert len(shards) > 2
        assert not (path / SINGLE).exists()
    assert max(file.stat().st_size for file in (tmp_path / "ours").glob("*.safetensors")) < 65_000
    with torch.no_grad():
        expected = model(TOKEN_IDS)
        torch.testing.assert_close(load_model(tmp_path / "theirs")[0](TOKEN_IDS), expected, atol=0, rtol=0)
        torch.testing.assert_close(load_model(tmp_path / "ours")[0](TOKEN_IDS), expected, atol=0, rtol=0)
        sharded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        torch.testing.assert_close(sharded(TOKEN_IDS).logits, theirs(TOKEN_IDS).logits, atol=1e-6, rtol=0)


def test_the_dtype_is_the_checkpoints_unless_given(checkpoint: Get, tmp_path: Path) -> None:
    import transformers

    model, tokenizer = load_model(checkpoint("qwen3")[0])
    assert model.head_weight.dtype == torch.float32
    save_model(model.to(torch.bfloat16), tokenizer, tmp_path / "bf16")
    loaded, _ = load_model(tmp_path / "bf16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in loaded.named_parameters())
    assert {p.data_ptr() % 64 for p in loaded.parameters()} == {0}
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto").dtype
        == torch.bfloat16
    )
    wide, _ = load_model(tmp_path / "bf16", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_a_stored_head_of_a_tied_model_is_taken_as_it_is(checkpoint: Get, tmp_path: Path) -> None:
    import transformers

    folder = Path(shutil.copytree(checkpoint("llama-tied")[0], tmp_path / "tied"))
    expected, _ = load_model(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model, _ = load_model(folder)
    with torch.no_grad():
        assert torch.equal(model(TOKEN_IDS), expected(TOKEN_IDS))
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    untied, tokenizer = load_model(folder)
    assert not untied.config.tie_word_embeddings
    with torch.no_grad():
        assert not torch.allclose(untied(TOKEN_IDS), expected(TOKEN_IDS), atol=0.1)
        torch.testing.assert_close(untied(TOKEN_IDS), theirs(TOKEN_IDS).logits, atol=1e-4, rtol=1e-5)
        save_model(untied, tokenizer, tmp_path / "saved")
        assert torch.equal(load_model(tmp_path / "saved")[0](TOKEN_IDS), untied(TOKEN_IDS))
    edit_tensors(folder, lambda t: t.pop("model.embed_tokens.weight"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        alone = load_model(folder)[0](TOKEN_IDS)
        torch.testing.assert_close(alone, theirs(TOKEN_IDS).logits, atol=1e-4, rtol=1e-5)


def test_the_rotary_table_of_old_checkpoints_is_passed_over(copied: Path) -> None:
    expected, _ = load_model(copied)
    edit_tensors(copied, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    with torch.no_grad():
        assert torch.equal(load_model(copied)[0](TOKEN_IDS), expected(TOKEN_IDS))


def k_proj(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(12, 48)


def whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"lacks 1 of .* first model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (lambda t: t.pop("lm_head.weight"), r"lacks 1 of .* first lm_head\.weight"),
        (
            lambda t: t.update(extra=torch.ones(1)),
            r"model\.safetensors: extra is no tensor of this qwen2 model",
        ),
        (k_proj, r"layers\.1\.self_attn\.k_proj\.weight is \[12, 48\], the model's is \[24, 48\]"),
        (
            whole_numbers,
            r"model\.norm\.weight has dtype torch\.int8, accepted is one of float32, bfloat16, float16",
        ),
    ],
)
def test_a_wrong_tensor_is_named(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, copied: Path
) -> None:
    edit_tensors(copied, change)
    with pytest.raises(ValueError, match=message):
        load_model(copied)


@pytest.mark.parametrize("kept", [0, 5, 300, -10])
def test_a_truncated_file_is_named(kept: int, copied: Path) -> None:
    file = copied / SINGLE
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read, it is truncated or damaged"):
        load_model(copied)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"is not a checkpoint: it has no config\.json"),
        ("tokenizer.json", r"has no tokenizer\.json"),
        (SINGLE, r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
    ],
)
def test_a_missing_file_is_named(name: str, message: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(ValueError, match=message):
        load_model(copied)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a checkpoint"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_file_that_is_no_json_object_is_named(name: str, text: str, copied: Path) -> None:
    (copied / name).write_text(text)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_model(copied)


def test_settings_of_the_checkpoint_are_checked(copied: Path) -> None:
    edit_json(copied / "config.json", dtype="float8")
    with pytest.raises(ValueError, match="dtype = 'float8': accepted is one of float32, bfloat16, float16"):
        load_model(copied)
    edit_json(copied / "config.json", dtype="float32", model_type="mistral")
    with pytest.raises(
        ValueError, match=r"model_type = 'mistral' in config\.json: accepted is one of llama, qwen2, qwen3"
    ):
        load_model(copied)
    edit_json(copied / "config.json", model_type="qwen2", vocab_size=270)
    with pytest.raises(ValueError, match=r"tokenizer\.json has the id 274, config\.json a vocab_size of 270"):
        load_model(copied)


def test_a_broken_index_is_named(checkpoint: Get, tmp_path: Path) -> None:
    model, tokenizer = load_model(checkpoint("llama")[0])
    save_model(model, tokenizer, tmp_path / "sharded", max_shard_bytes=60_000)
    second = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(ValueError, match=f"names the shard {second.name}, which is not there"):
        load_model(tmp_path / "sharded")
    (tmp_path / "sharded" / INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        load_model(tmp_path / "sharded")


def test_saving_over_a_checkpoint_leaves_only_the_new_one(copied: Path, checkpoint: Get) -> None:
    model, tokenizer = load_model(checkpoint("llama")[0])
    (copied / "stray.txt").write_text("from before")
    save_model(model, tokenizer, copied)
    assert read_config(copied) == model.config
    assert not (copied / "stray.txt").exists()
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_a_full_disk_leaves_the_previous_checkpoint_whole(copied: Path, tiny_tokenizer: Tokenizer) -> None:
    before = contents(copied)
    shape = {"vocab_size": 275, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    model = tiny.decoder(num_layers=1, num_heads=2, **shape)
    tokenizer_size = (copied / "tokenizer.json").stat().st_size
    with (
        files_limited_to(tokenizer_size + 10_000),
        pytest.raises(Exception, match=r"(?i)too large|os error 27"),
    ):
        save_model(model, tiny_tokenizer, copied)  # fails in the weights, after all other files
    assert contents(copied.parent) == {f"copied/{name}": data for name, data in before.items()}
    save_model(model, tiny_tokenizer, copied)
    assert read_config(copied).hidden_size == 64


def test_a_failing_rename_puts_the_previous_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "run"
    atomic.write_folder(target, lambda folder: (folder / "a").write_text("old"))
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        atomic.write_folder(target, lambda folder: (folder / "a").write_text("new"))
    assert contents(tmp_path) == {"run/a": b"old"}


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "run"
    atomic.write_folder(target, lambda folder: (folder / "a").write_text("old"))
    target.rename(tmp_path / ".run.old")
    (tmp_path / ".run.tmp").mkdir()
    with pytest.raises(OSError, match="disk"):
        atomic.write_folder(target, lambda folder: (_ for _ in ()).throw(OSError("disk")))
    assert contents(tmp_path) == {"run/a": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_write_file_replaces_or_keeps(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    atomic.write_file(path, b"old")
    with files_limited_to(1000), pytest.raises(OSError, match="File too large"):
        atomic.write_file(path, b"x" * 5000)
    assert contents(tmp_path) == {"state.json": b"old"}
    atomic.write_file(path, b"new")
    assert contents(tmp_path) == {"state.json": b"new"}


def test_weights_load_without_a_tokenizer(checkpoint: Get, tmp_path: Path) -> None:
    folder, theirs = checkpoint("qwen3-tied")
    for name in ("config.json", SINGLE):
        shutil.copy(folder / name, tmp_path)
    with torch.device("meta"):
        model = Decoder(read_config(tmp_path))
    load_weights(model, tmp_path, "cpu", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKEN_IDS), theirs(TOKEN_IDS).logits, atol=1e-4, rtol=0)
