"""What a policy has kept of its base's language: prompts, paired statistics, KL and perplexity, the command,
the end of a run.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from duologue.grpo.ability.distance import PLAIN, Passage, distance, passages
from duologue.grpo.ability.instructions import KINDS
from duologue.grpo.ability.measure import Subject, answers
from duologue.grpo.ability.paired import mcnemar, paired
from duologue.grpo.ability.prompts import Prompt, own_prompts, read_prompts
from duologue.grpo.cli import main
from duologue.grpo.world import World
from duologue.model.checkpoint import load_model
from duologue.rollout.engine.engine import Engine
from safetensors.torch import load_file, save_file
from tiny import TINY_DEAL, decoder

ROOT = Path(__file__).resolve().parent.parent
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
IDS = [[1, 5, 9, 2, 30, 7, 7, 12, 3], [4, 8, 15, 16, 23, 39]]


@pytest.fixture(scope="module")
def start(chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a template that a dialogue can be written in."""
    folder = Path(shutil.copytree(chat_checkpoint, tmp_path_factory.mktemp("start") / "model"))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def as_lines(prompts: list[Prompt]) -> str:
    """A file in IFEval's format."""
    rows = (
        {"key": p.key, "prompt": p.text, "instruction_id_list": p.kinds, "kwargs": p.given} for p in prompts
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---- prompts -----------------------------------------------------------------------------------------------


def test_our_prompts_have_every_kind_as_often_and_can_be_read_back(tmp_path: Path) -> None:
    prompts = own_prompts()
    assert len({p.text for p in prompts}) == len(prompts) == 150
    assert set(Counter(p.kinds[0] for p in prompts).values()) == {6}
    assert {p.kinds[0] for p in prompts} == {*KINDS}
    assert sum(len(p.kinds) > 1 for p in prompts) > 5
    (tmp_path / "prompts.jsonl").write_text(as_lines(prompts))
    again = read_prompts(tmp_path / "prompts.jsonl")
    assert [(p.key, p.text, p.kinds) for p in again] == [(p.key, p.text, p.kinds) for p in prompts]
    assert [p.text for p in own_prompts(10)] == [p.text for p in prompts[:10]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"key": 1}', "lacks 'prompt'"),
        ("[]", "line 2"),
        (
            '{"key": 1, "prompt": "x", "instruction_id_list": ["startend:rhyme"], "kwargs": [{}]}',
            "startend:rhyme",
        ),
        ('{"key": 1, "prompt": "x", "instruction_id_list": ["startend:quotation"], "kwargs": []}', "line 2"),
        (
            '{"key": 1, "prompt": null, "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}',
            "no text",
        ),
        ('{"key": 1, "prompt": "x", "instruction_id_list": [], "kwargs": []}', "one or more"),
        (
            '{"key": 1e400, "prompt": "x", "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}',
            "infin",
        ),
        ("[" * 99_999, "recursion"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(as_lines(own_prompts(1)) + line + "\n")
    with pytest.raises(ValueError, match="line 2") as error:
        read_prompts(path)
    assert message in str(error.value)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        read_prompts(path)


# ---- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 3), (2, 7), (8, 1), (0, 6)])
def test_mcnemar_is_the_share_of_sign_flips_that_are_as_uneven(gained: int, lost: int) -> None:
    n, uneven = gained + lost, abs(gained - lost)
    flips = [abs(sum(signs)) >= uneven for signs in itertools.product((1, -1), repeat=n)]
    assert mcnemar(gained, lost) == pytest.approx(sum(flips) / len(flips))


def test_mcnemar_of_many_pairs_stays_finite() -> None:
    assert mcnemar(3000, 3000) == 1
    assert 0 <= mcnemar(3000, 1000) < 1e-100


def test_a_paired_difference_is_of_the_prompts() -> None:
    rng = np.random.default_rng(0)
    before = (rng.random((200, 3)) < 0.4).astype(float)
    before[::2, 2] = np.nan
    after = np.where(rng.random((200, 3)) < 0.9, before, 1 - before)
    there, back = paired(before, after, 1), paired(after, before, 1)
    assert there.value == pytest.approx(np.nanmean(after) - np.nanmean(before))
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert (there.gained, there.lost, there.p_value) == (back.lost, back.gained, back.p_value)
    draws = np.random.default_rng(7).integers(0, 200, (2000, 200))  # a bootstrap of its own
    moved = [np.nanmean(after[rows]) - np.nanmean(before[rows]) for rows in draws]
    assert [there.low, there.high] == pytest.approx(np.percentile(moved, [2.5, 97.5]), abs=0.006)
    same = paired(before, before, 1)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


# ---- distance ----------------------------------------------------------------------------------------------


def test_kl_and_perplexity_are_those_of_whole_distributions() -> None:
    """Against torch's own cross entropy and KL, in float64 on the logits of both."""
    policy, base = decoder(0), decoder(1)
    with torch.no_grad():
        for model in (policy, base):
            model.head_weight.mul_(20)  # away from uniform
    texts = [Passage(token_ids=IDS[0], places=[2, 3, 8]), Passage(token_ids=IDS[1], places=[1, 2, 3, 4, 5])]
    found = distance(policy, base, texts)
    with torch.no_grad():
        logits = [
            torch.cat([model(torch.tensor([t.token_ids]))[0, [p - 1 for p in t.places]] for t in texts])
            for model in (policy, base)
        ]
    targets = torch.tensor([t.token_ids[p] for t in texts for p in t.places])
    ours, theirs = (x.double().log_softmax(-1) for x in logits)
    kl = torch.nn.functional.kl_div
    expected = {
        "nll": torch.nn.functional.nll_loss(ours, targets),
        "base_nll": torch.nn.functional.nll_loss(theirs, targets),
        "kl_base_policy": kl(ours, theirs, reduction="batchmean", log_target=True),
        "kl_policy_base": kl(theirs, ours, reduction="batchmean", log_target=True),
    }
    assert found.tokens == 8
    assert found.perplexity == pytest.approx(math.exp(expected["nll"]), rel=1e-5)
    for key, value in expected.items():
        assert value > 0.01
        assert getattr(found, key) == pytest.approx(float(value), rel=1e-4)


def test_a_model_is_at_no_distance_from_itself() -> None:
    model = decoder(0)
    found = distance(model, decoder(0), [Passage(token_ids=IDS[0], places=[1, 4])])
    assert (found.kl_base_policy, found.kl_policy_base) == (0, 0)
    assert found.nll == found.base_nll


def test_the_plain_text_goes_into_windows_whole(chat_checkpoint: Path) -> None:
    tokenizer = load_model(chat_checkpoint)[1]
    text = PLAIN.read_text("utf-8")
    assert 15_000 < len(text.encode()) < 25_000
    assert text.isascii() or "é" in text
    parts = passages(tokenizer, text[:2000], 100)
    assert [i for part in parts for i in part.token_ids] == tokenizer.encode(text[:2000])
    assert all(part.places == [*range(1, len(part.token_ids))] for part in parts)
    assert max(len(part.token_ids) for part in parts) == 100


# ---- answers -----------------------------------------------------------------------------------------------


def test_answers_are_greedy_and_do_not_depend_on_the_batch(start: Path) -> None:
    model, tokenizer = load_model(start)
    one = Subject(engine=Engine(model, cache_tokens=8192), tokenizer=tokenizer)
    prompts = own_prompts(6)
    together = answers(one, prompts, 5, 10_000)
    assert together == [answers(one, [prompt], 5, 10_000)[0] for prompt in prompts]
    ids = tokenizer.turn_chat.question(tokenizer.encode(prompts[0].text))
    start = len(ids)
    while len(ids) < start + 5 and ids[-1] not in tokenizer.turn_chat.stop_token_ids:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert together[0] == tokenizer.decode(ids[start:])
    longest = max(len(tokenizer.encode(p.text)) for p in prompts)
    assert None in answers(one, prompts, 5, longest)


class OutOfOrder(World):
    """Hands out the last first, two at a time, as ranks that take turns at a queue may."""

    def hand_out(self, expected: Sequence[float]) -> Iterator[Sequence[int]]:
        numbers = [*range(len(expected))][::-1]
        self.dealt = numbers
        yield from (numbers[start : start + 2] for start in range(0, len(numbers), 2))

    def gather(self, items: Sequence[Any]) -> Sequence[Any]:
        return [items[self.dealt.index(number)] for number in range(len(items))]


def test_who_measures_what_does_not_matter(start: Path) -> None:
    model, tokenizer = load_model(start)
    one = Subject(engine=Engine(model, cache_tokens=8192), tokenizer=tokenizer)
    prompts = own_prompts(5)
    assert answers(one, prompts, 4, 10_000, OutOfOrder()) == answers(one, prompts, 4, 10_000)
    texts = [Passage(token_ids=ids, places=[1, 2, 3]) for ids in (*IDS, IDS[0][::-1])]
    assert distance(decoder(0), decoder(1), texts, OutOfOrder()) == distance(decoder(0), decoder(1), texts)


# ---- the command and the end of a run ----------------------------------------------------------------------

FEW = ["eval.ability_prompts=25", "eval.ability_tokens=8", "eval.dialogues=2", "rollout.cache_tokens=16384"]
TALK = ["dialogue.max_rounds=1", "dialogue.max_tokens_per_turn=4", "dialogue.max_tokens_final=80"]


@pytest.fixture(scope="module")
def moved(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with other weights in one matrix."""
    folder = Path(shutil.copytree(start, tmp_path_factory.mktemp("moved") / "copy"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    weights[name] = (weights[name].float() + noise).to(weights[name].dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def evaluated(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main(["eval", *words, "--ability", "--json", str(out), *FEW, *TALK]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_checkpoint_against_itself_has_lost_nothing(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(tmp_path, str(start), "--against", str(start), "--recipe", "deal")
    for part in ("plain_text", "dialogues"):
        row = found[part]
        assert row["tokens"] > 4
        assert (row["kl_base_policy"], row["kl_policy_base"], row["perplexity_change"]) == (0, 0, 0)
    for level in ("strict_prompt", "strict_instruction", "loose_prompt", "loose_instruction"):
        row = found[level]
        assert (row["value"], row["low"], row["high"], row["gained"], row["lost"]) == (0, 0, 0, 0, 0)
    assert "(+0.0, [0.0, 0.0]), perplexity +0.0 %, KL 0.00" in found["line"]
    shown = capsys.readouterr()
    assert found["line"] in shown.out
    assert [line for line in shown.err.splitlines() if line.endswith("answers")] == [
        f"{name}: {found['asked']} of {found['asked']} answers" for name in ("base", "policy")
    ]


def test_what_was_measured_is_a_row_of_the_results(
    start: Path, moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import common, language

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    found = evaluated(tmp_path, str(moved), "--against", str(start), "--recipe", "deal")
    assert language.main(["out.json"]) == 2
    assert language.main([f"moved, by hand={tmp_path / 'out.json'}"]) == 0
    with open(tmp_path / "language.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["policy"], row["prompts"]) == ("moved, by hand", str(found["asked"]))
    assert float(row["kl_base_policy_talk"]) == round(found["dialogues"]["kl_base_policy"], 4) > 0
    assert float(row["difference"]) == round(found["strict_prompt"]["value"], 4)


def test_another_checkpoint_is_at_a_distance(start: Path, moved: Path, tmp_path: Path) -> None:
    """With prompts from a file, alone and against its base, whose tokenizer must be the same."""
    (tmp_path / "p.jsonl").write_text(as_lines(own_prompts(8)))
    asked = ["--ifeval", str(tmp_path / "p.jsonl")]
    found = evaluated(tmp_path, str(moved), "--against", str(start), *asked)
    text = found["plain_text"]
    assert text["kl_base_policy"] > 0
    assert text["kl_policy_base"] > 0
    assert text["perplexity_change"] == pytest.approx(text["perplexity"] / text["base_perplexity"] - 1)
    assert "dialogues" not in found  # no game was named
    assert found["prompts"] == "p.jsonl"
    assert [row["key"] for row in found["answers"]] == [*range(8)]
    assert all({"base", "policy"} < {*row} for row in found["answers"])
    assert found["line"].startswith("language: IFEval strict ")
    alone = evaluated(tmp_path, str(moved), *asked)
    assert alone["plain_text"]["perplexity"] == text["perplexity"]
    assert alone["strict_prompt"] == {"after": found["strict_prompt"]["after"]}
    assert "no base" in alone["line"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CHECKPOINT"], "--recipe RECIPE"),
        (["CHECKPOINT", "--recipe", "deal", "--ifeval", "f"], "no --ifeval"),
        (["CHECKPOINT", "CHECKPOINT", "--ability"], "one checkpoint"),
        (["CHECKPOINT", "--ability", "--ifeval", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_eval_does_not_take_is_refused(
    words: list[str], message: str, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(start) if word == "CHECKPOINT" else word for word in words]
    assert main(["eval", *argv]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def trained(start: Path, run: Path, *more: str) -> int:
    """The exit code of a run from `start` with no step in it."""
    tiny = [word for word in TINY_DEAL if not word.startswith(("model.", "eval.", "imitation.", "dialogue."))]
    words = [*tiny, *FEW, *TALK, "eval.partners=[]", "imitation.steps=0", "grpo.imitation_coef=0"]
    train = ["train", "deal", "--model", str(start), "--run-dir", str(run)]
    return main([*train, *words, "train.steps=0", *more])


def test_a_run_refuses_prompts_that_are_not_there_before_it_trains(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained(start, tmp_path / "run", "eval.ifeval=nowhere.jsonl") == 2
    assert "eval.ifeval = 'nowhere.jsonl': accepted is a .jsonl file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_from_a_checkpoint_says_what_it_has_kept(rank: int, start: Path, tmp_path: Path) -> None:
    """At its end, and again from its directory: the base is what it began from, the adapter's frozen weights
    among them.
    """
    run = tmp_path / "run"
    assert trained(start, run, f"lora.rank={rank}") == 0
    summary = json.loads((run / "summary.json").read_text())["ability"]
    assert summary["plain_text"]["kl_base_policy"] == summary["dialogues"]["kl_base_policy"] == 0
    assert summary["line"] in (run / "report.html").read_text().replace("&gt;", ">")
    again = tmp_path / "again.json"
    assert main(["eval", str(run), "--ability", "--json", str(again)]) == 0
    found = json.loads(again.read_text())
    assert {key: found[key] for key in summary} == summary
