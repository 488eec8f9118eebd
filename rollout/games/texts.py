"""Files of texts to talk about: dilemmas, persona pairs, conflict tasks, questions. Read strictly, and
measured for likeness.

A file has one JSON object per line. Needed are `id` and `text` (personas: none), and `first` and `second`,
each a `name` and `instructions`, for personas and conflict tasks; `tier`, `situation` and `tags` may be
given.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "data"
TIERS = ("high_stakes", "interpersonal", "everyday")
NEEDS = {
    "dilemmas": ("id", "text"),
    "personas": ("id", "first", "second"),
    "conflicts": ("id", "text", "first", "second"),
    "questions": ("id", "text"),
}
SHIPPED = {kind: DATA / f"{'conflict_tasks' if kind == 'conflicts' else kind}.jsonl" for kind in NEEDS}
Row = dict[str, Any]


def read(path: str | Path, needs: Sequence[str]) -> list[Row]:
    """The rows of a file; ValueError names the line, the field, its value and what is accepted."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.lstrip("\ufeff")  # of files that were put together
        if not line.strip():
            continue
        where = f"{path} line {number}"
        row = _object(where, line, needs)
        if row["id"] in seen:
            raise ValueError(
                f"{where}: id = {row['id']!r} stands in line {seen[row['id']]} too, accepted is each once"
            )
        seen[row["id"]] = number
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def read_text(path: Path) -> str:
    """Of a file in UTF-8, with a byte order mark or without; ValueError for any other encoding."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line} is not UTF-8 ({error.reason}): accepted is UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path} line {line} holds a zero byte, as UTF-16 does: accepted is UTF-8")
    return text


def _object(where: str, line: str, needs: Sequence[str]) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not all(row.get(field) for field in needs):
        raise ValueError(f"{where}: accepted is a JSON object with {', '.join(needs)}")
    for key, value in row.items():
        _check_unicode(f"{where}: {key!a}", json.dumps({key: value}, ensure_ascii=False))
    for field in ("id", "text", "situation"):
        if field in row and not _is_text(row[field]):
            raise ValueError(f"{where}: {field} = {row[field]!r}, accepted is text")
    for side in ("first", "second"):
        who = row.get(side, {"name": "-", "instructions": "-"})
        if not isinstance(who, dict) or not all(_is_text(who.get(key)) for key in ("name", "instructions")):
            raise ValueError(f"{where}: {side} = {who!r}, accepted is an object with name and instructions")
    if row.get("tier", TIERS[0]) not in TIERS:
        raise ValueError(f"{where}: tier = {row['tier']!r}, accepted is one of {', '.join(TIERS)}")
    tags = row.get("tags", [])
    if not isinstance(tags, list) or not all(_is_text(tag) for tag in tags):
        raise ValueError(f"{where}: tags = {tags!r}, accepted is a list of words")
    return row


def _is_text(value: Any) -> bool:
    """Whether there is anything in it to see."""
    return isinstance(value, str) and any(c.isprintable() and not c.isspace() for c in value)


def _check_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!a}, half of a surrogate pair, which no file can hold"
        raise ValueError(f"{where} holds {half}: accepted is whole characters") from None


def kind_of(path: str | Path) -> str:
    """What a file holds, by the fields of its first row: a text with sides is a conflict, one with a tier a
    dilemma.
    """
    row = read(path, ("id",))[0]
    if "first" in row:
        return "conflicts" if "text" in row else "personas"
    return "dilemmas" if "tier" in row else "questions"


def shingles(text: str) -> set[tuple[str, ...]]:
    """Its sequences of three words, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def likeness(texts: Sequence[str]) -> Iterator[tuple[float, int, int]]:
    """(Jaccard index of the three-word sequences, i, j < i) of all pairs that have one in common (Broder
    1997).
    """
    sets = [shingles(text) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, words in enumerate(sets):
        common: dict[int, int] = defaultdict(int)
        for shingle in words:
            for j in holders[shingle]:
                common[j] += 1
            holders[shingle].append(i)
        for j, n in common.items():
            yield n / (len(words) + len(sets[j]) - n), i, j
