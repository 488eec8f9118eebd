"""What is recorded of tokens, and the page of `duologue inspect` as data: its numbers are the run's, bit for
bit. What the page does in a browser is in test_inspect_page.py.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import threading
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.cli import main
from duologue.grpo.commands.inspected import Dialogues, Pieces, why_untrained
from duologue.grpo.commands.same_contexts import compare
from duologue.grpo.config import load_config
from duologue.grpo.console import Progress
from duologue.grpo.rows import grpo_rows
from duologue.grpo.run_dir import RunDir, read_lines
from duologue.grpo.trainer import Trainer
from duologue.model.checkpoint import load_model
from duologue.model.decoder import score
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.games.deal import DealGame
from safetensors.torch import load_file
from tiny import TINY, TINY_DEAL

SETTINGS = ["dialogue.top_p=0.9", "dialogue.final_top_p=1", "grpo.imitation_coef=0.5"]


def run_deal(path: Path, *more: str) -> Path:
    assert main(["train", "deal", *TINY_DEAL, *SETTINGS, *more, "--run-dir", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_deal(tmp_path_factory.mktemp("recorded") / "run", "train.record_tokens=2", "grpo.group_size=3")


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["inspect", str(run), "--out", str(path)]) == 0
    return path.read_text("utf-8")


def unpacked(page: str, name: str) -> bytes:
    found = re.search(rf'id="{name}">([A-Za-z0-9+/=]*)</script>', page)
    assert found is not None
    return gzip.decompress(base64.b64decode(found[1]))


def columns(page: str) -> tuple[list[Any], dict[str, np.ndarray]]:
    """The words and the columns of the only part."""
    places, words = json.loads(unpacked(page, "words-0"))
    data = unpacked(page, "numbers-0")
    total = words[-1]["start"] + sum(turn["n"] for turn in words[-1]["turns"])
    return words, {name: np.frombuffer(data, f"<f{width}", total, at) for name, (at, width) in places.items()}


def test_recording_tokens_changes_nothing_else(run: Path, tmp_path: Path) -> None:
    other = run_deal(tmp_path / "run", "grpo.group_size=3")
    plain, recorded = read_lines(other / "dialogues.jsonl"), read_lines(run / "dialogues.jsonl")
    by_step = {}
    for row in recorded:
        sampled = [turn for turn in row["turns"] if turn["logprobs"] is not None]
        by_step[row["step"], row["stage"]] = all("entropies" in turn for turn in sampled)
        for turn in sampled:
            turn.pop("entropies", None)
            turn.pop("support_sizes", None)
    assert plain == recorded
    assert by_step == {(2, "eval"): True, (2, "selfplay"): True, (3, "selfplay"): False, (4, "eval"): True}
    for name in ("warm_start", "step_000004"):
        weights = [load_file(path / "checkpoints" / name / "model.safetensors") for path in (other, run)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("every", [2, 1])
def test_a_killed_run_records_its_tokens_as_if_it_had_not_been(run: Path, tmp_path: Path, every: int) -> None:
    """Killed in the midst of a line after its last checkpoint; another setting holds from there on."""
    path = tmp_path / "run"
    shutil.copytree(run, path)
    shutil.rmtree(path / "checkpoints" / "step_000004")
    (path / "summary.json").unlink()
    with open(path / "dialogues.jsonl", "a") as file:
        file.write('{"step":4,"stage":"eval","turns":[{"entropies":[0.1')
    run_deal(path, f"train.record_tokens={every}", "grpo.group_size=3", "--resume")
    before, after = read_lines(run / "dialogues.jsonl"), read_lines(path / "dialogues.jsonl")
    for old, new in zip(before, after, strict=True):
        if every == 1 and (old["step"], old["stage"]) == (3, "selfplay"):
            assert all(len(turn.pop("entropies")) == len(turn["token_ids"]) for turn in new["turns"])
            for turn in new["turns"]:
                turn.pop("support_sizes", None)
        assert old == new


def test_the_page_has_the_recorded_numbers_of_every_token(run: Path, page: str) -> None:
    records = read_lines(run / "dialogues.jsonl")
    words, by_name = columns(page)
    tokenizer = Tokenizer.from_dir(run / "checkpoints" / "warm_start")
    pieces = json.loads(unpacked(page, "index"))["pieces"]
    assert len(words) == len(records)
    for record, own in zip(records, words, strict=True):
        at = own["start"]
        assert own["told"] == record["scenario"]["private"]
        for turn, shown in zip(record["turns"], own["turns"], strict=True):
            n = len(turn["token_ids"])
            assert (shown["text"], shown["n"]) == (turn["text"], n)
            assert by_name["logprob"][at : at + n].tolist() == turn["logprobs"]
            entropies = by_name["entropy"][at : at + n].astype(float)
            supports = by_name["support"][at : at + n].astype(float)
            if "entropies" in turn:
                assert [float(np.float32(x)) for x in turn["entropies"]] == entropies.tolist()
                sizes = turn.get("support_sizes", [0] * n)
                assert sizes == supports.tolist()
            else:
                assert np.isnan(entropies).all()
            said = [pieces[int(piece)] for piece in by_name["piece"][at : at + n]]
            assert [i for i, _ in said] == turn["token_ids"]
            assert "".join(text for _, text in said) == tokenizer.decode(turn["token_ids"])
            at += n


@pytest.mark.parametrize("greedy", [False, True])
def test_each_checkpoint_is_asked_how_likely_the_others_words_are(run: Path, greedy: bool) -> None:
    """The whole views through the other's training forward are the oracle."""
    names = {name: run / "checkpoints" / name for name in ("warm_start", "step_000004")}
    settings = ["dialogue.top_p=1", "eval.temperature=0.8"]
    held = compare(load_config(str(run / "config.toml"), settings), names, 3, greedy)
    for one, other in zip(held, reversed(held), strict=True):
        assert one.mismatch == 0.0
        model, _ = load_model(names[other.name], "cpu")
        for dialogue, values in zip(one.dialogues, one.other, strict=True):
            expected: list[list[float]] = [[], []]
            for role, view in zip(dialogue.view_roles, dialogue.views, strict=True):
                (logprobs,) = score(model, [view.token_ids], 1.0 if greedy else 0.8)
                marked = zip(view.kinds[1:], logprobs.tolist(), strict=True)
                expected[role] += [x for kind, x in marked if kind]
            sides = [iter(values_of_side) for values_of_side in expected]
            assert values == [next(sides[turn.role]) for turn in dialogue.turns for _ in turn.token_ids]
    first, second = ([d.scenario.id for d in each.dialogues] for each in held)
    assert first == second
    assert held[0].own != held[0].other


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_entropy_and_support_are_those_of_the_softmax(run: Path, top_p: float) -> None:
    """Sorted probabilities in float64 are the oracle."""
    names = {name: run / "checkpoints" / name for name in ("warm_start", "step_000004")}
    (one, _) = compare(load_config(str(run / "config.toml"), [f"dialogue.top_p={top_p}"]), names, 2, False)
    model, _ = load_model(names["warm_start"], "cpu")
    for d in one.dialogues:
        expected: list[list[torch.Tensor]] = [[], []]  # of each side's tokens, the likeliest first
        for role, view in zip(d.view_roles, d.views, strict=True):
            with torch.no_grad():
                p = model(torch.tensor([view.token_ids]))[0].double().softmax(-1).sort(descending=True)[0]
            expected[role] += [p[t - 1] for t, kind in enumerate(view.kinds) if kind]
        sides = [iter(rows) for rows in expected]
        for turn in d.turns:
            cut = top_p < 1 and turn.kind == "utterance"
            assert [size > 0 for size in turn.support_sizes] == [cut] * len(turn.token_ids)
            for entropy, size in zip(turn.entropies, turn.support_sizes, strict=True):
                p = next(sides[turn.role])
                if cut:
                    assert p[: size - 1].sum() < top_p + 1e-5
                    assert p[:size].sum() > top_p - 1e-5
                    p = p[:size] / p[:size].sum()
                assert entropy == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)


def test_draws_from_a_part_of_the_vocabulary_are_compared_over_that_part(run: Path, tmp_path: Path) -> None:
    """A checkpoint and its copy say the same and agree on its likelihood, to the bit."""
    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints" / "warm_start", copy)
    names = {"warm_start": run / "checkpoints" / "warm_start", "copy": copy}
    one, other = compare(load_config(str(run / "config.toml")), names, 3, greedy=False)
    assert one.own == one.other == other.own
    assert one.mismatch == 0.0
    assert any(size > 0 for d in one.dialogues for turn in d.turns for size in turn.support_sizes)


def test_the_page_shows_both_checkpoints_before_the_run(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    words = ["--checkpoints", "warm_start", "4", "--contexts", "2", "--step", "3", "--out", str(path)]
    assert main(["inspect", str(run), *words]) == 0
    index = json.loads(unpacked(path.read_text("utf-8"), "index"))["list"]
    of_run = [row for row in read_lines(run / "dialogues.jsonl") if row["step"] == 3]
    assert index["policy"] == ["warm_start"] * 2 + ["4"] * 2 + [""] * len(of_run)
    assert index["group"][:4] == [0, 1, 0, 1]
    _, by_name = columns(path.read_text("utf-8"))
    assert by_name["other"].dtype == by_name["logprob"].dtype == np.float32


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--step 99", "--step = 99: accepted are steps of"),
        ("--steps 50:60", "2 to 4"),
        ("--steps 4:2", "--steps = '4:2': accepted is A:B"),
        ("--steps some", "--steps = 'some': accepted is A:B"),
        ("--step 2 --steps 1:2", "accepted is one of them"),
        ("--greedy", "accepted with --checkpoints A B"),
        ("--checkpoints warm_start none", "none: accepted is a folder, or one of"),
        ("--checkpoints 4 4", "accepted are two that differ"),
        ("--checkpoints warm_start 4 --contexts 0", "--contexts = 0: accepted is 1 or more"),
        ("--checkpoints warm_start 4 --device tpu", 'model.device = "tpu"'),
    ],
)
def test_what_cannot_be_shown_is_named(
    run: Path, words: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    assert main(["inspect", str(run), "--out", str(path), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert not path.exists()


def test_a_folder_without_a_run_or_without_dialogues_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err
    shutil.copy(run / "config.toml", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "has no dialogues yet" in capsys.readouterr().err
    (tmp_path / "dialogues.jsonl").write_text('{"step": 1}\n')
    assert main(["inspect", str(tmp_path)]) == 2
    assert "lines that are no run's" in capsys.readouterr().err


def test_the_report_links_the_page_when_asked(run: Path, tmp_path: Path) -> None:
    for name in ("config.toml", "dialogues.jsonl", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert "inspect.html" not in (tmp_path / "report.html").read_text("utf-8")
    assert main(["report", str(tmp_path), "--inspect"]) == 0
    assert 'href="inspect.html"' in (tmp_path / "report.html").read_text("utf-8")
    assert len(columns((tmp_path / "inspect.html").read_text("utf-8"))[0]) == 20


def test_tokens_that_split_a_character_show_it_once() -> None:
    tokenizer = train_tokenizer(["plain words"], 300)
    ids = tokenizer.encode("café ☕ déjà")
    pieces = Pieces(tokenizer)
    shown = [pieces.table[place] for place in pieces.of(ids)]
    assert [i for i, _ in shown] == ids
    assert "".join(text for _, text in shown) == "café ☕ déjà"


@pytest.mark.parametrize("roles", ["both", "first"])
def test_the_page_marks_the_tokens_that_rows_mark(roles: str, tmp_path: Path) -> None:
    """The masks of rows are the oracle, beside opponents, untrained kinds and an unscored dialogue."""
    who = ["opponent.kind=mix", "opponent.mix={self = 0.5, scripted = 0.5}", "grpo.groups_per_step=4"]
    what = [f"grpo.train_roles={roles}", "grpo.train_kinds=['utterance']", "imitation.steps=0"]
    config = load_config("deal", [*TINY, *who, *what, "grpo.imitation_coef=0.5", "train.kl_every=0"])
    run = RunDir.create(tmp_path / "run", config.to_toml())
    trainer = Trainer(config, run, Progress(quiet=True), threading.Event())
    groups = trainer.play()
    dialogues = [d for group in groups for d in group.dialogues]
    dialogues[1].reward = None
    rows, _ = grpo_rows(groups, config.grpo, RunningBaseline())
    trained = Counter[tuple[int, int]]()
    for row in rows:
        trained[row.dialogue_id, row.role] += row.n_trained
    grpo = tomllib.loads(config.to_toml())["grpo"]
    marked = Counter[tuple[int, int]]()
    for i, d in enumerate(dialogues):
        record = d.record(step=0, stage="selfplay")
        for turn in record["turns"]:
            marked[i, turn["role"]] += len(turn["token_ids"]) * (why_untrained(record, turn, grpo) == "")
    assert +marked == +trained
    assert {name for d in dialogues for name in d.players} > {"policy"}


def test_dropped_groups_stand_apart(run: Path) -> None:
    (record, *_) = [row for row in read_lines(run / "dialogues.jsonl") if row["stage"] == "selfplay"]
    dialogues = Dialogues(DealGame, tomllib.loads((run / "config.toml").read_text()), None)
    for row in (record, record, record | {"dropped": True}):
        dialogues.add(row)
    index = json.loads(gzip.decompress(base64.b64decode(dialogues.index())))["list"]
    assert index["group"] == [0, 0, 1]
    assert index["dropped"] == [False, False, True]
