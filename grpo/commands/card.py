"""The README.md of an export: what it began with, how it was trained and fares, and how to load it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duologue.grpo.checkpoints import latest_checkpoint
from duologue.grpo.config import Config, load_config
from duologue.grpo.console import COUNT, UNKNOWN, formatted
from duologue.grpo.unsaid import run_of
from duologue.model.files import read_json
from duologue.model.hub import is_name, split
from duologue.rollout.games.catalogue import kind_of
from duologue.rollout.games.game import Measure

TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({folder!r})
"""
PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r}, {revision}dtype="auto")
model = PeftModel.from_pretrained(base, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
"""
VLLM = "vllm serve {folder}\n"
VLLM_LORA = "vllm serve {base} {options}--enable-lora --lora-modules policy={folder}\n"
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank accepts from its default on


def card(source: Path, out: Path, adapter_of: str = "") -> str:
    """Of the checkpoint `source`, which is exported to `out`; `adapter_of` is the base of an adapter that is
    not merged. Figures are those of summary.json, where the checkpoint is the one that they are of.
    """
    path = run_of(source)
    config = load_config(str(path)) if path else None
    place = adapter_of or (config.model.path if config else "")
    base, commit = split(place)
    parts = [
        _front_matter(base, bool(adapter_of)),
        f"# {out.name}",
        _origin(config, base, commit, bool(adapter_of)),
    ]
    if path is not None and config is not None:
        parts += _figures(path.parent, source, config)
    load, serve = (PEFT, VLLM_LORA) if adapter_of else (TRANSFORMERS, VLLM)
    revision = f"revision={commit!r}, " if commit else ""
    python = load.format(folder=out.name, base=base, revision=revision)
    options = _vllm_options(commit, config.lora.rank if config else 0)
    shell = serve.format(folder=shlex.quote(out.name), base=shlex.quote(base), options=options)
    parts += ["## How to load it", _block("python", python), _block("sh", shell)]
    return "\n\n".join(parts) + "\n"


def _vllm_options(commit: str, rank: int) -> str:
    """For an adapter of this rank on a base of this commit."""
    room = next((n for n in VLLM_RANKS if n >= rank), VLLM_RANKS[-1])
    options = [f"--revision {commit}"] if commit else []
    options += [f"--max-lora-rank {room}"] if room > VLLM_RANKS[0] else []
    return "".join(f"{option} " for option in options)


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}```"


def _front_matter(base: str, adapter: bool) -> str:
    lines = [f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    if is_name(base):  # what the Hub knows
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "tags:", "- duologue", "---"])


def _origin(config: Config | None, base: str, commit: str, adapter: bool) -> str:
    began = f"began with `{base}`" if base else "began from random weights"
    began += f" (commit {commit})" if commit else ""
    what = "An adapter" if adapter else "A language model"
    if config is None:
        return f"{what} as duologue exported it."
    c = config
    how = f"{c.imitation.steps} steps of imitation and {c.train.steps} of self-play (GRPO, {c.grpo.loss})"
    partner = c.opponent.kind if c.opponent.kind != "mix" else f"a mix of {', '.join(c.opponent.parts)}"
    trained = f"an adapter of rank {c.lora.rank} was trained" if c.lora.rank else "all weights were trained"
    return (
        f"{what} that negotiates, trained by duologue in the game `{c.game.name}`. It {began}; {how} were "
        f"planned, in {c.model.dtype}, with {partner} as the other side, from seed {c.train.seed}; {trained}."
    )


def _figures(run: Path, source: Path, config: Config) -> list[str]:
    """The tables at the run's end, if this is the checkpoint that stood there."""
    summary = read_json(run / "summary.json")
    last = latest_checkpoint(run)
    if not summary or last is None or last.resolve() != source.resolve():
        return []
    columns = {"warm start": summary.get("warm_start"), "trained": summary["trained"]}
    held = {name: column for name, column in columns.items() if column}
    kind = kind_of(config.game)
    measures = {**kind.measures_among(dict.fromkeys(k for c in held.values() for k in c)), **COUNT}
    e = config.eval
    how = "greedy" if e.temperature == 0 else f"sampled at temperature {e.temperature:g}"
    parts = ["## How it fares", f"With its own copy; {e.split} dialogues, {how}:", _table(held, measures)]
    if partners := summary.get("partners"):
        shown = {f"with {name}": of["trained"] for name, of in partners.items()}
        columns = {name: {key: one["value"] for key, one in row.items()} for name, row in shown.items()}
        parts += ["With each partner, in both seats:", _table(columns, kind.compared)]
    if line := summary.get("ability", {}).get("line", ""):
        parts += ["## What it kept", str(line)]
    return parts


def _table(columns: Mapping[str, Any], measures: Mapping[str, Measure]) -> str:
    """A row for each measure that all columns have."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key, measure in measures.items():
        if all(key in column for column in columns.values()):
            cells = [formatted(measure.format, column[key]) for column in columns.values()]
            lines.append(f"| {measure.heading} | {' | '.join(cell or UNKNOWN for cell in cells)} |")
    return "\n".join(lines)
