"""Whether the disk has room for what a run writes, asked before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

BESIDE = 2**25  # bytes beside tensors: texts, the tokenizer's files, lines until the next checkpoint


def weight_bytes(model: nn.Module) -> int:
    """Of what is trained: all weights, or those of an adapter."""
    return sum(parameter.nbytes for parameter in _trained(model))


def checkpoint_bytes(model: nn.Module) -> int:
    """And of the optimizer's state."""
    return sum(stored_bytes(p.numel(), p.itemsize) for p in _trained(model))


def stored_bytes(numbers: int, itemsize: int) -> int:
    """Of so many trained weights with two moments, and a master for low precision, in fp32."""
    return numbers * (itemsize + (12 if itemsize < 4 else 8))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def free_bytes(folder: Path) -> int:
    """Where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def check_space(folder: Path, needed: int, what: str) -> None:
    """OSError where `what` does not fit."""
    needed, free = needed + BESIDE, free_bytes(folder)
    if free < needed:
        raise OSError(f"{what} needs {_words(needed)} in {folder}, where {_words(free)} are free")


def _words(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
