"""What the pages of a run are made of: its configuration, its tokenizer, its records, the templates."""

from __future__ import annotations

import functools
import math
import tomllib
from pathlib import Path
from typing import Any

import jinja2
from duologue.grpo.checkpoints import DAMAGED
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.games.texts import read_text

UNLIKE_A_RUN = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, jinja2.TemplateError)
Record = dict[str, Any]  # of JSON or TOML


def config_text(run_dir: Path) -> tuple[str, Record]:
    """A run's configuration, as it is written and read; ValueError where there is no run."""
    path = run_dir / "config.toml"
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no run: it has no config.toml")
    try:
        toml = read_text(path)
        return toml, tomllib.loads(toml)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def any_tokenizer(run_dir: Path) -> Tokenizer | None:
    """Any checkpoint's, for they share it; of one that was set aside as damaged, none."""
    files = sorted(run_dir.glob("checkpoints/[!.]*/tokenizer.json"))
    whole = [file.parent for file in files if not file.parent.name.startswith(DAMAGED)]
    return Tokenizer.from_dir(whole[0]) if whole else None


def with_numbers(record: Record) -> Record:
    """A record whose null scores, measures and rewards are NaN, which can be formatted."""

    def number(value: Any) -> Any:
        return math.nan if value is None else value

    outcome = dict(record["outcome"] or {})
    if "scores" in outcome:
        outcome["scores"] = [number(value) for value in outcome["scores"] or (None, None)]
    if "metrics" in outcome:
        outcome["metrics"] = {key: number(value) for key, value in (outcome["metrics"] or {}).items()}
    reward = record["reward"] and [number(value) for value in record["reward"]]
    return {**record, "outcome": outcome or None, "reward": reward}


def unlike_a_run(run_dir: Path, error: Exception) -> ValueError:
    """The error of lines that were altered. No step is computed from them."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    way = "no step is computed from such a line of metrics.jsonl or dialogues.jsonl: it may be removed"
    lines = f"{run_dir} holds lines that are no run's, or were altered ({what})"
    return ValueError(f"{lines}; {way}")


@functools.cache
def template(name: str) -> jinja2.Template:
    """A page; all text that goes into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
