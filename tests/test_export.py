"""`duologue export`: transformers and peft load what it writes and compute the same; nothing that is there is
touched.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import write_transformers_checkpoint
from duologue.grpo.cli import main
from duologue.grpo.commands.card import card
from duologue.grpo.config import load_config
from duologue.model.checkpoint import load_model, save_model
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.model.tokenizer import Tokenizer
from tiny import run_whole

IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 120]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_transformers_checkpoint("qwen3", folder)
    tiny_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose B is not 0, in a run directory."""
    model, tokenizer = load_model(base)
    settings = LoraSettings(rank=3, alpha=6.0, targets=("q_proj", "down_proj"), base=str(base))
    policy = LoraDecoder(model, new_adapter(model, settings, 0))
    with torch.no_grad():
        for parameter in policy.adapter.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    run = tmp_path_factory.mktemp("runs") / "run"
    for step in ("step_000001", "step_000002"):
        save_model(policy, tokenizer, run / "checkpoints" / step)
    return run


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return getattr(found, "logits", found)


def test_full_weights_in_another_dtype(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    assert main(["export", str(base), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "MiB" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    ours = load_model(base)[0].to(torch.bfloat16)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the deal")["input_ids"]


def test_an_adapter_merged_or_kept(base: Path, adapter: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    assert main(["export", str(adapter), str(tmp_path / "merged"), "--merge"]) == 0
    assert main(["export", str(adapter), str(tmp_path / "kept")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    kept = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "kept"
    )
    ours = load_model(adapter / "checkpoints" / "step_000002")[0]
    for found in (merged, kept):
        torch.testing.assert_close(logits(found), logits(ours), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(load_model(base)[0]), atol=1e-2)


def card_of(folder: Path) -> tuple[Any, str]:
    """The front matter by huggingface_hub, and the text."""
    found = huggingface_hub.ModelCard.load(folder / "README.md")
    return found.data, found.text


def loaded_as_its_card_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder.parent)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(folder)[1], re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["tokenizer"].eos_token_id is not None
    return names["model"].eval()


def test_the_card_of_an_adapter_loads_it(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", str(adapter), str(tmp_path / "out")]) == 0
    data, text = card_of(tmp_path / "out")
    assert (data.library_name, data.base_model) == ("peft", None)
    assert f"vllm serve {base} --enable-lora --lora-modules policy=out" in text
    peer = loaded_as_its_card_says(tmp_path / "out", monkeypatch)
    ours = load_model(adapter / "checkpoints" / "step_000002")[0]
    torch.testing.assert_close(logits(peer), logits(ours), rtol=1e-4, atol=1e-4)
    assert main(["export", str(adapter), str(tmp_path / "merged"), "--merge"]) == 0
    assert card_of(tmp_path / "merged")[0].library_name == "transformers"
    merged = loaded_as_its_card_says(tmp_path / "merged", monkeypatch)
    torch.testing.assert_close(logits(merged), logits(ours), rtol=1e-4, atol=1e-4)


def test_the_commands_of_a_card_are_taken_by_a_shell(tmp_path: Path) -> None:
    """A place with a space, a rank above vLLM's default, a commit of the Hub's."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    for rank, wanted in ((16, ""), (20, "32"), (300, "320")):
        config = load_config("deal", [f"lora.rank={rank}", f"model.path={tmp_path}"])
        (run / "config.toml").write_text(config.to_toml(), "utf-8")
        text = card(run / "checkpoints" / "step_000001", tmp_path / "my out", f"{tmp_path}/the base")
        (line,) = re.findall(r"```sh\n(.*?)\n```", text)
        words = shlex.split(line)
        assert words[:3] == ["vllm", "serve", f"{tmp_path}/the base"]
        assert words[-1] == "policy=my out"
        assert wanted == (words[words.index("--max-lora-rank") + 1] if "--max-lora-rank" in words else "")
    text = card(run / "checkpoints" / "step_000001", tmp_path / "out", f"org/name@{'a' * 40}")
    assert f"vllm serve org/name --revision {'a' * 40} --max-lora-rank 320 --enable-lora" in text
    assert f"from_pretrained('org/name', revision='{'a' * 40}', dtype=\"auto\")" in text


def test_the_card_of_a_run_has_the_figures_of_its_last_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = run_whole(run, "eval.partners=['start']", "eval.partner_dialogues=4", "train.steps=2")
    summary["ability"] = {"line": "language: KL 0.31"}
    (run / "summary.json").write_text(json.dumps(summary), "utf-8")
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    data, text = card_of(tmp_path / "out")
    assert (data.library_name, data.base_model) == ("transformers", None)
    assert "began from random weights; 4 steps of imitation and 2 of self-play (GRPO, dapo)" in text
    warm, trained = (summary[key]["agreement"] for key in ("warm_start", "trained"))
    assert f"| agreement | {warm:.1%} | {trained:.1%} |" in text
    itself, start = (
        summary["partners"][name]["trained"]["agreement"]["value"] for name in ("itself", "start")
    )
    assert f"| agreement | {itself:.1%} | {start:.1%} |" in text.partition("With each partner")[2]
    assert text.index("language: KL 0.31") > text.index("## What it kept")
    assert main(["export", str(run / "checkpoints" / "warm_start"), str(tmp_path / "start")]) == 0
    assert "How it fares" not in card_of(tmp_path / "start")[1]


def test_mistakes_are_named_and_nothing_is_touched(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (adapter / "checkpoints" / "step_000001").iterdir():
        text = file.read_bytes().replace(str(base).encode(), b"/gone")
        (moved / file.name).write_bytes(text)
    out = tmp_path / "new"
    for words, message in (
        ([base, full], "not empty; accepted is a new folder"),
        ([base, full / "mine.txt"], "not empty; accepted is a new folder"),
        ([tmp_path / "nothing", out], "neither a checkpoint"),
        ([base, out, "--merge"], "--merge: "),
        ([base, out, "--base", base], "--base: "),
        ([base, out, "--dtype", "int8"], "int8"),
        ([moved, out], "which is no checkpoint here"),
    ):
        assert main(["export", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    assert (full / "mine.txt").read_text() == "mine"
    assert main(["export", str(moved), str(out), "--base", str(base)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "moved", "new"]


def test_the_last_checkpoint_is_the_one_of_most_steps(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in ("step_999999", "step_1000000"):
        shutil.copytree(base, tmp_path / "run" / "checkpoints" / step)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "step_1000000" in capsys.readouterr().out


def test_a_disk_without_room_leaves_nothing(base: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys; from duologue.grpo.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.exit(main(sys.argv[1:]))"
    )
    words = ["export", str(base), str(tmp_path / "out"), "--dtype", "float32"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "too large" in done.stderr
    assert not list(tmp_path.iterdir())
