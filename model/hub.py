"""Checkpoints by their names in the Hugging Face Hub: ORG/NAME, and with the commit that is meant
ORG/NAME@COMMIT. huggingface_hub fetches them into its cache; HF_ENDPOINT and HF_HOME are its own variables.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
NEEDED = ["*.json", "*.jinja", "*.safetensors"]
OTHERS = ["*/*", "consolidated*"]  # of folders, and weights in another layout
PATIENCE_S = 20.0


def is_name(place: str) -> bool:
    """Whether it names something in the Hub; a path that is there is meant as a path."""
    return NAME.fullmatch(place) is not None and not Path(place).exists()


def is_pinned(place: str) -> bool:
    """Whether it is a name with its commit."""
    return is_name(place) and COMMIT.fullmatch(place.partition("@")[2]) is not None


def pinned(place: str) -> str:
    """A name with the commit that it stands for now; what is no name as it is. ValueError where the Hub does
    not know it or cannot be asked.
    """
    if not is_name(place) or is_pinned(place):
        return place
    from huggingface_hub import HfApi

    name, _, revision = place.partition("@")
    try:
        commit = HfApi().model_info(name, revision=revision or None, timeout=PATIENCE_S).sha
    except Exception as error:  # its HTTP library's errors have no base of their own
        raise _not_given(place, error) from error
    return f"{name}@{commit}"


@cache
def local(place: str) -> Path:
    """The folder of a checkpoint: of a name with its commit the one in the cache, where files that lack are
    fetched first.
    """
    if not is_pinned(place):
        return Path(place)
    from huggingface_hub import snapshot_download

    name, _, commit = place.partition("@")
    try:
        folder = snapshot_download(name, revision=commit, allow_patterns=NEEDED, ignore_patterns=OTHERS)
    except Exception as error:
        raise _not_given(place, error) from error
    return Path(folder)


def _not_given(place: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(
        f"model.path = {place!r}: there is no such folder, and the Hub does not give it ({reason})"
    )
