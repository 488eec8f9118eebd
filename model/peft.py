"""An adapter's files as `peft` writes and reads them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from duologue.model.config import LARGEST_FLOAT
from duologue.model.decoder import Decoder
from duologue.model.files import read_json
from duologue.model.hub import is_pinned, split
from duologue.model.lora import TARGETS, Adapter, LoraSettings, linears
from duologue.model.weights import DTYPES, finite, opened
from safetensors.torch import save_file
from torch import Tensor

MAX_RANK = 2**20
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model."  # peft's, before the decoder's own name of a layer's linear
# Settings of peft that would change what is computed; each is refused unless it is empty or as here.
REFUSED: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "velora_config": None,
    "monteclora_config": None,
}
# Beginnings that leave the base weights as they are (None is peft's own). Others (PiSSA, CorDA, OLoRA, LoftQ,
# LoRA-GA) take what A and B begin with out of the base, which only peft can do again.
INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
USUAL_TARGETS = ["q_proj", "v_proj"]  # peft's for these families
NEAR = ("lm_head", "model.embed_tokens")  # modules of the checkpoint that can have no adapter here


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, into an existing folder; `peft` loads it."""
    s = adapter.settings
    base, commit = split(s.base)
    raw = {
        "task_type": "CAUSAL_LM",
        "target_modules": list(s.targets),
        "rank_pattern": s.rank_pattern,
        "alpha_pattern": s.alpha_pattern,
        "bias": "none",
        "inference_mode": True,
        **s.raw,
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        **({"revision": commit} if commit else {}),
        "r": s.rank,
        "lora_alpha": s.alpha,
        "lora_dropout": s.dropout,
        "use_rslora": s.rslora,
    }
    (folder / CONFIG).write_text(json.dumps(raw, indent=2), "utf-8")
    tensors = {
        f"{PREFIX}{name}.lora_{letter}.weight": tensor.detach().cpu().contiguous()
        for name, pair in adapter.pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})


def read_settings(folder: Path) -> LoraSettings:
    """adapter_config.json; ValueError names what is no LoRA or not computed here."""
    raw, file = read_json(folder / CONFIG), folder / CONFIG
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type = {raw.get('peft_type')!r}, accepted is 'LORA'")
    for key, accepted in REFUSED.items():
        if raw.get(key) and raw[key] != accepted:
            raise ValueError(f"{file}: {key} = {raw[key]!r}, accepted is {accepted!r}")
    _check_finite(file, raw)
    init = raw.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in INIT or type(init) in (int, float):
        accepted = ", ".join(map(repr, INIT))
        raise ValueError(f"{file}: init_lora_weights = {init!r}, accepted is one of {accepted}")
    base, dropout = (
        raw.get("base_model_name_or_path"),
        _number(file, "lora_dropout", raw.get("lora_dropout", 0.0)),
    )
    if not isinstance(base, str | None):
        raise ValueError(f"{file}: base_model_name_or_path = {base!r}, accepted is a string")
    if base and is_pinned(commit := f"{base}@{raw.get('revision')}"):
        base = commit
    if not 0 <= dropout < 1:
        raise ValueError(f"{file}: lora_dropout = {dropout}, accepted is from 0 to below 1")
    rslora = raw.get("use_rslora", False)
    if type(rslora) is not bool:
        raise ValueError(f"{file}: use_rslora = {rslora!r}, accepted is true or false")
    targets = _targets(file, raw)
    return LoraSettings(
        rank=_rank(file, "r", raw.get("r")),
        alpha=_number(file, "lora_alpha", raw.get("lora_alpha")),
        dropout=dropout,
        targets=tuple(sorted(targets)) if isinstance(targets, list) else TARGETS,
        base=base or "",
        rslora=rslora,
        rank_pattern={
            k: _rank(file, f"rank_pattern {k}", v) for k, v in _patterns(file, raw, "rank_pattern")
        },
        alpha_pattern={
            k: _number(file, f"alpha_pattern {k}", v) for k, v in _patterns(file, raw, "alpha_pattern")
        },
        raw={**raw, "target_modules": targets},
    )


def _check_finite(file: Path, value: Any, key: str = "") -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{file}: {key} = {value}, accepted is a finite number")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for inner, item in items:
        _check_finite(file, item, f"{key}.{inner}" if key else str(inner))


def _rank(file: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise ValueError(f"{file}: {key} = {value!r}, accepted is an integer >= 1 and up to {MAX_RANK}")
    return value


def _number(file: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > LARGEST_FLOAT:
        raise ValueError(f"{file}: {key} = {value!r}, accepted is a number")
    return float(value)


def _patterns(file: Path, raw: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    """The pairs of rank_pattern or alpha_pattern, each a pattern of the ends of names."""
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{file}: {key} = {patterns!r}, accepted are values by pattern")
    for pattern in patterns:
        _compiled(file, key, pattern)
    return list(patterns.items())


def _compiled(file: Path, key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{file}: {key} has {pattern!r}, accepted is a regular expression: {error}"
        ) from error


def _targets(file: Path, raw: dict[str, Any]) -> list[str] | str:
    targets = USUAL_TARGETS if raw.get("target_modules") is None else raw["target_modules"]
    if isinstance(targets, str):
        _compiled(file, "target_modules", targets)
        for key in ("layers_to_transform", "layers_pattern"):
            if raw.get(key) is not None:
                raise ValueError(
                    f"{file}: {key} = {raw[key]!r} beside a pattern of targets, accepted is null"
                )
    for key, value in (("target_modules", targets), ("exclude_modules", raw.get("exclude_modules") or [])):
        if not isinstance(value, str) and not _all_are(value, str):
            raise ValueError(f"{file}: {key} = {value!r}, accepted is a list of names, or a pattern")
    layers = raw.get("layers_to_transform")
    if not _all_are(layers if isinstance(layers, list) else [layers or 0], int):
        raise ValueError(
            f"{file}: layers_to_transform = {layers!r}, accepted is null, a number or a list of them"
        )
    pattern = raw.get("layers_pattern") or []
    if not isinstance(pattern, str) and not _all_are(pattern, str):
        raise ValueError(f"{file}: layers_pattern = {pattern!r}, accepted is null, a name or a list of them")
    for each in (pattern,) if isinstance(pattern, str) else pattern:
        _compiled(file, "layers_pattern", each)
    if isinstance(excluded := raw.get("exclude_modules"), str):
        _compiled(file, "exclude_modules", excluded)
    chosen: list[str] | str = targets
    return chosen


def _all_are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _is_target(raw: dict[str, Any], name: str) -> bool:
    """Whether the settings promise an adapter of the module `name`, by peft's rules."""
    targets: list[str] | str = raw["target_modules"]
    excluded, layers = (raw.get(key) for key in ("exclude_modules", "layers_to_transform"))
    if excluded and _named(excluded, name):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return name not in NEAR
    if not _named(targets, name):
        return False
    if layers is None or layers == []:
        return True
    patterns = raw.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name):
            return int(match["index"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _named(modules: list[str] | str, name: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def read_adapter(folder: Path, model: Decoder, base: str = "") -> Adapter:
    """The adapter in a folder, in `model`'s dtype and on its device; `base` is where the base is now.

    ValueError names a tensor that does not belong to `model`, or that the settings promise and is not there.
    """
    settings = read_settings(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}")
    with opened(file) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    if near := [name for name in NEAR if _is_target(settings.raw, name)]:
        raise ValueError(
            f"{folder / CONFIG}: target_modules has {near[0]}, accepted are {', '.join(TARGETS)}"
        )
    pairs = {}
    for name, weight in linears(model).items():
        if not _is_target(settings.raw, f"model.{name}"):
            continue
        rank = settings.rank_of(name)
        a, b = (_take(file, tensors, f"{PREFIX}{name}.lora_{letter}.weight", weight) for letter in "AB")
        shapes, wanted = ([*a.shape], [*b.shape]), ([rank, weight.shape[1]], [weight.shape[0], rank])
        if shapes != wanted:
            raise ValueError(
                f"{file}: A and B of {name} are {shapes[0]} and {shapes[1]}, the model's are {wanted[0]} and "
                f"{wanted[1]}" + (" by rank_pattern" if settings.rank_pattern else "")
            )
        pairs[name] = (a, b)
    if tensors or not pairs:
        name, names = next(iter(tensors), "nothing"), ", ".join(TARGETS)
        raise ValueError(
            f"{file}: {name} belongs to no linear of this model; accepted are {names} of its layers"
        )
    return Adapter(replace(settings, base=base or settings.base), pairs)


def _take(file: Path, tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The tensor `name` as `like`; it is gone from `tensors` then."""
    if name not in tensors:
        raise ValueError(f"{file} lacks {name}, which target_modules promises")
    tensor = tensors.pop(name)
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"{file}: {name} has dtype {tensor.dtype}, accepted is one of {', '.join(DTYPES)}")
    value = tensor.to(like)
    if not finite(value):
        raise ValueError(f"{file}: {name} has NaN or infinity as {like.dtype}: accepted are finite numbers")
    return value
