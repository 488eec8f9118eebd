"""What is recorded of tokens, and the page of `duologue inspect` as data: its numbers are the run's, bit for
bit. What the page does in a browser is in test_inspect_page.py.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from duologue.grpo.cli import main
from duologue.grpo.run_dir import read_lines
from duologue.model.tokenizer import Tokenizer
from safetensors.torch import load_file
from tiny import TINY_DEAL

TALK = ["dialogue.top_p=0.9", "dialogue.final_top_p=1"]


def run_deal(path: Path, *more: str) -> Path:
    assert main(["train", "deal", *TINY_DEAL, *TALK, *more, "--run-dir", str(path)]) == 0
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
                sizes = turn.get("support_sizes", [np.nan] * n)
                assert np.array_equal(sizes, supports, equal_nan=True)
            else:
                assert np.isnan(entropies).all()
            said = [pieces[int(piece)] for piece in by_name["piece"][at : at + n]]
            assert [i for i, _ in said] == turn["token_ids"]
            assert "".join(text for _, text in said) == tokenizer.decode(turn["token_ids"])
            at += n
