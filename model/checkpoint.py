"""Hugging Face checkpoints, in and out: config.json, safetensors (one file or shards with an index), tokenizer, chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder
from duologue.model.files import write_folder
from duologue.model.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype = {name!r}: accepted is one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer in a checkpoint folder; `dtype` None keeps the checkpoint's.

    ValueError names what is wrong: a missing file or tensor, a surplus one, a shape, a truncated file, an unknown model type.
    """
    folder = Path(path)
    config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    load_weights(model, folder, device, dtype or parse_dtype(config.dtype))
    return model, Tokenizer.from_dir(folder)


def read_config(folder: Path) -> ModelConfig:
    """config.json as a ModelConfig, with the eos ids of generation_config.json when it has them."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    return ModelConfig.from_hf(raw)


def load_weights(model: Decoder, folder: Path, device: str | torch.device, dtype: torch.dtype) -> None:
    """Fill `model` (which may be on the meta device) from the folder's safetensors; every tensor must match by name and shape."""
    wanted = dict(model.named_parameters())
    found: set[str] = set()
    for name, file, tensor in _tensors(folder):
        if name == "lm_head.weight" and model.lm_head is None:
            continue  # some tied checkpoints store the head all the same
        if name not in wanted:
            raise ValueError(f"{file} has a tensor {name!r} that a {model.config.model_type} model does not have")
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{file}: {name} has shape {list(tensor.shape)}, the config asks for {list(wanted[name].shape)}")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device=device, dtype=dtype)))
        found.add(name)
    if missing := sorted(wanted.keys() - found):
        raise ValueError(f"{folder} lacks {len(missing)} tensors of the model, the first is {missing[0]!r}")


def _tensors(folder: Path) -> Iterator[tuple[str, Path, Tensor]]:
    if (folder / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")
    for name in files:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder / INDEX} names the shard {name}, which is not there")
        try:
            with safe_open(str(file), framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - the handle is no dict
                    yield key, file, handle.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read, it is truncated or damaged: {error}") from error


def save_model(model: Decoder, tokenizer: Tokenizer, path: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that transformers and `load_model` load. It appears whole or not at all."""
    write_folder(Path(path), lambda folder: write_checkpoint(model, tokenizer, folder, max_shard_bytes))


def write_checkpoint(model: Decoder, tokenizer: Tokenizer, folder: Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """The files of a checkpoint, into an existing folder."""
    config = model.config
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    raw = {**config.to_hf(), "dtype": dtype, "torch_dtype": dtype}
    stops = sorted(tokenizer.eos_token_ids)
    raw["eos_token_id"] = stops if len(stops) > 1 else next(iter(stops), raw["eos_token_id"])
    raw["bos_token_id"] = config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    (folder / "config.json").write_text(json.dumps(raw, indent=2), "utf-8")
    generation = {"bos_token_id": raw["bos_token_id"], "eos_token_id": raw["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), "utf-8")
    tokenizer.save(folder)
    _write_tensors({k: v.detach().cpu().contiguous() for k, v in model.named_parameters()}, folder, max_shard_bytes)


def _write_tensors(tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], str(folder / SINGLE), metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(folder / name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
