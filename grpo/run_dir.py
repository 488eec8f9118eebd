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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from duologue.grpo.checkpoints import (
    LENGTHS,
    LINES,
    checkpoints,
    damage,
    damaged,
    json_object,
    latest_checkpoint,
    put_aside,
    step_name,
    step_of,
    whole_before,
)
from duologue.grpo.resume import (
    LENGTH,
    Settings,
    check_instruction_set,
    check_same,
    gpu_moved,
    may_differ,
    schedule_moved,
    settings,
    settings_of,
)
from duologue.grpo.sources import write_sources
from duologue.grpo.space import check_space
from duologue.model.atomic import fsync_path, put_back, unfinished, write_file, write_folder
from duologue.model.files import write_checksums
from safetensors import SafetensorError


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class RunDir:
    """One run. Make it with `create` or `resume`; both take the lock, so that two processes never write one
    run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []  # what a resume found that its user should know
        self._extended = ""  # of a resume: the configuration that it goes on with
        self._seen: dict[int, dict[str, int]] = {}
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
        write_sources(path, settings(config_toml))
        return run

    @classmethod
    def resume(cls, path: Path, config_toml: str, from_previous: bool = False) -> RunDir:
        """An existing run, which must have been started with this configuration, but for `MAY_DIFFER`. What
        is damaged is a ValueError before anything is changed; `go_on_from` changes the first thing. With
        `from_previous` damaged checkpoints are put aside where one before them is whole.
        """
        saved = path / "config.toml"
        if not saved.is_file():
            raise ValueError(f"{path} holds no run to resume: it has no config.toml")
        before, after = settings_of(saved), settings(config_toml)
        check_same(before, after, path)
        run = cls(path)
        try:
            run.notes += schedule_moved(before, after)
            run._check(after, from_previous)
        except ValueError:
            run.close()
            raise
        run._extended = config_toml
        return run

    def _check(self, after: Settings, from_previous: bool) -> None:
        """Of a resume: the newest checkpoint is whole, and the lines are as long as it knows them."""
        self._clean_up()
        latest = self.latest_checkpoint()
        newer: list[Path] = []
        if latest is None:
            return
        if reason := damage(latest):
            before, newer = whole_before(latest)
            if before is None or not from_previous:
                raise damaged(latest, reason)
            self.notes.append(f"{latest} is damaged ({reason}): the run goes on from {before}")
            latest = before
        check_instruction_set(latest, after)
        self.notes += gpu_moved(latest, after)
        noted, seen = json_object(latest / LENGTHS), self._lines_before(step_of(latest))
        for name, end in seen.items():
            if end < noted.get(name, 0):
                lost = f"ends before what {latest} knows of it ({end} of {noted[name]} bytes are whole lines)"
                self.notes.append(f"{self.path / name} {lost}: the lines that are missing stay missing")
        self.notes += [f"{folder} is now {put_aside(folder)}" for folder in newer]

    def close(self) -> None:
        """Release the lock. A process that ends, however it ends, releases it too."""
        self._lock.close()

    def forget_if_new(self) -> None:
        """Give the directory up when nothing was recorded yet, so that a corrected command can use it."""
        files = [*self.path.iterdir()]
        started = r"config\.toml|sources\.json|\.lock|wandb\.id|(judge|opponent)[.\d]*\.sqlite.*"
        if all(re.fullmatch(started, file.name) for file in files):
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
                    file.write(compact(row) + "\n")
        except OSError as error:
            whole = "--resume goes on from the last checkpoint"
            raise OSError(f"{self.path / name} could not be written ({error}); {whole}") from error

    def go_on_from(self, step: int) -> None:
        """Begin to write: all that the run goes on with was read and is whole."""
        if self._extended:
            (self.path / "summary.json").unlink(missing_ok=True)  # of a shorter run, which this one extends
            write_file(self.path / "config.toml", self._extended.encode())
        self.drop_lines_from(step)

    def drop_lines_from(self, step: int) -> None:
        """Cut off every line that the checkpoint of `step` had not seen; all lines when there is none."""
        for name, end in self._lines_before(step).items():
            if (self.path / name).is_file():
                os.truncate(self.path / name, end)

    def drop_trained(self, step: int) -> None:
        """Cut off the last evaluation's dialogues after `step` where a kill came between the checkpoint,
        which has seen them, and the summary: they are played again.
        """
        path, whole = self.path / "dialogues.jsonl", 0
        for row, end in _rows(path):
            if (row.get("step"), row.get("stage"), row.get("policy")) == (step, "eval", "trained"):
                os.truncate(path, whole)
                return
            whole = end

    def _lines_before(self, step: int) -> dict[str, int]:
        """Bytes of the whole lines of each file that the checkpoint of `step` had seen."""
        if step not in self._seen:
            noted = self.path / "checkpoints" / step_name(step) / LENGTHS
            lengths = json_object(noted) if noted.is_file() else {}
            ends = {name: _whole_lines(self.path / name, lengths.get(name, 0), step) for name in LINES}
            self._seen[step] = ends
        return self._seen[step]

    # ---- checkpoints and summary ---------------------------------------------------------------------------

    def save_checkpoint(
        self, name: str, write: Callable[[Path], None], keep: int = 0, needed: int = 0
    ) -> Path:
        """`put_checkpoint` here and now. Every rank calls it, and goes on when the first has written."""
        return self.put_checkpoint(name, write, self.lengths(), keep, needed)

    def put_checkpoint(
        self,
        name: str,
        write: Callable[[Path], None],
        lengths: dict[str, int],
        keep: int = 0,
        needed: int = 0,
    ) -> Path:
        """Have `write` fill `checkpoints/<name>` with about `needed` bytes, then prune the oldest `step_*`
        beyond `keep` (0 = keep all). `lengths` are those of the lines when it was begun.

        When the disk is full nothing that was there is touched, and the OSError says so.
        """
        path = self.path / "checkpoints" / name
        try:
            check_space(path.parent, needed, "it")
            write_folder(path, lambda folder: self._write_with_lengths(folder, write, lengths))
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors name a full disk so
            previous = self.latest_checkpoint()
            whole = f"the previous one, {previous}, is whole" if previous else "there is none before it"
            raise OSError(f"the checkpoint {path} could not be written ({error}); {whole}") from error
        if keep:
            for old in checkpoints(self.path)[:-keep]:
                shutil.rmtree(old)
        return path

    def lengths(self) -> dict[str, int]:
        """Bytes of each of LINES, for a checkpoint that is begun now."""
        paths = (self.path / name for name in LINES)
        return {path.name: path.stat().st_size if path.is_file() else 0 for path in paths}

    def _write_with_lengths(
        self, folder: Path, write: Callable[[Path], None], lengths: dict[str, int]
    ) -> None:
        write(folder)
        for name in LINES:
            if (self.path / name).is_file():
                fsync_path(self.path / name)
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        (folder / LENGTHS).write_text(json.dumps({**lengths, **sizes}), "utf-8")
        write_checksums(folder)

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
        write_file(self.path / "summary.json", json.dumps(finite(summary), indent=2).encode())


def finished(path: Path, config_toml: str) -> bool:
    """Whether the run there has come to the end of this very configuration; a longer one goes on, and so does
    one whose summary was cut.
    """
    saved = path / "config.toml"
    if not saved.is_file() or not (path / "summary.json").is_file():
        return False
    try:
        json_object(path / "summary.json")
    except ValueError:
        return False
    before, after = settings_of(saved), settings(config_toml)
    length = {("train", key) for key in LENGTH.split()}
    length |= {key for key in may_differ() if key[0] == "watch"}  # by which it may have ended
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} <= (
        may_differ() - length
    )


def iter_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, one at a time; without a last line that was cut off. A missing file is
    empty.
    """
    return (row for row, _ in _rows(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return list(iter_lines(path))


def _rows(path: Path, most: float = math.inf) -> Iterator[tuple[dict[str, Any], int]]:
    """(a line's object, the bytes up to its end) of the whole lines in the first `most` bytes."""
    if not path.is_file():
        return
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            if end > most or not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {number} is not a JSON object: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is not a JSON object")
            yield row, end


def _whole_lines(path: Path, noted: int, step: int) -> int:
    """Bytes of the lines among the first `noted` that are whole. Of a file that has become shorter, those
    after the checkpoint of `step` are none of them.
    """
    shorter = path.is_file() and path.stat().st_size < noted
    whole, last = 0, -1
    for number, (row, end) in enumerate(_rows(path, noted), 1):
        at = row.get("step", last)
        if path.name == LINES[0] and at == last:
            raise ValueError(
                f"{path} line {number} is of step {at} as the one before it: accepted is each once"
            )
        if shorter and (at > step or (at == step and row.get("stage") != "eval")):
            break
        whole, last = end, at
    return whole


def compact(value: Any) -> str:
    """As JSON, in one line."""
    return json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"))


def finite(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
