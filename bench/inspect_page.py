"""How soon the page of `duologue inspect` shows a run of many dialogues, in a real Chromium.

    python -m bench.inspect_page                  # 10,000 dialogues; a JSON line last
    python -m bench.inspect_page --dialogues 2000 --browser /usr/bin/chromium

The run is made up: scripted dialogues of the deal game as a policy's, with random numbers for each token.
Numbers that are random compress worse than those of a policy, so the page is as large as it gets.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from duologue.grpo.commands.inspector import write_page
from duologue.grpo.config import load_config
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.games.catalogue import corpus
from duologue.rollout.games.deal import DealGame
from duologue.rollout.games.scripted import ScriptedDialogue

GROUP, GROUPS = 8, 16  # dialogues of a group, groups of a step
FIRST_STEP = 40  # of self-play
SCRIPTS = 1000  # of which the dialogues are made


def make_run(path: Path, n: int, vocab: int = 500) -> Path:
    """A run directory with `n` dialogues of self-play that nobody trained."""
    rng, game = random.Random(0), DealGame()
    scripts = corpus(game, min(n, SCRIPTS), 3)
    texts = [text for d in scripts for text in (*d.scenario.private_text, *(text for _, text, _ in d.turns))]
    tokenizer = train_tokenizer(texts, vocab)
    folder = path / "checkpoints" / "warm_start"
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    config = load_config("deal", [f"grpo.group_size={GROUP}", "train.record_tokens=1"])
    (path / "config.toml").write_text(config.to_toml(), "utf-8")
    with open(path / "dialogues.jsonl", "w", encoding="utf-8") as file:
        for record in _records(scripts, game, tokenizer, n, rng):
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
    return path


def _records(
    scripts: list[ScriptedDialogue], game: DealGame, tokenizer: Tokenizer, n: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """The dialogues of a group have one scenario, here that of the first of them."""
    for i in range(n):
        step, scenario = FIRST_STEP + i // (GROUP * GROUPS), scripts[i // GROUP % len(scripts)].scenario
        script = scripts[i % len(scripts)]
        turns = [_turn(role, kind, text, tokenizer, rng) for role, text, kind in script.turns]
        outcome, reward = script.outcome, list(game.rewards(script.scenario, script.outcome))
        yield {
            "step": step,
            "stage": "selfplay",
            "scenario": {
                "game": "deal",
                "id": scenario.id,
                "split": "train",
                "private": list(scenario.private_text),
            },
            "personas": [],
            "turns": turns,
            "outcome": {
                "agreed": outcome.agreed,
                "scores": list(outcome.scores),
                "failure": outcome.failure,
                "metrics": outcome.metrics,
            },
            "reward": reward,
            "advantage": [rng.gauss(0, 1), rng.gauss(0, 1)],
            "weights_version": step,
            "players": ["policy", "policy"],
        }


def _turn(role: int, kind: str, text: str, tokenizer: Tokenizer, rng: random.Random) -> dict[str, Any]:
    ids = [*tokenizer.encode(text), tokenizer.chat.end_token_id]
    logprobs = [float(np.float32(-rng.expovariate(3.0))) for _ in ids]
    return {
        "role": role,
        "kind": kind,
        "text": text,
        "token_ids": ids,
        "logprobs": logprobs,
        "entropies": [float(f"{np.float32(rng.expovariate(2.0)):.9g}") for _ in ids],
        "support_sizes": [rng.randrange(40) for _ in ids],
    }


def measure(page: Path, browser: str, times: int) -> dict[str, float]:
    """Milliseconds, medians: until the first dialogue is shown (`open_ms`, of the page's own clock, from the
    navigation; `open_cpu_ms`, all threads of its process, which other programs do not lengthen), until one of
    the last part is, and until a filter by words that reads all parts is through.
    """
    from playwright.sync_api import sync_playwright

    names = ("open_ms", "open_cpu_ms", "far_ms", "filter_ms")
    found: dict[str, list[float]] = {name: [] for name in names}
    with sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for _ in range(times):
            tab = chromium.new_page()
            session = tab.context.new_cdp_session(tab)
            session.send("Performance.enable")
            tab.goto(page.resolve().as_uri(), wait_until="commit")
            tab.wait_for_selector("html[data-ready]", timeout=120_000)
            found["open_ms"].append(tab.evaluate("performance.getEntriesByName('ready')[0].startTime"))
            clocks = {row["name"]: row["value"] for row in session.send("Performance.getMetrics")["metrics"]}
            found["open_cpu_ms"].append(1e3 * clocks["ProcessTime"])
            began = time.perf_counter()
            tab.focus("#list")
            tab.keyboard.press("End")
            tab.wait_for_selector("#rows [aria-selected=true][aria-posinset='" + _last(tab) + "']")
            found["far_ms"].append(1e3 * (time.perf_counter() - began))
            began = time.perf_counter()
            tab.fill("#text", "honestly")
            tab.wait_for_selector("#count:has-text(' of ')")
            found["filter_ms"].append(1e3 * (time.perf_counter() - began))
            tab.close()
        chromium.close()
    return {name: statistics.median(values) for name, values in found.items()}


def _last(tab: Any) -> str:
    return str(tab.evaluate("document.querySelector('#rows .row').getAttribute('aria-setsize')"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dialogues", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome") or "")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run, page = Path(temporary) / "run", Path(temporary) / "page.html"
        make_run(run, options.dialogues)
        lines = run / "dialogues.jsonl"
        began = time.perf_counter()
        write_page(run, page)
        row: dict[str, Any] = {
            "dialogues": options.dialogues,
            "jsonl_mb": lines.stat().st_size / 1e6,
            "page_mb": page.stat().st_size / 1e6,
            "write_s": time.perf_counter() - began,
            **measure(page, options.browser, options.times),
        }
    for name, value in row.items():
        print(f"{name:>10}  {value:,.1f}")
    print(json.dumps({"bench": "inspect_page", **row}))


if __name__ == "__main__":
    main()
