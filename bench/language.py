"""What negotiation training costs in language: append what `duologue eval CHECKPOINT --ability --json FILE`
measured to bench/results/language.csv, a row to a file; without talk of the base where that was not measured.

python bench/language.py NAME=FILE [NAME=FILE ...]    # NAME is what the row calls the policy
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.common import append_rows


def row(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Of strictly followed prompts, the plain text, and the base's own talk."""
    strict, text, talk = measured["strict_prompt"], measured["plain_text"], measured.get("dialogues", {})
    found = {
        "policy": name,
        "prompts": measured["asked"],
        "max_new_tokens": measured["max_new_tokens"],
        "strict_before": strict["before"],
        "strict_after": strict["after"],
        "difference": strict["value"],
        "low": strict["low"],
        "high": strict["high"],
        "perplexity_before": text["base_perplexity"],
        "perplexity_after": text["perplexity"],
        "kl_base_policy_text": text["kl_base_policy"],
        "kl_policy_base_text": text["kl_policy_base"],
        "kl_base_policy_talk": talk.get("kl_base_policy"),
        "kl_policy_base_talk": talk.get("kl_policy_base"),
    }
    return {
        key: round(value, 2 if key.startswith("perplexity") else 4) if isinstance(value, float) else value
        for key, value in found.items()
    }


def main(named: list[str]) -> int:
    if not named or not all("=" in one for one in named):
        print(__doc__)
        return 2
    pairs = [one.split("=", 1) for one in named]
    rows = [row(name, json.loads(Path(file).read_text("utf-8"))) for name, file in pairs]
    append_rows("language", rows)
    print(*rows, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
