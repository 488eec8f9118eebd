"""A real checkpoint deliberates on dilemmas and learns from a judge: the held-out score before and after.

    python -m bench.collective MODEL_DIR RUN_DIR [--judge policy|words] [--save] [KEY=VALUE ...]

The recipe `collective-agency` at the size of a small model on a CPU: 20 steps of 16 short dialogues, 64
held-out tasks. `policy` is the judge in this process, the weights that the run started from; its answer is
expected digits. `words` is a server whose answers are known: two who have spoken agree, and an aspect's score
is how many of its words (WORDS) the resolution has, 5 at most. Intervals are 95 % of the bootstrap over
tasks, of the difference paired.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from duologue.grpo.cli import main as duologue
from duologue.grpo.commands.compare import bootstrap, mean
from duologue.grpo.run_dir import read_lines
from duologue.rollout.games.game import UNSCORED

from bench import chaos_judge
from bench.common import append_rows

WORDS = {
    "knowledge": {"ask", "know", "learn", "listen", "understand", "explain", "hear", "find"},
    "benevolence": {"help", "care", "safe", "kind", "share", "support", "need", "friend"},
    "power": {"can", "choose", "decide", "plan", "agree", "work", "make", "able"},
    "vitality": {"we", "both", "together", "us", "our", "new", "grow", "everyone"},
}
RUN = {
    "dialogue.max_rounds": 3,
    "dialogue.max_tokens_per_turn": 48,
    "dialogue.max_tokens_final": 80,
    "grpo.group_size": 4,
    "grpo.groups_per_step": 4,
    "grpo.learning_rate": 2e-5,
    "train.steps": 20,
    "train.save_every": 10,
    "eval.dialogues": 64,
    "eval.ability": "false",
    "rollout.cache_tokens": 32768,
}


def answer(prompt: str) -> dict[str, Any]:
    """Of the judge `words`."""
    completion = re.search("<completion>(.*?)</completion>", prompt, re.DOTALL)
    if completion is None:
        return chaos_judge.answer(prompt)
    said = {*re.findall("[a-z]+", html.unescape(completion[1]).lower())}
    return {**{aspect: min(5, len(said & words)) for aspect, words in WORDS.items()}, "reason": "counted"}


class Handler(chaos_judge.Handler):
    answer = staticmethod(answer)


@contextlib.contextmanager
def judge(name: str) -> Iterator[list[str]]:
    """The settings of that judge, while it answers."""
    if name == "policy":
        yield ["judge.backend=policy", "judge.readings=2"]
        return
    server = chaos_judge.Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield [f"judge.url=http://127.0.0.1:{server.server_address[1]}/v1"]
    finally:
        server.shutdown()
        server.server_close()


def measures(run: Path) -> dict[str, Any]:
    """Of the held-out dialogues of both policies of a finished run."""
    held = [d for d in read_lines(run / "dialogues.jsonl") if d["stage"] == "eval"]
    row: dict[str, Any] = {}
    scores: dict[str, np.ndarray] = {}
    for policy in ("warm_start", "trained"):
        outcomes = [d["outcome"] for d in held if d["policy"] == policy]
        scores[policy] = np.array([np.nan if o["failure"] == UNSCORED else o["scores"][0] for o in outcomes])
        row |= {f"{policy}_score": mean(scores[policy])}
        row |= _bounds(policy, scores[policy])
        row[f"{policy}_agreement"] = mean(np.array([float(o["agreed"]) for o in outcomes]))
        row[f"{policy}_rounds"] = mean(np.array([o["rounds"] for o in outcomes if o["agreed"]], dtype=float))
        row[f"{policy}_unscored"] = float(np.isnan(scores[policy]).sum())
    gain = scores["trained"] - scores["warm_start"]
    return {**row, "gain": mean(gain), **_bounds("gain", gain)}


def _bounds(name: str, values: np.ndarray) -> dict[str, Any]:
    found = bootstrap(mean, values, 0)
    return {f"{name}_{end}": np.nan if found[end] is None else found[end] for end in ("low", "high")}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("run", type=Path, help="its directory")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--measured", action="store_true", help="the run is there and has ended: measure it")
    parser.add_argument("--judge", choices=["policy", "words"], default="policy")
    parser.add_argument("--save", action="store_true", help="append to bench/results/collective.csv")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(argv)
    settings = RUN | dict(given.split("=", 1) for given in args.settings)
    said = [f"{key}={value}" for key, value in settings.items()]
    if not args.measured:
        with judge(args.judge) as backend:
            command = ["train", "collective-agency", f"model.path={args.model}", *backend, *said]
            if status := duologue([*command, "--run-dir", str(args.run), *["--resume"] * args.resume]):
                return status
    summary = json.loads((args.run / "summary.json").read_text("utf-8"))
    row: dict[str, Any] = {"judge": args.judge, "seed": summary["seed"], "steps": summary["steps"]}
    row |= {"dialogues": int(summary["trained"]["dialogues"]), "seconds": round(summary["train_seconds"])}
    row |= {name: round(value, 4) for name, value in measures(args.run).items()}
    if args.save:
        append_rows("collective", [row])
    print(json.dumps({"bench": "collective", **row}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
