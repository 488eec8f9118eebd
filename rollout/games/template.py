"""Prompts as text files with places such as `{name}`, which a user can replace by a folder of their own."""

from __future__ import annotations

import re
from pathlib import Path

from duologue.rollout.games.texts import read_text

_PLACE = re.compile(r"\{(\w+)\}")


def fill(template: str, places: dict[str, str]) -> str:
    """Put texts into their places, all at once: what looks like a place in a text stays text."""
    return _PLACE.sub(lambda match: places[match[1]], template)


def load_template(folder: str, default: Path, name: str, accepted: set[str], required: set[str]) -> str:
    """`name`.txt of `folder` where it is there, else of `default`; ValueError for a place that is unknown
    or lacks.
    """
    if folder and not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder} of prompts")
    path = Path(folder) / f"{name}.txt"
    if not folder or not path.is_file():
        path = default / f"{name}.txt"
    text = read_text(path)
    places = set(_PLACE.findall(text))
    if places - accepted or required - places:
        wrong = (
            f"has the unknown place {{{min(places - accepted)}}}"
            if places - accepted
            else f"lacks {{{min(required - places)}}}"
        )
        raise ValueError(
            f"{path} {wrong}: accepted is {', '.join(f'{{{p}}}' for p in sorted(accepted)) or 'none'}"
        )
    return text
