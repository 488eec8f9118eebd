"""What a run is made from that lies outside its directory: weights, texts, prompts. Each is noted by its hash
when the run begins, so that a resume may find it at another place, but not another thing at its place.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from duologue.model.atomic import write_file
from duologue.model.files import CHECKSUMS, OF_TRAINERS, read_json
from duologue.model.hub import local
from duologue.model.peft import CONFIG as ADAPTER
from duologue.model.peft import read_settings

FILE = "sources.json"  # in the run directory: setting -> hash
MODELS = (("model", "path"), ("judge", "model"), ("opponent", "path"))
TEXTS = (
    ("game", "name"),
    ("game", "dilemmas"),
    ("game", "personas"),
    ("game", "tasks"),
    ("game", "prompts"),
    ("judge", "prompts"),
    ("eval", "questions"),
)
READ = (".json", ".jinja", ".model", ".safetensors", ".txt", ".jsonl")  # endings of what changes a result
Settings = dict[tuple[str, str], Any]
Key = tuple[str, str]


def write_sources(run: Path, settings: Settings) -> None:
    """Note the sources of a run that begins; not one that cannot be read, of which its reader says why."""
    noted = {f"{section}.{key}": hashed for (section, key), hashed in _sources(settings).items() if hashed}
    write_file(run / FILE, json.dumps(noted, indent=1).encode())


def _sources(settings: Settings) -> dict[Key, str]:
    return {key: content(place) for key in (*MODELS, *TEXTS) if (place := place_of(settings, key))}


def place_of(settings: Settings, key: Key) -> str:
    """The path that a setting names, "" where it names none."""
    if key == ("judge", "model") and settings.get(("judge", "backend")) != "model":
        return ""  # a server's name of its model
    if key == ("game", "name"):  # a file of one's own, and in it a class
        path = str(settings.get(key) or "").rpartition(".py")[0]
        return f"{path}.py" if path else ""
    return str(settings.get(key) or "")


def class_in(name: str) -> str:
    """Of a game's name that is a file, and in it a class."""
    return name.rpartition(".py")[2]


def noted_sources(run: Path) -> dict[str, Any]:
    """Setting -> hash; of a run of an older version none."""
    return read_json(run / FILE)


def content(place: str) -> str:
    """The hash of a file, or of a folder's names and files, "" where it cannot be read. That of an adapter
    includes its base, wherever that is.
    """
    digest = hashlib.sha256()
    try:
        path = local(place)
        if path.is_file():
            return _hash(path)
        for file in sorted(path.iterdir()):
            if file.suffix not in READ or file.name in (CHECKSUMS, *OF_TRAINERS):
                continue
            hashed = _hash_adapter(path) if file.name == ADAPTER else _hash(file)
            digest.update(f"{file.name} {hashed}\n".encode())
    except (OSError, ValueError):
        return ""
    return digest.hexdigest()


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_adapter(folder: Path) -> str:
    """Of an adapter's settings, with what its base holds in place of where that is."""
    settings = {**read_json(folder / ADAPTER), "base_model_name_or_path": None, "revision": None}
    return json.dumps([settings, content(read_settings(folder).base)], sort_keys=True)
