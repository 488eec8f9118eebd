"""The checkpoints of a run: their names, what a trainer goes on with, and whether they are whole: each file
there, as long as it was, of its kind, and byte for byte what was written.
"""

from __future__ import annotations

import itertools
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from duologue.model.files import TEMPLATES, altered
from duologue.model.hub import folder_of
from safetensors import SafetensorError, safe_open
from torch import Tensor

LINES = ("metrics.jsonl", "dialogues.jsonl")
LENGTHS = "lines.json"  # in a checkpoint: bytes of each of LINES when it was saved, and of its own files
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
DAMAGED = "damaged_"  # before the name of a checkpoint that was set aside
STATE_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "seconds": (int, float),
    "warm_start": (dict, type(None)),
    "baseline": (dict,),
    "opponents": (dict,),
}
UNREADABLE = (OSError, ValueError, TypeError, RuntimeError, SafetensorError, zipfile.BadZipFile)


def step_name(step: int) -> str:
    """The checkpoint's name after `step` steps."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """Of a checkpoint, by its name."""
    return int(path.name.rpartition("_")[2])


def checkpoints(run: Path) -> list[Path]:
    """The `step_*` checkpoints of a run directory, the oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted((path for path in folders if re.fullmatch(r"step_\d{6,}", path.name)), key=step_of)


def checkpoint_of(place: str | Path) -> Path:
    """Of what a command names: a run's last checkpoint, a folder as it is, a name in the Hub."""
    folder = folder_of(str(place))
    return latest_checkpoint(folder) or folder


def latest_checkpoint(run: Path) -> Path | None:
    """The last of them; None without any."""
    return next(reversed(checkpoints(run)), None)


def write_state(folder: Path, state: dict[str, Any], optimizer: dict[str, Tensor]) -> None:
    """What a trainer goes on with, beside the weights in a checkpoint's folder."""
    torch.save(optimizer, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(state), "utf-8")


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_state` wrote, on the host: on a GPU it would lie beside the optimizer that takes it."""
    state = json.loads((folder / STATE).read_text("utf-8"))
    return state, torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)


def damage(folder: Path) -> str:
    """The first file of a checkpoint that is missing, cut, empty or unreadable, and why; "" where it is
    whole.
    """
    name = LENGTHS
    try:
        noted = json_object(folder / LENGTHS)
        sizes = {key: size for key, size in noted.items() if key not in LINES}
        if any(type(size) is not int for size in noted.values()) or (sizes and not noted.keys() >= {*LINES}):
            raise ValueError(f"accepted is a number of bytes of each of {', '.join(LINES)}")
        for name in sorted(sizes or (path.name for path in folder.iterdir())):
            _check_file(folder / name, sizes.get(name, 1))
    except UNREADABLE as error:
        return f"{name}: {error}"
    return altered(folder)


def spoiled(folder: Path) -> str:
    """The same of a folder of weights that no trainer goes on from."""
    name = folder.name
    try:
        files = {path.name: path for path in sorted(folder.iterdir())}
        if not any(file.endswith(".safetensors") for file in files):
            return "it holds no .safetensors file"
        for name in files:
            _check_file(files[name], 1)
    except UNREADABLE as error:
        return f"{name}: {error}"
    return altered(folder)


def _check_file(path: Path, size: int) -> None:
    if path.name == TEMPLATES and path.is_dir():
        return
    if path.suffix == ".json":
        state = json_object(path)
        for key, kinds in STATE_TYPES.items() if path.name == STATE else ():
            if key not in state or type(state[key]) not in kinds:
                raise ValueError(f"{key} = {state.get(key)!r}, which no trainer has written")
        if path.name == STATE and step_name(state["step"]) != path.parent.name:
            raise ValueError(f"step = {state['step']}, which is another checkpoint's")
        return
    with open(path, "rb") as file:
        start = file.read(1 << 20)
    present, binary = path.stat().st_size, path.suffix in (".safetensors", ".pt")
    if present < size or (binary and present > size > 1):
        raise ValueError(f"{present} of {size} bytes are there")
    if not binary and b"\0" in start:
        raise ValueError("it holds a zero byte")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):
            return
    if path.suffix == ".pt":
        zipfile.ZipFile(path).close()


def whole_before(folder: Path) -> tuple[Path | None, list[Path]]:
    """The last whole checkpoint before a damaged one, and all that are newer; the oldest first."""
    earlier = [path for path in checkpoints(folder.parent.parent) if step_of(path) < step_of(folder)]
    before = next((path for path in reversed(earlier) if not damage(path)), None)
    return before, [*(path for path in earlier if before and step_of(path) > step_of(before)), folder]


def damaged(folder: Path, reason: str, seen_at_once: bool = True) -> ValueError:
    """The error of a checkpoint that cannot be read, with the way on: `--from-previous` knows it too where
    `damage` has seen it.
    """
    before, newer = whole_before(folder)
    way = f"no checkpoint before it is whole: remove {folder.parent.parent} to begin anew"
    if before is not None:
        way = f"the checkpoint {before} is whole: to go on from it, remove {' and '.join(map(str, newer))}"
        way += ", or use --from-previous, which puts them aside" if seen_at_once else ""
    return ValueError(f"the checkpoint {folder} is damaged ({reason}); {way}")


def put_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that no run takes it for one; where it is now."""
    names = (f"{DAMAGED}{folder.name}" + (f".{n}" if n else "") for n in itertools.count())
    aside = next(path for name in names if not (path := folder.with_name(name)).exists())
    return folder.rename(aside)


def json_object(path: Path) -> dict[str, Any]:
    """Of a JSON file; ValueError when it holds something else."""
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
