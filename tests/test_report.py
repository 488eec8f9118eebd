"""The report of a run that looks like a real one: its numbers, its dialogues, and that no text of a run
becomes markup.
"""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from duologue.grpo.commands.charts import HEIGHT, WIDTH, chart, short, ticks
from duologue.grpo.commands.partners import table
from duologue.grpo.commands.report import _pieces, write_report
from duologue.grpo.config import load_config
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.games.catalogue import corpus
from duologue.rollout.games.deal import DealGame
from duologue.rollout.games.scripted import ScriptedDialogue

IMITATION, SELFPLAY = 60, 40
HOSTILE = "<script>alert('1')</script> & \"quoted\""


def record(
    d: ScriptedDialogue, game: DealGame, tokenizer: Tokenizer, rng: random.Random, **extra: Any
) -> dict[str, Any]:
    """A scripted dialogue as the trainer would have recorded it of a policy."""
    turns = []
    for side, text, kind in d.turns:
        ids = [*tokenizer.encode(text), tokenizer.chat.end_token_id]
        logprobs = [-rng.expovariate(1.2) if rng.random() < 0.4 else -rng.random() * 0.1 for _ in ids]
        turns.append({"role": side, "kind": kind, "text": text, "token_ids": ids, "logprobs": logprobs})
    s, o = d.scenario, d.outcome
    return {
        **extra,
        "scenario": {"game": s.game, "id": s.id, "split": "heldout", "private": list(s.private_text)},
        "personas": [],
        "turns": turns,
        "outcome": {"agreed": o.agreed, "scores": list(o.scores), "failure": o.failure, "metrics": o.metrics},
        "reward": list(game.rewards(s, o)),
        "advantage": None,
        "weights_version": 0,
    }


def metrics_rows(rng: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(IMITATION):
        loss = 3.5 * math.exp(-i / 12) + 0.5 + rng.gauss(0, 0.03)
        rows.append({"step": i, "stage": "imitation", "loss": loss, "seconds": 0.4, "peak_memory_bytes": 7e8})
    for i in range(SELFPLAY):
        share = 1 - math.exp(-i / 12)
        rows.append(
            {
                "step": IMITATION + i,
                "stage": "selfplay",
                "reward": 0.75 + 0.2 * share + rng.gauss(0, 0.01),
                "joint_ratio": 0.85 + 0.12 * share,
                "agreement": 0.88 + 0.1 * share + rng.gauss(0, 0.01),
                "pareto": 0.5 + 0.35 * share + rng.gauss(0, 0.03),
                "entropy": 0.9 - 0.5 * share,
                "mismatch": 0.0,
                "kl_start": 0.3 * share if i % 10 == 0 else None,
                "rollout_tokens_per_s": 11_000 + rng.gauss(0, 300),
                "update_tokens_per_s": 6_000 + rng.gauss(0, 200),
                "grad_norm": 0.5 + rng.random() * 0.2,
                "clip_share": 0.01,
                "no_variance_share": 0.1 + 0.3 * share,
                "loss": 0.0,
                "seconds": 5.0,
                "peak_memory_bytes": 9e8,
            }
        )
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def make_run(path: Path) -> Path:
    """A whole run directory of plausible numbers; scripted dialogues stand in for the two policies'."""
    rng, game = random.Random(0), DealGame()
    scripts = corpus(game, 900, 3)
    texts = [
        text for d in scripts[:300] for text in (*d.scenario.private_text, *(text for _, text, _ in d.turns))
    ]
    tokenizer = train_tokenizer(texts, 400)
    before = scripts[:40]
    other = {d.scenario.id: d for d in scripts[40:] if d.outcome.agreed}
    after = [other.get(d.scenario.id, d) for d in before]
    rows = [
        record(d, game, tokenizer, rng, step=IMITATION, stage="eval", policy="warm_start") for d in before
    ]
    rows += [record(d, game, tokenizer, rng, step=IMITATION + 9, stage="selfplay") for d in scripts[40:60]]
    rows += [
        record(d, game, tokenizer, rng, step=IMITATION + SELFPLAY, stage="eval", policy="trained")
        for d in after
    ]
    (path / "checkpoints" / "warm_start").mkdir(parents=True)
    tokenizer.save(path / "checkpoints" / "warm_start")
    (path / "config.toml").write_text(load_config("deal").to_toml(), "utf-8")
    write_lines(path / "metrics.jsonl", metrics_rows(rng))
    write_lines(path / "dialogues.jsonl", rows)
    summary = {
        "warm_start": DealGame().summarise([d.outcome for d in before]),
        "trained": DealGame().summarise([d.outcome for d in after]),
        "train_seconds": 224.0,
        "seed": 0,
        "parameters": 1_234_567,
    }
    (path / "summary.json").write_text(json.dumps(summary), "utf-8")
    return path


class Page(HTMLParser):
    """Which elements there are, which attributes load something, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.classes: dict[str, int] = {}
        self.loads: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for key, value in attrs:
            if key in ("src", "href", "srcset", "data", "action"):
                self.loads.append(value or "")
            if key == "title":
                self.titles.append(value or "")
            if key == "class":
                for name in (value or "").split():
                    self.classes[name] = self.classes.get(name, 0) + 1

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("deal-seed0"))


def report(path: Path) -> tuple[Page, str]:
    html = write_report(path).read_text("utf-8")
    return Page(html), html


def test_it_needs_nothing_else(run: Path) -> None:
    page, html = report(run)
    assert page.loads == []
    assert "script" not in page.tags
    assert "@import" not in html
    assert "url(" not in html
    assert len(html) < 1_000_000


def test_the_numbers_are_those_of_the_summary(run: Path) -> None:
    page, _ = report(run)
    summary = json.loads((run / "summary.json").read_text())
    for key in ("agreement", "pareto"):
        for policy in ("warm_start", "trained"):
            assert f"{summary[policy][key]:.1%}" in page.text
        assert f"{100 * (summary['trained'][key] - summary['warm_start'][key]):+.1f} points" in page.text
    assert "3 min 44 s" in page.text
    assert "1.23 M" in page.text
    assert f"{IMITATION} imitation, {SELFPLAY} self-play" in page.text


def test_a_curve_for_every_metric_that_was_measured(run: Path) -> None:
    page, html = report(run)
    assert page.tags["svg"] == 9
    assert "step 75: agreed" in html


def test_the_dialogues_show_both_private_sides_the_words_and_the_outcome(run: Path) -> None:
    page, _ = report(run)
    rows = [json.loads(line) for line in (run / "dialogues.jsonl").read_text().splitlines()]
    shown = [r for r in rows if r.get("policy") == "warm_start"][:12]
    assert len(shown) == 12
    for r in shown:
        assert all(text in page.text for text in r["scenario"]["private"])
        assert all(turn["text"] in page.text.replace("⏎", "") for turn in r["turns"])
        if r["outcome"]["agreed"]:
            assert "deal, {:g} and {:g} points".format(*r["outcome"]["scores"]) in page.text
    tokens = sum(len(t["token_ids"]) for r in rows if r["stage"] == "eval" for t in r["turns"])
    titles = [t for t in page.titles if t.startswith("log p")]
    assert 0.3 * tokens <= len(titles) <= tokens  # 12 and a few failed ones, of 40
    first = shown[0]["turns"][0]["logprobs"][0]
    assert titles[0] == f"log p {first:.3f}, p {math.exp(first):.1%}"


def test_tokens_that_split_a_character_show_it_once() -> None:
    tokenizer = train_tokenizer(["plain words"], 300)
    ids = tokenizer.encode("café ☕ déjà")
    pieces = _pieces({"token_ids": ids, "logprobs": [-1.0] * len(ids)}, tokenizer)
    assert "".join(text for text, _, _ in pieces) == "café ☕ déjà"
    assert len(pieces) == len(ids) > len("café ☕ déjà")


def test_failed_deals_are_counted_by_kind(run: Path) -> None:
    page, _ = report(run)
    assert "both took the same item" in page.text
    assert page.classes["failed"] >= 1


def test_text_of_a_run_never_becomes_markup(run: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (run / "dialogues.jsonl").read_text().splitlines()]
    rows[0]["turns"][0] |= {"text": HOSTILE, "logprobs": None}
    rows[0]["scenario"]["private"][0] = HOSTILE
    rows[0]["outcome"] |= {"agreed": False, "failure": HOSTILE}
    write_lines(tmp_path / "dialogues.jsonl", rows)
    (tmp_path / "config.toml").write_text(load_config("deal").to_toml() + f"# {HOSTILE}\n")
    page, _ = report(tmp_path)
    assert page.text.count(HOSTILE) == 4
    assert "script" not in page.tags


def test_an_unfinished_run_shows_what_it_has(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes((run / "config.toml").read_bytes())
    page, _ = report(tmp_path)  # just started
    assert "not finished" in page.text
    assert "svg" not in page.tags

    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(metrics[:70]) + metrics[70][:20]
    )  # killed in the midst of a line
    page, _ = report(tmp_path)
    assert f"{IMITATION} imitation, 10 self-play" in page.text

    rows = [json.loads(line) for line in (run / "dialogues.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "dialogues.jsonl", [r for r in rows if r["stage"] == "selfplay"])
    page, _ = report(tmp_path)
    assert "The latest of self-play" in page.text
    assert page.classes["row"] == 12

    state = tmp_path / "checkpoints" / "step_000065"
    state.mkdir(parents=True)
    warm = json.loads((run / "summary.json").read_text())["warm_start"]
    (state / "trainer_state.json").write_text(json.dumps({"warm_start": warm, "seconds": 1.0}))
    page, _ = report(tmp_path)
    assert f"{warm['joint_ratio']:.3f}" in page.text
    assert "change" not in page.text


def test_a_dilemma_is_shown_by_its_personas_its_resolution_and_the_judges_reason(tmp_path: Path) -> None:
    """And not in the words of a negotiation."""
    (tmp_path / "config.toml").write_text(load_config("collective-agency").to_toml())
    personas = [
        {"name": "Ada", "instructions": "spend little"},
        {"name": "Bo", "instructions": "buy well"},
    ]
    said = [(0, "utterance", "mend it"), (1, "utterance", "buy new"), (0, "final", "mend it, then buy")]
    aspects = {"knowledge": 4.0, "benevolence": 3.0, "power": 2.0, "vitality": 5.0}
    scored = {"agreed": True, "scores": [3.5, 3.5], "failure": None, "metrics": aspects, "rounds": 2}
    failed = {"agreed": False, "scores": [0.0, 0.0], "failure": "no_agreement", "metrics": {}, "rounds": 3}
    rows = [
        {
            "step": 0,
            "stage": "selfplay",
            "scenario": {
                "game": "dilemma",
                "id": "d",
                "split": "train",
                "private": ["a", "b"],
                "shared": "pump?",
            },
            "personas": personas,
            "turns": [
                {"role": role, "kind": kind, "text": text, "token_ids": [1], "logprobs": None}
                for role, kind, text in said
            ],
            "outcome": outcome,
            "reward": outcome["scores"],
        }
        for outcome in ({**scored, "reason": "both give way"}, failed)
    ]
    write_lines(tmp_path / "dialogues.jsonl", rows)
    page, _ = report(tmp_path)
    for words in (
        "pump?",
        "Ada was told",
        "spend little",
        "Bo was told",
        "buy well",
        "Ada writes the resolution",
    ):
        assert words in page.text
    assert "agreed in round 2, the judge gives 3.5 of 5" in page.text
    assert "The judge: both give way" in page.text
    assert page.text.count("The judge:") == 1
    assert all(f"{aspect} {value:g}" in page.text for aspect, value in aspects.items())
    assert page.text.count("no agreement") == 1
    for words in ("side 1", "selects", "5 points", "0 points", "no deal"):
        assert words not in page.text


def test_a_folder_that_holds_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing-here holds no run"):
        write_report(tmp_path / "nothing-here")


def test_a_damaged_line_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes((run / "config.toml").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "stage": "imitation"}\n{"step": 1, \n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2"):
        write_report(tmp_path)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.5, 0.97), (3, 12_345), (-0.2, 0.1), (0, 3e-7)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 9
    assert low <= found[0]
    assert found[-1] <= high
    for a, b in pairwise(found):
        assert math.isclose(b - a, found[1] - found[0])
    step = f"{found[1] - found[0]:e}"
    assert step[0] in "125"
    assert set(step[2:8]) == {"0"}


def test_lines_stay_in_the_chart_and_keep_their_values() -> None:
    rows = [{"step": i, "x": math.sin(i), "y": None if i % 3 else 5.0} for i in range(1000)]
    drawn = chart("title", rows, {"x": "sine", "y": "constant"})
    assert drawn is not None
    for series in drawn.series:
        points = [tuple(map(float, p.split(","))) for p in series.raw[1:].split("L")]
        assert len(points) <= 160
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
        assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert drawn.series[1].last == "5"
    one = chart("title", rows[:1], {"y": "constant"})
    assert one is not None
    assert [label for _, label in one.y_ticks] == ["5"]
    assert chart("title", rows, {"z": "absent"}) is None


def test_short_numbers() -> None:
    assert [short(v) for v in (0, 0.25, 1234, 56_789, 3e-7)] == ["0", "0.25", "1,234", "57k", "3e-07"]
    assert [short(v, True) for v in (0, 0.025, 0.5, 1)] == ["0%", "2.5%", "50%", "100%"]


def test_elo_is_that_of_the_last_step_in_which_a_partner_was_met() -> None:
    payoff = {
        "dialogues": 1, "agreement": 1.0, "policy": 0.5, "opponent": 0.5, "policy_points": 5.0,
        "opponent_points": 5.0, "score": 0.5,
    }  # fmt: skip
    metrics = [
        {"step": step, "partners": {name: payoff}, "payoff": {}, "elo": {name: elo}}
        for step, (name, elo) in enumerate([("a", 1000.0), ("a", 1100.0), ("a", 1200.0), ("b", 900.0)])
    ]
    rows = dict(table(metrics)["rows"])
    assert "1200" in rows["a"]
    assert "900" in rows["b"]
