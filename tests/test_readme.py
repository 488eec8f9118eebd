"""What README and docs/ show runs: every command, every block of Python; the quoted step is the trainer's.

A page's commands run in order in one folder, with the reader's own (DIR, OUT, a server) in place and runs
made small. The trainer for TRL is compared with TRL's own, gradient by gradient.
"""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.cli import main
from duologue.kernels import backend, ops
from judge_server import JudgeServer

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
SMALL = {  # what makes a command of a page small; the page's own settings stand before and lose
    "model": """model.hidden_size=32 model.intermediate_size=48 model.num_layers=1 model.num_heads=2
        model.head_dim=16""",
    "train": """imitation.steps=2 imitation.dialogues=40 imitation.dialogues_per_step=4 train.steps=2
        eval.dialogues=2 eval.partners=[] eval.ability=false grpo.group_size=2 grpo.groups_per_step=1
        dialogue.max_tokens_per_turn=6
        dialogue.max_tokens_final=24 dialogue.max_rounds=2 rollout.cache_tokens=65536""",
    "eval": """eval.dialogues=2 eval.ability_prompts=12 eval.ability_tokens=6 dialogue.max_rounds=1
        dialogue.max_tokens_per_turn=6 dialogue.max_tokens_final=24 rollout.cache_tokens=65536""",
    "judged": "judge.max_unscored_share=0.99 judge.deadline_s=20 imitation.steps=0",
}
JUDGED = ("collective-agency", "dynamic-alignment")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks, without comments."""
    lines = (line.split("  #")[0].strip() for block in blocks(page, "sh") for line in block.splitlines())
    return [line for line in lines if line]


# Turns are rendered the same whatever follows them, as a context that only grows needs it.
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, chat_checkpoint: Path) -> Path:
    """A reader's folder: checkpoints by the names that the pages use."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "mygame.py").write_text(blocks("README.md", "python")[0])
    for name in ("DIR", "CHECKPOINT", "OTHER"):
        shutil.copytree(chat_checkpoint, folder / name)
        (folder / name / "chat_template.jinja").write_text(CHATML)
    weights = folder / "OTHER" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")  # other weights than CHECKPOINT's
    return folder


def words_of(command: str, page_folder: Path, judge_url: str) -> list[str]:
    """A `duologue` command as it is run here: made small, on this server and in this folder."""
    words = [word.replace("http://127.0.0.1:8000/v1", judge_url) for word in shlex.split(command)[1:]]
    kind, judged = words[0], any(name in words for name in JUDGED)
    if kind in ("train", "eval") and "--help" not in words:
        more = SMALL[kind].split() + (SMALL["judged"].split() if judged else [])
        if kind == "train" and "--model" not in words and not judged:
            more += SMALL["model"].split()
        if "text-game" in words:  # from nothing, and without a final statement
            more = [word for word in more if not word.startswith(("imitation", "dialogue.max_tokens_final"))]
        words += more
        words = [
            word for i, word in enumerate(words) if word != "--dialogues" and words[i - 1] != "--dialogues"
        ]
    if kind == "train" and "--run-dir" not in words:
        words += ["--run-dir", str(page_folder / f"run-{len(list(page_folder.iterdir()))}")]
    return words


def run(command: str, folder: Path, judge_url: str) -> str:
    """What is wrong with a command, "" when it works."""
    program, *rest = shlex.split(command)
    if program == "make":
        known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return "" if rest[0] in known else f"the Makefile has no target {rest[0]}"
    if program == "duologue":
        code = main(words_of(command, folder, judge_url))
        return "" if code == 0 else f"exit code {code}"
    assert program == "python"
    done = subprocess.run([sys.executable, *rest], cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr[-500:]


@pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built: slow")
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(
    page: str,
    place: Path,
    judge_server: JudgeServer,
    tmp_path: Path,
    all_cores: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    for command in commands(page):
        wrong = run(command, tmp_path, judge_server.url)
        assert not wrong, f"{page}: {command}: {wrong}\n{capsys.readouterr().err}"


def test_pages_show_what_they_promise() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 215
    links = re.findall(r"\]\((docs/\w+\.md)\)", readme)
    assert sorted(set(links)) == PAGES[1:]
    for page in PAGES:
        for name in re.findall(
            r"`((?:kernels|model|rollout|grpo|bench)/[\w/]+\.(?:py|csv))`", (ROOT / page).read_text()
        ):
            assert (ROOT / name).is_file(), f"{page} names {name}"


# ---- blocks of Python ----------------------------------------------------------------------------


def reader_names() -> dict[str, Any]:
    """What the blocks take as the reader's own: N rows, H wide, a vocabulary of V."""
    generator = torch.Generator().manual_seed(0)
    n, h, v = 12, 16, 50

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    logp = torch.full((n,), -3.0)
    q, k = rows(n, 4, 16), rows(n, 2, 16)
    return {
        "torch": torch,
        "hidden": rows(n, h).requires_grad_(),
        "head_weight": rows(v, h).requires_grad_(),
        "targets": torch.randint(v, (n,), generator=generator),
        "q": q,
        "k": k,
        "v": rows(n, 2, 16),
        "cu_seqlens": torch.tensor([0, 5, n], dtype=torch.int32),
        "scale": 0.25,
        "old_logp": logp,
        "advantage": rows(n),
        "my_loss": lambda logp, old, advantage: (-((logp - old).exp() * advantage).sum(), {}),
        "temperature": torch.ones(n),
        "top_k": torch.full((n,), 5, dtype=torch.int32),
        "top_p": torch.full((n,), 0.9),
        "min_p": torch.zeros(n),
        "seed": torch.arange(n),
        "position": torch.arange(n),
    }


def python_blocks() -> Iterator[Any]:
    for page in PAGES:
        for number, block in enumerate(blocks(page, "python"), 1):
            if "GRPOTrainer" not in block and "def selfplay_step" not in block:
                yield pytest.param(block, id=f"{page}-{number}")


@pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("block", python_blocks())
def test_every_block_runs(block: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = reader_names()
    exec(block, names)
    if "policy" in names and "head_weight" in names:
        whole, _ = ops.linear_logprob(
            names["hidden"], names["head_weight"], names["targets"], temperature=1.0
        )
        assert torch.equal(names["policy"].logprob, whole.detach())
        assert names["hidden"].grad is not None


def test_the_way_through_the_code_is_short() -> None:
    section = (ROOT / "README.md").read_text("utf-8").split("## Read the code")[1].split("\n## ")[0]
    files = re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.MULTILINE)
    assert 5 < len(files) <= 10
    assert sum(len((ROOT / file).read_text("utf-8").splitlines()) for file in files) <= 1_800


def test_the_step_is_quoted_as_it_stands() -> None:
    from duologue.grpo.steps import Steps

    quoted = [block for page in PAGES for block in blocks(page, "python") if "def selfplay_step" in block]
    assert quoted
    for block in quoted:
        assert block.strip() == textwrap.dedent(inspect.getsource(Steps.selfplay_step)).strip()


# ---- the trainer for TRL -------------------------------------------------------------------------


def example() -> Any:
    """The trainer that the page on kernels defines."""
    block = next(b for page in PAGES for b in blocks(page, "python") if "GRPOTrainer" in b)
    names: dict[str, Any] = {}
    exec(block, names)
    return names["FusedHeadGRPOTrainer"]


def gradients_of_a_step(trainer_class: Any, folder: Path, beta: float) -> dict[str, torch.Tensor]:
    """All gradients of one step on a tiny Qwen3; two prompts of unequal length, four completions each."""
    import datasets
    import tokenizers
    import trl
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=61,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)  # TRL reads the reference policy from there
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    grads: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            grads.update((name, p.grad.clone()) for name, p in model.named_parameters())

    trainer = trainer_class(
        model=Qwen3ForCausalLM.from_pretrained(folder),
        reward_funcs=lambda completion_ids, **_: [
            sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids
        ],
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w5 w6 w7 w8 w9", "w10 w11"]}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="w0", eos_token="w1", pad_token="w2", padding_side="left"
        ),
        callbacks=[Keep()],
        args=trl.GRPOConfig(
            output_dir=str(folder / "run"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            max_steps=1,
            seed=0,
            per_device_train_batch_size=8,
            num_generations=4,
            gradient_accumulation_steps=1,
            max_completion_length=24,
            temperature=0.9,
            top_k=0,
            top_p=1.0,
            beta=beta,
            learning_rate=1e-3,
            max_grad_norm=1e9,
            gradient_checkpointing=False,
        ),
    )
    trainer.train()
    return grads


@pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_trainer_of_the_page_has_trls_gradients(tmp_path: Path, beta: float) -> None:
    trl = pytest.importorskip("trl", reason="trl is a development dependency")
    expected = gradients_of_a_step(trl.GRPOTrainer, tmp_path, beta)
    ours = gradients_of_a_step(example(), tmp_path, beta)
    assert ours.keys() == expected.keys()
    assert float(expected["model.embed_tokens.weight"].norm()) > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-8
        )
