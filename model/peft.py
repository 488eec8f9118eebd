"""An adapter's files as `peft` writes and reads them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from duologue.model.decoder import Decoder
from duologue.model.lora import TARGETS, Adapter, LoraSettings, linears
from duologue.model.tokenizer import read_json
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model."  # peft's, before the decoder's own name of a layer's linear
# Settings of peft that would change what is computed; each is refused unless it is empty or as here.
REFUSED: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
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
}


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, into an existing folder; `peft` loads it."""
    s = adapter.settings
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": s.base,
        "r": s.rank,
        "lora_alpha": s.alpha,
        "lora_dropout": s.dropout,
        "target_modules": list(s.targets),
        "bias": "none",
        "use_rslora": s.rslora,
        "inference_mode": True,
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
    rank, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{file}: r = {rank!r}, accepted is an integer >= 1")
    if not isinstance(alpha, int | float):
        raise ValueError(f"{file}: lora_alpha = {alpha!r}, accepted is a number")
    return LoraSettings(
        rank=rank,
        alpha=float(alpha),
        dropout=float(raw.get("lora_dropout", 0.0)),
        targets=tuple(sorted(targets))
        if isinstance(targets, list)
        else TARGETS,  # else a pattern; the tensors tell
        base=raw.get("base_model_name_or_path") or "",
        rslora=bool(raw.get("use_rslora", False)),
    )


def read_adapter(folder: Path, model: Decoder, base: str = "") -> Adapter:
    """The adapter in a folder, in `model`'s dtype and on its device; `base` is where the base is now.

    ValueError names a tensor that does not belong to `model`.
    """
    settings = read_settings(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}")
    try:
        tensors = load_file(str(file))
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read, it is truncated or damaged: {error}") from error
    pairs = {}
    for name, weight in linears(model).items():
        a, b = (tensors.pop(f"{PREFIX}{name}.lora_{letter}.weight", None) for letter in "AB")
        if a is None and b is None:
            continue
        found = [None if t is None else [*t.shape] for t in (a, b)]
        wanted = [[settings.rank, weight.shape[1]], [weight.shape[0], settings.rank]]
        if a is None or b is None or found != wanted:
            raise ValueError(
                f"{file}: A and B of {name} are {found[0]} and {found[1]}, the model's are {wanted[0]} and "
                f"{wanted[1]}"
            )
        pairs[name] = (a.to(weight), b.to(weight))
    if tensors or not pairs:
        name, names = next(iter(tensors), "nothing"), ", ".join(TARGETS)
        raise ValueError(
            f"{file}: {name} belongs to no linear of this model; accepted are {names} of its layers"
        )
    return Adapter(replace(settings, base=base or settings.base), pairs)
