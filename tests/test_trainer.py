"""Training end to end on a tiny policy: resume is exact whenever the run died, and splitting a batch changes
nothing.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.build import build_corpus, build_game
from duologue.grpo.config import Config, load_config
from duologue.grpo.console import Progress
from duologue.grpo.imitation import accumulate_imitation_gradient, demonstration_batch
from duologue.grpo.loss import LossConfig
from duologue.grpo.packing import Row
from duologue.grpo.policy import build_policy, use_device
from duologue.grpo.run_dir import Interrupted, RunDir, read_lines
from duologue.grpo.trainer import Trainer, train
from duologue.grpo.update import accumulate_policy_gradient
from duologue.kernels import backend, cores
from safetensors.torch import load_file
from tiny import RUN, dying, lines, run_whole


def config(*more: str) -> Config:
    return load_config("deal", [*RUN, *more])


def assert_same_run(a: Path, b: Path) -> None:
    last = "checkpoints/step_000008/model.safetensors"
    first, second = load_file(a / last), load_file(b / last)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert lines(a) == lines(b)
    assert read_lines(a / "dialogues.jsonl") == read_lines(b / "dialogues.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    run_whole(path)
    return path


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    for policy in ("warm_start", "trained"):
        assert {"agreement", "pareto", "joint_ratio", "nash_ratio", "dialogues"} <= summary[policy].keys()
        assert summary[policy]["dialogues"] == 8
    assert summary["train_seconds"] > 0
    rows = read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    served = backend.instruction_set("cpu", torch.float32)
    assert {summary["instruction_set"], *(row["instruction_set"] for row in rows)} == {served}
    dialogues = read_lines(whole / "dialogues.jsonl")
    assert {d["stage"] for d in dialogues} == {"selfplay", "eval"}
    for d in dialogues:
        assert {
            "step",
            "scenario",
            "personas",
            "turns",
            "outcome",
            "reward",
            "advantage",
            "weights_version",
        } <= d.keys()
        assert all({"role", "kind", "text", "token_ids", "logprobs"} <= turn.keys() for turn in d["turns"])


def test_transformers_loads_the_checkpoint(whole: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(whole / "checkpoints" / "step_000008")
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "checkpoints" / "step_000008")
    turn = read_lines(whole / "dialogues.jsonl")[0]["turns"][0]
    assert tokenizer.decode(turn["token_ids"], skip_special_tokens=True).strip() == turn["text"]
    assert sum(p.numel() for p in model.parameters()) > 10_000


def test_rollout_logprobs_equal_the_trainers_in_every_step(whole: Path) -> None:
    from duologue.kernels import backend

    found = [row["mismatch"] for row in read_lines(whole / "metrics.jsonl") if row["stage"] == "selfplay"]
    assert len(found) == 4
    assert all(value <= (0.0 if backend.available() else 1e-4) for value in found)


@pytest.mark.parametrize("after", [2, 4, 6])
def test_stopping_and_resuming_gives_the_same_run(whole: Path, tmp_path: Path, after: int) -> None:
    """`after` steps of imitation or self-play, the stop flag, another process's worth of new objects,
    and on."""
    c = config()
    stop = threading.Event()

    class StopAfter(Progress):
        seen = 0

        def update(self, step: int, metrics: Any) -> None:
            self.seen += 1
            if self.seen == after:
                stop.set()

    run = RunDir.create(tmp_path / "run", c.to_toml())
    with pytest.raises(Interrupted):
        train(c, run, StopAfter(quiet=True), stop)
    run.close()
    train(c, RunDir.resume(tmp_path / "run", c.to_toml()), Progress(quiet=True), threading.Event())
    assert_same_run(whole, tmp_path / "run")


def test_kill_9_and_resume_gives_the_same_run(whole: Path, tmp_path: Path) -> None:
    """A real process, killed again and again as soon as it has got a little further."""
    path = tmp_path / "run"
    command = ["train", "deal", *RUN, "--run-dir", str(path)]
    for n_lines in (2, 4, 7):
        more = ["--resume"] if path.exists() else []
        killed = subprocess.run(
            [*dying(n_lines), *command, *more], capture_output=True, text=True, timeout=600
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = subprocess.run([*dying(10**6), *command, "--resume"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, path)


@pytest.mark.parametrize(("measured", "step"), [("warm_start", 4), ("trained", 8)])
def test_what_was_trained_is_there_when_measuring_it_fails(
    whole: Path, tmp_path: Path, measured: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(trainer: Any, policy: str) -> Any:
        if policy == measured:
            raise OSError("no room to measure in")
        return evaluate(trainer, policy)

    c, evaluate = config(), Trainer._evaluate
    run = RunDir.create(tmp_path / "run", c.to_toml())
    with monkeypatch.context() as failing:
        failing.setattr(Trainer, "_evaluate", evaluated)
        with pytest.raises(OSError, match="no room to measure"):
            train(c, run, Progress(quiet=True), threading.Event())
    run.close()
    assert (tmp_path / f"run/checkpoints/step_{step:06}/model.safetensors").is_file()
    train(c, RunDir.resume(tmp_path / "run", c.to_toml()), Progress(quiet=True), threading.Event())
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
def test_threads_are_the_physical_cores_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    before, torch_before = backend.lib().threads(), torch.get_num_threads()
    monkeypatch.setattr(cores, "thread_count", lambda: 3)
    try:
        for said, threads in (("0", 3), ("2", 2)):
            use_device(config(f"train.threads={said}"))
            assert backend.lib().threads() == threads
    finally:
        backend.lib().set_threads(before)
        torch.set_num_threads(torch_before)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("variant", ["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo"])
def test_splitting_the_batch_does_not_change_the_gradient(variant: str) -> None:
    c = config()
    corpus = build_corpus(c, build_game(c))
    model, tokenizer = build_policy(c, corpus)
    rows = demonstration_batch(corpus, tokenizer, 6, 0)
    for i, row in enumerate(rows):
        row.advantage = (-1.0) ** i * (1 + i / 7)
        row.logprobs = [-5.5 if marked else 0.0 for marked in row.loss_mask]
    loss = LossConfig(variant=variant)
    found = []
    for limit in (100_000, 300, 1):
        accumulate_policy_gradient(model, rows, loss, temperature=1.0, max_tokens=limit)
        found.append(gradients(model))
    for part in found[1:]:
        for a, b in zip(found[0], part, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert any(float(g.abs().max()) > 1e-4 for g in found[0])


@pytest.mark.parametrize("final_weight", [1.0, 2.5])
def test_imitation_gradient_equals_autograd_of_the_plain_model(final_weight: float) -> None:
    """Against transformers' model of the same weights and torch's cross-entropy; final statements are found
    in the rows by the prompt before them.
    """
    import transformers

    c = config()
    corpus = build_corpus(c, build_game(c))
    model, tokenizer = build_policy(c, corpus)
    rows = demonstration_batch(corpus, tokenizer, 3, 0, final_weight)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**model.config.to_hf()))
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    question = tokenizer.encode(corpus[0].final_prompt)

    def weights(row: Row) -> torch.Tensor:
        ids, n = row.token_ids, len(question)
        asked = [i for i in range(len(ids) - n) if ids[i : i + n] == question]
        final = [final_weight if asked and i > asked[-1] else 1.0 for i in range(len(ids))]
        return torch.tensor(final) * torch.tensor(row.loss_mask)

    total = sum(float(weights(row).sum()) for row in rows)
    assert (total > sum(row.n_trained for row in rows)) == (final_weight > 1)
    expected_loss = 0.0
    for row in rows:
        ids = torch.tensor([row.token_ids])
        logits = theirs(ids).logits[:, :-1].flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        loss = (each * weights(row)[1:]).sum() / total
        loss.backward()
        expected_loss += float(loss)
    stats = accumulate_imitation_gradient(model, rows, max_tokens=500)
    assert stats.loss == pytest.approx(expected_loss, rel=1e-5)
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=2e-4, atol=2e-6)


def test_a_checkpoint_of_another_shape_is_refused_on_resume(whole: Path, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "run"
    shutil.copytree(whole, path)
    other = config("model.hidden_size=64")
    (path / "config.toml").write_text(other.to_toml())
    run = RunDir.resume(path, other.to_toml())
    with pytest.raises(
        ValueError, match=r"hidden_size = 32, but the run's configuration says model.hidden_size = 64"
    ):
        train(other, run, Progress(quiet=True), threading.Event())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.max_position=64", "model.max_position = 64 is below the"),
        ("rollout.cache_tokens=64", "rollout.cache_tokens = 64 is below the"),
        ("imitation.steps=0", "starts from nothing, which needs imitation.steps above 0"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(tmp_path: Path, setting: str, message: str) -> None:
    c = config("grpo.imitation_coef=0.0", setting)
    with pytest.raises(ValueError, match=message):
        train(c, RunDir.create(tmp_path / "run", c.to_toml()), Progress(quiet=True), threading.Event())


# ---- truncated draws ---------------------------------------------------------------------------------------


def test_truncated_draws_are_trained_by_what_they_were_drawn_from(whole: Path, tmp_path: Path) -> None:
    """top_p = 0.8: at the same weights the log-ratio is exactly 0 in every step, and a resumed run is the
    same run.
    """
    from duologue.kernels import backend

    c = config("dialogue.top_p=0.8")
    run_whole(tmp_path / "whole", "dialogue.top_p=0.8")
    found = [
        row["mismatch"]
        for row in read_lines(tmp_path / "whole" / "metrics.jsonl")
        if row["stage"] == "selfplay"
    ]
    assert len(found) == 4
    assert all(value <= (0.0 if backend.available() else 1e-4) for value in found)
    assert read_lines(tmp_path / "whole" / "dialogues.jsonl") != read_lines(whole / "dialogues.jsonl")
    stop = threading.Event()

    class StopInSelfPlay(Progress):
        def update(self, step: int, metrics: Any) -> None:
            if metrics["stage"] == "selfplay":
                stop.set()

    run = RunDir.create(tmp_path / "run", c.to_toml())
    with pytest.raises(Interrupted):
        train(c, run, StopInSelfPlay(quiet=True), stop)
    run.close()
    train(c, RunDir.resume(tmp_path / "run", c.to_toml()), Progress(quiet=True), threading.Event())
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("max_tokens", [100_000, 150])
def test_gradient_of_truncated_draws_is_that_of_the_renormalised_softmax(max_tokens: int) -> None:
    """Against float64 autograd of the whole softmax cut to each token's support by hand, on dialogues that
    were really played.
    """
    import copy
    import random

    from duologue.grpo.build import build_arena, build_engine
    from duologue.grpo.rows import view_row

    c = config("dialogue.top_p=0.8")
    game = build_game(c)
    model, tokenizer = build_policy(c, build_corpus(c, game))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # far from uniform, so that supports are small
    arena = build_arena(c, build_engine(c, model), tokenizer, game)
    group = arena.play([game.sample(random.Random(0), "train")], group_size=3, seed=1)[0]
    rows: list[Row] = [
        view_row(d.views[role], ("utterance",), 0.5 - i - role / 3, i, role)
        for i, d in enumerate(group.dialogues)
        for role in (0, 1)
    ]
    assert all(row.supports is not None and len(row.supports.sizes) == len(row.token_ids) for row in rows)
    accumulate_policy_gradient(model, rows, LossConfig(), temperature=1.0, max_tokens=max_tokens)
    found = gradients(model)

    exact = copy.deepcopy(model).double()
    total = sum(row.n_trained for row in rows)
    supports = []
    for row in rows:
        assert row.supports is not None
        logits = exact(torch.tensor([row.token_ids]))[0].double()
        start, loss = 0, torch.zeros((), dtype=torch.float64)
        for t, (size, trained) in enumerate(zip(row.supports.sizes, row.loss_mask, strict=True)):
            support = row.supports.ids[start : start + size].tolist()
            start += size
            if trained:
                assert not support or row.token_ids[t] in support
                supports.append(len(support))
                z = logits[t - 1]
                logp = z[row.token_ids[t]] - z[support or slice(None)].logsumexp(0)
                assert float(logp.detach()) == pytest.approx(row.logprobs[t], abs=1e-4)
                loss = loss - row.advantage * torch.exp(logp - logp.detach()) / total
        torch.autograd.backward(loss)
    assert max(supports) > 1
    for a, b in zip(found, gradients(exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-6)


FREED_AND_TAKEN = """
import resource
import torch
from duologue.grpo.policy import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
keep_freed_memory()
faults()
print(default, min(faults() for _ in range(5)))  # a busy machine may take some away in between
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_large_tensors_take_the_pages_that_others_freed() -> None:
    ran = subprocess.run([sys.executable, "-c", FREED_AND_TAKEN], capture_output=True, text=True, check=True)
    by_default, kept = map(int, ran.stdout.split())
    assert kept * 20 < by_default, "the system cleared their pages again"
