"""A run's directory: the configuration, one line per step and per dialogue, checkpoints, summary and report.

Written so that a run that is killed anywhere resumes as if it had not been: a checkpoint appears whole or not
at all, and it notes how long the lines were, so that what came after it is cut off on resume and computed
again.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.config import from_dict
from duologue.model.atomic import fsync_path, put_back, unfinished, write_file, write_folder
from safetensors import SafetensorError
from torch import Tensor

LINES = ("metrics.jsonl", "dialogues.jsonl")
LENGTHS = "lines.json"  # in a checkpoint: bytes of each of LINES when it was saved
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
MAY_DIFFER = {
    ("train", "steps"),
    ("train", "max_seconds"),
    ("train", "save_every"),
    ("train", "keep_checkpoints"),
}


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class RunDir:
    """One run. Make it with `create` or `resume`; both take the lock, so that two processes never write one
    run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = open(path / ".lock", "a+")  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            raise ValueError(
                f"{path} is in use by process {self._lock.read().strip() or 'unknown'}"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    @classmethod
    def create(cls, path: Path, config_toml: str) -> RunDir:
        """A new run in a directory that is empty or does not exist; ValueError when it holds something."""
        if path.exists() and (not path.is_dir() or any(p.name != ".lock" for p in path.iterdir())):
            what = "holds another run or other files" if path.is_dir() else "is a file"
            raise ValueError(
                f"{path} exists and {what}: go on with a run by --resume, or choose another --run-dir"
            )
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
        (path / "summary.json").unlink(missing_ok=True)  # of a shorter run, which this one extends
        write_file(path / "config.toml", config_toml.encode())
        run._clean_up()
        return run

    def close(self) -> None:
        """Release the lock. A process that ends, however it ends, releases it too."""
        self._lock.close()

    def forget_if_new(self) -> None:
        """Give the directory up when nothing was recorded yet, so that a corrected command can use it."""
        files = [*self.path.iterdir()]
        if all(re.fullmatch(r"config\.toml|\.lock|judge\.sqlite.*", file.name) for file in files):
            for file in files:
                file.unlink()
            self.path.rmdir()
            self.close()

    # ---- lines ---------------------------------------------------------------------------------------------

    def append_metrics(self, row: dict[str, Any]) -> None:
        self._append("metrics.jsonl", [row])

    def append_dialogues(self, rows: Iterable[dict[str, Any]]) -> None:
        self._append("dialogues.jsonl", rows)

    def _append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(_finite(row), ensure_ascii=False, separators=(",", ":")) + "\n")
        except OSError as error:
            whole = "--resume goes on from the last checkpoint"
            raise OSError(f"{self.path / name} could not be written ({error}); {whole}") from error

    def drop_lines_from(self, step: int) -> None:
        """Cut off every line that the checkpoint of `step` had not seen; all lines when there is none."""
        noted = self.path / "checkpoints" / step_name(step) / LENGTHS
        lengths: dict[str, int] = json.loads(noted.read_text("utf-8")) if noted.is_file() else {}
        for name in LINES:
            path = self.path / name
            if path.is_file():
                os.truncate(path, min(lengths.get(name, 0), path.stat().st_size))

    # ---- checkpoints and summary ---------------------------------------------------------------------------

    def save_checkpoint(self, name: str, write: Callable[[Path], None], keep: int = 0) -> Path:
        """Have `write` fill `checkpoints/<name>`, then prune the oldest `step_*` beyond `keep` (0 = keep
        all).

        When the disk is full nothing that was there is touched, and the OSError says so.
        """
        path = self.path / "checkpoints" / name
        try:
            write_folder(path, lambda folder: self._write_with_lengths(folder, write))
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors name a full disk so
            previous = self.latest_checkpoint()
            whole = f"the previous one, {previous}, is whole" if previous else "there is none before it"
            raise OSError(f"the checkpoint {path} could not be written ({error}); {whole}") from error
        if keep:
            for old in checkpoints(self.path)[:-keep]:
                shutil.rmtree(old)
        return path

    def _write_with_lengths(self, folder: Path, write: Callable[[Path], None]) -> None:
        write(folder)
        lines = [self.path / name for name in LINES if (self.path / name).is_file()]
        for path in lines:
            fsync_path(path)
        (folder / LENGTHS).write_text(json.dumps({path.name: path.stat().st_size for path in lines}), "utf-8")

    def latest_checkpoint(self) -> Path | None:
        """The `step_*` checkpoint that a resume starts from."""
        return latest_checkpoint(self.path)

    def _clean_up(self) -> None:
        """Remove what a kill in the midst of a save left behind; a checkpoint that was just moved aside goes
        back.
        """
        folder = self.path / "checkpoints"
        for path in unfinished(folder):
            put_back(path)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_file(self.path / "summary.json", json.dumps(_finite(summary), indent=2).encode())


def step_name(step: int) -> str:
    """The checkpoint's name after `step` steps."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """Of a checkpoint, by its name."""
    return int(path.name.removeprefix("step_"))


def checkpoints(run: Path) -> list[Path]:
    """The `step_*` checkpoints of a run directory, the oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted((path for path in folders if re.fullmatch(r"step_\d{6,}", path.name)), key=step_of)


def latest_checkpoint(run: Path) -> Path | None:
    """The last of them; None without any."""
    return next(reversed(checkpoints(run)), None)


def write_state(folder: Path, state: dict[str, Any], optimizer: dict[str, Tensor]) -> None:
    """What a trainer goes on with, beside the weights in a checkpoint's folder."""
    torch.save(optimizer, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(state), "utf-8")


def read_state(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_state` wrote."""
    state = json.loads((folder / STATE).read_text("utf-8"))
    return state, torch.load(folder / OPTIMIZER, map_location=device, weights_only=True)


def finished(path: Path, config_toml: str) -> bool:
    """Whether the run there has come to the end of this very configuration; a longer one goes on."""
    saved = path / "config.toml"
    if not saved.is_file() or not (path / "summary.json").is_file():
        return False
    return _settings(saved.read_text("utf-8")) == _settings(config_toml)


def iter_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, one at a time; without a last line that was cut off. A missing file is
    empty.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not a JSON object: {error}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    return list(iter_lines(path))


def _settings(config_toml: str) -> dict[tuple[str, str], Any]:
    """(section, key) -> value of every setting; what is not said has its default, as in a configuration of an
    older version.
    """
    sections = tomllib.loads(from_dict(tomllib.loads(config_toml)).to_toml())
    return {(section, key): value for section, keys in sections.items() for key, value in keys.items()}


def _check_same(old: str, new: str, path: Path) -> None:
    before, after = _settings(old), _settings(new)
    differ = []
    for section, key in sorted({*before, *after} - MAY_DIFFER):
        a, b = before.get((section, key)), after.get((section, key))
        if a != b:
            differ.append(f"{section}.{key} = {a!r}, not {b!r}")
    if differ:
        raise ValueError(
            f"{path} was started with {'; '.join(differ)}: resume it as it was, or start another run"
        )


def _finite(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
