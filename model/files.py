"""The texts of a checkpoint folder: JSON objects, templates, and what leaves with a checkpoint as it came."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

# Files beside the weights that leave with a checkpoint as they came: by ending, but not by name.
KEPT_ENDINGS = ("", ".json", ".txt", ".jinja", ".model", ".md", ".py")
NOT_KEPT = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
CHECKSUMS = "checksums.json"  # in a folder that a run wrote: bytes and crc32 of every other file
OF_TRAINERS = ("trainer_state.json", "optimizer.pt", "lines.json")
OF_RUNS = ("adapter_config.json", CHECKSUMS, *OF_TRAINERS)
TEMPLATES = "additional_chat_templates"  # a folder of them
MAX_KEPT_BYTES = 2**27


def kept_files(folder: Path) -> dict[str, bytes]:
    """What leaves with a checkpoint as it came: vocabulary, licence, further templates, code; no weights."""
    files = [*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*.jinja")]
    names = {str(file.relative_to(folder)): file for file in files if file.is_file()}
    return {
        name: file.read_bytes()
        for name, file in sorted(names.items())
        if file.suffix in KEPT_ENDINGS
        and name not in (*NOT_KEPT, *OF_RUNS)
        and not name.startswith(".")
        and not name.endswith(".index.json")
        and file.stat().st_size <= MAX_KEPT_BYTES
    }


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty when there is no file; ValueError when it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def write_checksums(folder: Path) -> None:
    """Note what every file of a finished folder holds, so that `altered` can tell later."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CHECKSUMS)
    sums = {str(file.relative_to(folder)): _checksum(file) for file in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), "utf-8")


def altered(folder: Path, skip: tuple[str, ...] = ()) -> str:
    """The first file that is not as `write_checksums` saw it, and how; "" when all are, or nothing was noted.
    `skip` are names that the caller does not read.
    """
    try:
        noted = read_json(folder / CHECKSUMS)
        for name in sorted(noted.keys() - {*skip}):
            if not (folder / name).is_file():
                return f"{name}: it is missing"
            found = _checksum(folder / name)
            if found != noted[name]:
                return f"{name}: it holds {_words(found)}, not {_words(noted[name])} as {CHECKSUMS} says"
    except (ValueError, OSError) as error:
        return f"{CHECKSUMS}: {error}"
    return ""


def _checksum(path: Path) -> dict[str, Any]:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
        return {"bytes": file.tell(), "crc32": f"{crc:08x}"}


def _words(checksum: Any) -> str:
    known = checksum if isinstance(checksum, dict) else {}
    return f"{known.get('bytes')} bytes of crc32 {known.get('crc32')}"
