"""`duologue config`: a configuration as TOML, each key with its value, its meaning and what is accepted."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from typing import Any

from duologue.grpo.config import Config
from duologue.grpo.settings import accepted_type, meant, to_toml
from duologue.model.settings import keys, limits
from duologue.rollout.games.catalogue import ACCEPTED

WIDTH = 110
COLUMN = 40  # where comments begin at the latest


def described(config: Config, section: str = "") -> str:
    """TOML that `load_config` reads back to an equal configuration; `section` alone where it is named."""
    sections = [field.name for field in dataclasses.fields(config)]
    if section and section not in sections:
        raise ValueError(f"unknown section [{section}]: {meant(section, sections)}")
    chosen = [section] if section else sections
    return "\n".join(_section(name, getattr(config, name)) for name in chosen)


def _section(name: str, values: Any) -> str:
    lines = [f"[{name}]", *_comment(inspect.getdoc(type(values)) or "", "")]
    settings = {
        field.name: f"{field.name} = {to_toml(getattr(values, field.name))}" for field in keys(values)
    }
    column = 2 + max((len(text) for text in settings.values() if len(text) < COLUMN), default=0)
    for field in keys(values):
        accepted = limits(field).accepted or accepted_type(field.default)
        if (name, field.name) == ("game", "name"):
            accepted = ACCEPTED
        comment = _comment(f"{limits(field).meaning} (accepted: {accepted})", " " * column)
        text = settings[field.name]
        if len(text) + 2 > column:  # above it
            lines += [*comment, text]
        else:
            lines += [text.ljust(column) + comment[0].lstrip(), *comment[1:]]
    return "\n".join([*lines, ""])


def _comment(text: str, indent: str) -> list[str]:
    """Paragraphs as comments."""
    prefix = f"{indent}# "
    return [
        line
        for paragraph in text.split("\n\n")
        for line in textwrap.wrap(
            paragraph, WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
        )
    ]
