"""A run's directory: the configuration, one line per step and per dialogue, checkpoints, summary and report.

Written so that a run that is killed anywhere resumes as if it had not been: lines past the newest checkpoint are dropped on resume
and computed again, and a checkpoint appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from duologue.model.files import write_file, write_folder

LINES = ("metrics.jsonl", "dialogues.jsonl")
MAY_DIFFER = {("train", "steps"), ("train", "max_seconds"), ("train", "save_every"), ("train", "keep_checkpoints")}


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class RunDir:
    """One run. Make it with `create` or `resume`; both take the lock, so that two processes never write one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = open(path / ".lock", "a+")  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            raise ValueError(f"{path} is in use by process {self._lock.read().strip() or 'unknown'}") from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    @classmethod
    def create(cls, path: Path, config_toml: str) -> RunDir:
        """A new run in a directory that is empty or does not exist."""
        if path.exists() and any(p.name != ".lock" for p in path.iterdir()):
            raise ValueError(f"{path} exists and holds another run: go on with it by --resume, or choose another --run-dir")
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        write_file(path / "config.toml", config_toml.encode())
        return run

    @classmethod
    def resume(cls, path: Path, config_toml: str) -> RunDir:
        """An existing run, which must have been started with this configuration (its length may differ)."""
        if not (path / "config.toml").is_file():
            raise ValueError(f"{path} holds no run to resume: it has no config.toml")
        _check_same((path / "config.toml").read_text("utf-8"), config_toml, path)
        run = cls(path)
        write_file(path / "config.toml", config_toml.encode())
        for leftover in (path / "checkpoints").glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        return run

    def close(self) -> None:
        """Release the lock. A process that ends, however it ends, releases it too."""
        self._lock.close()

    # ---- lines -------------------------------------------------------------------------------------------------------

    def append_metrics(self, row: dict[str, Any]) -> None:
        self._append("metrics.jsonl", [row])

    def append_dialogues(self, rows: Iterable[dict[str, Any]]) -> None:
        self._append("dialogues.jsonl", rows)

    def _append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(_finite(row), ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(text)

    def drop_lines_from(self, step: int) -> None:
        """Drop every line of step `step` or later, and a last line that was cut off by a kill."""
        for name in LINES:
            path = self.path / name
            if not path.is_file():
                continue
            kept = []
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                if row["step"] < step:
                    kept.append(line)
            write_file(path, b"".join(kept))

    # ---- checkpoints and summary -------------------------------------------------------------------------------------

    def save_checkpoint(self, name: str, write: Callable[[Path], None], keep: int = 0) -> Path:
        """Have `write` fill `checkpoints/<name>`, then prune the oldest `step_*` beyond `keep` (0 = keep all).

        When the disk is full nothing that was there is touched, and the error says so.
        """
        path = self.path / "checkpoints" / name
        try:
            write_folder(path, write)
        except (OSError, RuntimeError) as error:  # safetensors and torch report a full disk in their own ways
            raise OSError(f"the checkpoint {path} could not be written ({error}); the previous one is whole") from error
        if keep:
            for old in self._steps()[:-keep]:
                shutil.rmtree(old)
        return path

    def latest_checkpoint(self) -> Path | None:
        """The `step_*` checkpoint that a resume starts from."""
        steps = self._steps()
        return steps[-1] if steps else None

    def _steps(self) -> list[Path]:
        return sorted(p for p in (self.path / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name))

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_file(self.path / "summary.json", json.dumps(_finite(summary), indent=2).encode())

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line that was cut off is left out, a missing file is empty."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _check_same(old: str, new: str, path: Path) -> None:
    before, after = tomllib.loads(old), tomllib.loads(new)
    for section in sorted({*before, *after}):
        for key in sorted({*before.get(section, {}), *after.get(section, {})}):
            a, b = before.get(section, {}).get(key), after.get(section, {}).get(key)
            if a != b and (section, key) not in MAY_DIFFER:
                raise ValueError(f"{path} was started with {section}.{key} = {a!r}, not {b!r}: resume it as it was, or start another run")


def _finite(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
