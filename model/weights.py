"""The safetensors files of a checkpoint folder: which of them hold the model, and what is in them.

An index is an aid, not an authority. The first set of files that holds every tensor of the model is taken:
the single file (transformers' choice too), the shards that the index names, the shards by their names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from duologue.model.files import read_json
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")


def stored_tensors(folder: Path, wanted: Iterable[str]) -> Iterator[tuple[str, Path, Tensor]]:
    """(name, file, tensor) of the first set of files that has what is wanted; ValueError when none has."""
    problems: list[ValueError] = []
    for files in _sets(folder, problems):
        try:
            _check_whole(folder, files, wanted)
        except ValueError as error:
            problems.append(error)
            continue
        for file in files:
            with opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - the handle is no dict
                    yield name, file, handle.get_tensor(name)
        return
    raise problems[0] if problems else ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")


def finite(tensor: Tensor) -> bool:
    """Whether all its values are numbers; one pass without a copy."""
    return not tensor.numel() or all(math.isfinite(x) for x in torch.aminmax(tensor))


def opened(file: Path) -> Any:
    """The file's handle; ValueError when it is damaged."""
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read, it is truncated or damaged: {reason}") from error


def _sets(folder: Path, problems: list[ValueError]) -> Iterator[list[Path]]:
    if (folder / SINGLE).is_file():
        yield [folder / SINGLE]
    if (folder / INDEX).is_file():
        try:
            weight_map = read_json(folder / INDEX).get("weight_map")
            names = weight_map.values() if isinstance(weight_map, dict) else ()
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{folder / INDEX} has no weight_map")
            yield [folder / name for name in sorted(set(names))]
        except ValueError as error:
            problems.append(error)
    by_count: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        if match := SHARD.fullmatch(file.name):
            by_count.setdefault(match[1], []).append(file)
    whole = [files for count, files in by_count.items() if len(files) == int(count)]
    if len(whole) > 1:
        first, second = whole[0][0].name, whole[1][0].name
        raise ValueError(f"{folder} has shards of two models, {first} and {second}: accepted is one of them")
    yield from whole


def _check_whole(folder: Path, files: list[Path], wanted: Iterable[str]) -> None:
    """ValueError when a file is missing or damaged, or a tensor is missing or there twice."""
    places: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder / INDEX} names the shard {file.name}, which is not there")
        with opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is no dict
                if name in places:
                    raise ValueError(f"{name} is in {places[name]} and in {file}: accepted is one of them")
                places[name] = file
    missing = sorted(set(wanted) - places.keys())
    if missing == [EMBEDDING] and HEAD in places and HEAD not in wanted:
        return  # a tied pair may be stored by either name
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the model's tensors, first {missing[0]}")
