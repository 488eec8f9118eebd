"""Writing so that nothing is lost: a file or folder appears whole under its name, or what was there before
stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def fsync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Write a file through a temporary sibling: fsync, then rename. On any failure the old content stays."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary sibling folder, fsync every file, and put it in the place of `path`.

    No rename replaces a full folder, so an existing `path` steps aside for a moment. A kill in that moment
    leaves it as `.NAME.old`, and the next write, or `put_back`, restores it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path)
    put_back(path)
    temporary.mkdir()
    try:
        write(temporary)
        for file in (*temporary.rglob("*"), temporary):
            fsync_path(file)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        put_back(path)
        raise
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(path: Path) -> None:
    """Undo a `write_folder` of `path` that did not come to its end: what had stepped aside goes back, what
    was half written goes.
    """
    temporary, old = _beside(path)
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)


def unfinished(folder: Path) -> list[Path]:
    """The folders in `folder` whose `write_folder` did not come to its end."""
    return [
        folder / leftover.name[1:-4] for pattern in (".*.old", ".*.tmp") for leftover in folder.glob(pattern)
    ]


def _beside(path: Path) -> tuple[Path, Path]:
    """Where a folder is written, and where the one that it replaces waits."""
    return path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
