"""Checkpoints by their names in the Hugging Face Hub: ORG/NAME, and with the commit that is meant
ORG/NAME@COMMIT. huggingface_hub fetches them into its cache; HF_ENDPOINT and HF_HOME are its own variables.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
DESCRIBING, WEIGHTS = ["*.json", "*.jinja"], ["*.safetensors"]
OTHERS = ["*/*", "consolidated*"]  # of folders, and weights in another layout
PATIENCE_S = 20.0


def is_name(place: str) -> bool:
    """Whether it names something in the Hub; a path that is there is meant as a path."""
    return NAME.fullmatch(place) is not None and not Path(place).exists()


def is_pinned(place: str) -> bool:
    """Whether it is a name with its commit."""
    return is_name(place) and COMMIT.fullmatch(place.partition("@")[2]) is not None


def split(place: str) -> tuple[str, str]:
    """A name without its commit, and the commit; what is not pinned as it is, and ""."""
    name, _, commit = place.partition("@")
    return (name, commit) if is_pinned(place) else (place, "")


def pinned(place: str) -> str:
    """A name with the commit that it stands for now, or last stood for where the Hub is not to be asked
    (HF_HUB_OFFLINE); what is no name as it is. ValueError where the Hub does not know it or cannot be asked.
    """
    if not is_name(place) or is_pinned(place):
        return place
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    name, _, revision = place.partition("@")
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    noted = cached / "refs" / (revision or "main")  # the cache's own place for it
    if constants.HF_HUB_OFFLINE and noted.is_file():
        return f"{name}@{noted.read_text('ascii').strip()}"
    try:
        commit = HfApi().model_info(name, revision=revision or None, timeout=PATIENCE_S).sha
    except Exception as error:  # its HTTP library's errors have no base of their own
        raise _not_given(place, error) from error
    noted.parent.mkdir(parents=True, exist_ok=True)
    noted.write_text(str(commit), "ascii")
    return f"{name}@{commit}"


@cache
def local(place: str, weights: bool = True) -> Path:
    """The folder of a checkpoint: of a name with its commit the one in the cache, where files that lack are
    fetched first; without `weights` those alone that describe them.
    """
    if not is_pinned(place):
        return Path(place)
    from huggingface_hub import snapshot_download

    name, commit = split(place)
    needed = DESCRIBING + WEIGHTS if weights else DESCRIBING
    try:
        folder = snapshot_download(name, revision=commit, allow_patterns=needed, ignore_patterns=OTHERS)
    except Exception as error:
        raise _not_given(place, error) from error
    return Path(folder)


def folder_of(place: str, weights: bool = True) -> Path:
    """`local` of a path, or of a name by the commit that it stands for."""
    return local(pinned(place), weights)


def _not_given(place: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(
        f"model.path = {place!r}: there is no such folder, and the Hub does not give it ({reason})"
    )
