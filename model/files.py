"""The texts of a checkpoint folder: JSON objects, templates, and what leaves with a checkpoint as it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Files beside the weights that leave with a checkpoint as they came: by ending, but not by name.
KEPT_ENDINGS = ("", ".json", ".txt", ".jinja", ".model", ".md", ".py")
NOT_KEPT = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
OF_RUNS = ("adapter_config.json", "trainer_state.json", "lines.json")
MAX_KEPT_BYTES = 2**27


def kept_files(folder: Path) -> dict[str, bytes]:
    """What leaves with a checkpoint as it came: vocabulary, licence, further templates, code; no weights."""
    files = [*folder.glob("*"), *folder.glob("additional_chat_templates/*.jinja")]
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
