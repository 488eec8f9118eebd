"""What may be another in the configuration that a run is resumed with: whatever cannot change its result."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from duologue.grpo.checkpoints import STATE, json_object, latest_checkpoint
from duologue.grpo.collapse import WatchSection
from duologue.grpo.config import from_dict
from duologue.grpo.sources import MODELS, TEXTS, Key, class_in, content, noted_sources, place_of
from duologue.kernels import backend, libraries
from duologue.model.checkpoint import parse_dtype
from duologue.model.settings import keys

LENGTH = "steps max_seconds patience"
SEEN = "kl_every tensorboard wandb record_tokens"
PLACES = "url key_env concurrency timeout_s deadline_s"
MAY_DIFFER = {  # on resume: how far it goes, where something is, how long it is waited for, how much is used
    "train": f"{LENGTH} {SEEN} save_every keep_checkpoints threads tokens_per_microbatch rank_timeout_s "
    "max_bad_updates recompute offload_moments",
    "judge": f"{PLACES} ledger offline max_tokens max_unscored_share",
    "opponent": PLACES,
    "rollout": "cache_tokens max_batch max_step_tokens release_memory",
    "eval": "judge_url partners partner_dialogues ability ability_prompts ability_tokens ifeval",
    "watch": " ".join(key.name for key in keys(WatchSection)),
}

Settings = dict[tuple[str, str], Any]


def settings(config_toml: str) -> Settings:
    """(section, key) -> value of every setting; what is not said has its default, as in a configuration of an
    older version.
    """
    sections = tomllib.loads(from_dict(tomllib.loads(config_toml)).to_toml())
    return {(section, key): value for section, keys in sections.items() for key, value in keys.items()}


def settings_of(path: Path) -> Settings:
    try:
        return settings(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def may_differ() -> set[tuple[str, str]]:
    return {(section, key) for section, names in MAY_DIFFER.items() for key in names.split()}


def check_same(before: Settings, after: Settings, path: Path) -> None:
    differ = []
    for section, key in sorted({*before, *after} - may_differ()):
        a, b = before.get((section, key)), after.get((section, key))
        if (section, key) in (*MODELS, *TEXTS) and place_of(before, (section, key)):
            differ += _other_source(before, after, (section, key), path)
        elif a != b and not (key == "device" and _kind(a) == _kind(b) == "cuda"):
            differ.append(f"{section}.{key} = {a!r}, not {b!r}")
    if differ:
        raise ValueError(
            f"{path} was started with {'; '.join(differ)}, which can change the result: resume it as it "
            "was, or start another run"
        )


def _other_source(before: Settings, after: Settings, key: Key, run: Path) -> list[str]:
    """What a place was and is, where it is not the same content as when the run began."""
    a, b, name = before[key], after.get(key), ".".join(key)
    noted = noted_sources(run).get(name) or (content(place_of(before, key)) if a != b else "")
    if a == b and (not noted or not _read_again(before, key, run)):
        return []
    place = place_of(after, key)
    same_class = key != ("game", "name") or class_in(str(a)) == class_in(str(b))
    if place and noted and same_class and content(place) == noted:
        return []
    return [f"{name} = {a!r}, not {b!r}" if a != b else f"other content of {name} = {a!r}"]


def _read_again(settings: Settings, key: Key, run: Path) -> bool:
    """Whether a resume reads what the setting names. All weights are in the checkpoint unless only an adapter
    is trained.
    """
    return key != ("model", "path") or bool(settings["lora", "rank"]) or latest_checkpoint(run) is None


def _kind(device: Any) -> str:
    return str(device).partition(":")[0]


def schedule_moved(before: Settings, after: Settings) -> list[str]:
    """A line that says so where another length plans another learning rate."""
    schedule, steps = after["grpo", "schedule"], ("train", "steps")
    if schedule == "constant" or before[steps] == after[steps]:
        return []
    planned = f"is planned anew for train.steps = {after[steps]} in place of {before[steps]}"
    return [f"grpo.schedule = {schedule!r} {planned}: the learning rate jumps to where that plan has it"]


def _noted(checkpoint: Path, key: str) -> Any:
    """What the checkpoint's state says of where it was computed; "" where it says nothing."""
    state = checkpoint / STATE
    return json_object(state).get(key, "") if state.is_file() else ""


def gpu_moved(checkpoint: Path, after: Settings) -> list[str]:
    """A line that says so where other hardware or another library goes on with a run on CUDA: one as good may
    sum in another order."""
    noted = _noted(checkpoint, "gpu")
    here = libraries.describe_gpu() if _kind(after["model", "device"]) == "cuda" else ""
    if not noted or not here or noted == here:
        return []
    return [f"{checkpoint} was written on {noted}; here it is {here}: the run goes on, in other bits"]


def check_instruction_set(checkpoint: Path, after: Settings) -> None:
    """ValueError where what the checkpoint's run computed would come out in other bits here. A checkpoint
    that names no instruction set is older than the name, or none of the C++ kernels served."""
    noted = _noted(checkpoint, "instruction_set")
    device, dtype = _kind(after["model", "device"]), after["model", "dtype"]
    here = backend.instruction_set(device, parse_dtype(dtype))
    if not noted or noted == here:
        return
    way = f"resume it with DUOLOGUE_CPU={noted}"
    if not backend.runs(noted):
        portable = "avx512bf16" if noted == "amx" else "avx2"
        way = f"this machine cannot run {noted}; start a run that is to move with DUOLOGUE_CPU={portable}"
    found = f"here {here or 'none of the C++ kernels'} would serve, which computes other bits of {dtype}"
    raise ValueError(f"{checkpoint} was written with the instruction set {noted}, and {found}: {way}")
