"""Hugging Face checkpoints, in and out: config.json, safetensors in one file or in shards, tokenizer, chat
template.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from duologue.kernels import backend, pages
from duologue.model.atomic import write_folder
from duologue.model.config import ModelConfig, one_or_list
from duologue.model.decoder import Decoder, Linear, empty_decoder
from duologue.model.files import CHECKSUMS, OF_TRAINERS, altered, read_json
from duologue.model.hub import folder_of, is_name
from duologue.model.lora import Adapter, LoraDecoder
from duologue.model.peft import CONFIG as ADAPTER_CONFIG
from duologue.model.peft import read_adapter, read_settings, write_adapter
from duologue.model.tokenizer import TOKENIZER_FILES, Tokenizer
from duologue.model.weights import DTYPES, EMBEDDING, HEAD, INDEX, SINGLE, finite, stored_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

ABSENT = "which is no checkpoint here: give its place as model.path, to export as --base"  # of a base
MOST_FP32 = 100_000_000  # parameters of a checkpoint that a GPU trains in float32 without being told so


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype = {name!r}: accepted is one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    base: str | Path = "",
) -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer in a checkpoint folder; `dtype` None is the one that config.json names (else
    float32).

    A folder with an adapter gives a `LoraDecoder` on `base`, or on the folder that the adapter names, and
    that one's tokenizer unless it has its own. ValueError names what is wrong: a missing file or tensor, a
    surplus one, a shape, a damaged file, a model type.
    """
    folder = Path(path)
    if reason := altered(folder, OF_TRAINERS):
        way = "name another checkpoint, or put a copy of this one back"
        meant = f"if it was changed on purpose, remove {folder / CHECKSUMS}"
        raise ValueError(f"the checkpoint {folder} is damaged ({reason}); {way}; {meant}")
    if (folder / ADAPTER_CONFIG).is_file():
        named = str(base or read_settings(folder).base)
        try:
            below = folder_of(named)
        except ValueError as error:  # of the Hub
            raise ValueError(f"{folder} is an adapter on {named}, {ABSENT}: {error}") from error
        if not (below / "config.json").is_file():
            raise ValueError(f"{folder} is an adapter on {below}, {ABSENT}")
        named = named if is_name(named) else str(below.resolve())
        model, tokenizer = load_model(below, device, dtype)
        tokenizer = _tokenizer_of_adapter(folder, tokenizer)
        _check_vocabulary(folder, tokenizer, model.config)
        return LoraDecoder(model, read_adapter(folder, model, named)), tokenizer
    config = read_config(folder)
    tokenizer = Tokenizer.from_dir(folder)
    _check_vocabulary(folder, tokenizer, config)
    model = empty_decoder(config)
    load_weights(model, folder, device, dtype or parse_dtype(config.dtype))
    return model, tokenizer


def _tokenizer_of_adapter(folder: Path, base: Tokenizer) -> Tokenizer:
    """The adapter's own tokenizer and template, with which it was trained, where its folder holds other ones
    than its base's.
    """
    files = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        return base
    if "tokenizer.json" not in files:
        accepted = "accepted is a whole tokenizer, or none where the base's is meant"
        raise ValueError(f"{folder} has {files[0]} and no tokenizer.json: {accepted}")
    own = Tokenizer.from_dir(folder, base)
    return base if own.equals(base) else own


def _check_vocabulary(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        highest = tokenizer.vocab_size - 1
        raise ValueError(
            f"{folder}: tokenizer.json has the id {highest}, config.json a vocab_size of {config.vocab_size}"
        )


def read_config(folder: Path) -> ModelConfig:
    """config.json as a ModelConfig."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        return ModelConfig.from_hf(read_json(folder / "config.json"))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def is_checkpoint(folder: Path) -> bool:
    """Whether a model's or an adapter's configuration is there."""
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json"))


def natural_dtype(folder: Path, device: str) -> str:
    """The type that a checkpoint runs in where nobody says it: that of its config.json; on a CPU float32 but
    for bfloat16 on a processor that has it. An adapter's is its base's; "" of a folder without a
    checkpoint. float16 becomes bfloat16, for without scaled losses its gradients vanish. ValueError where
    it would be float32 on a GPU, and too large for that to be meant.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        folder = folder_of(read_settings(folder).base, weights=False)
    elif not (folder / "config.json").is_file():
        return ""
    config = read_config(folder)
    if device == "cpu":
        served = backend.instruction_set("cpu", torch.bfloat16) in ("amx", "avx512bf16")
        return "bfloat16" if config.dtype == "bfloat16" and served else "float32"
    n = sum(p.numel() for p in empty_decoder(config).parameters())
    if config.dtype == "float32" and n > MOST_FP32:
        held = f"{folder} is in float32, in which a GPU trains {n / 1e6:,.0f}M parameters slowly"
        raise ValueError(f"model.dtype: {held}; accepted is bfloat16, or float32 where it is said")
    return "bfloat16" if config.dtype == "float16" else config.dtype


def load_weights(model: Decoder, folder: Path, device: str | torch.device, dtype: torch.dtype) -> None:
    """Fill `model` (which may be on the meta device) from the folder; every tensor must match by name and
    shape.

    The parameters are new objects afterwards: make an optimizer later than this.
    """
    wanted = dict(model.named_parameters())
    stored: set[str] = set()
    stored_head: Tensor | None = None
    for name, file, tensor in stored_tensors(folder, wanted):
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old Llama checkpoints carry this table
        like = wanted.get(EMBEDDING if name == HEAD else name)
        if like is None:
            raise ValueError(f"{file}: {name} is no tensor of this {model.config.model_type} model")
        if tensor.shape != like.shape:
            raise ValueError(f"{file}: {name} is {list(tensor.shape)}, the model's is {list(like.shape)}")
        if tensor.dtype not in DTYPES.values():
            raise ValueError(
                f"{file}: {name} has dtype {tensor.dtype}, accepted is one of {', '.join(DTYPES)}"
            )
        value = tensor.to(device=device, dtype=dtype)
        if not finite(value):
            raise ValueError(f"{file}: {name} has NaN or infinity as {dtype}: accepted are finite numbers")
        stored.add(name)
        if name in wanted:
            _set(model, name, value)
        else:
            stored_head = value  # of a tied model: some write it all the same
    if stored_head is not None:
        _use_stored_head(model, stored_head, EMBEDDING in stored)
    if torch.device(device).type == "cpu":
        pages.together(list(model.parameters()))


def _set(model: Decoder, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


def _use_stored_head(model: Decoder, head: Tensor, beside_embedding: bool) -> None:
    """As in transformers what is stored counts: one tensor serves as both, two that differ are not tied."""
    if not beside_embedding:
        _set(model, EMBEDDING, head)
    elif not torch.equal(head, model.head_weight):
        with torch.device("meta"):
            model.lm_head = Linear(model.config.hidden_size, model.config.vocab_size)
        _set(model, HEAD, head)
        model.config = replace(model.config, tie_word_embeddings=False)


def save_model(
    model: Decoder, tokenizer: Tokenizer, path: str | Path, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a folder that transformers and `load_model` load. It appears whole, or what was there before
    stays.
    """
    write_folder(Path(path), lambda folder: write_checkpoint(model, tokenizer, folder, max_shard_bytes))


def write_checkpoint(
    model: Decoder, tokenizer: Tokenizer, folder: Path, max_shard_bytes: int = 5_000_000_000
) -> None:
    """The files of a checkpoint, into an existing folder; of a `LoraDecoder` its adapter, which names the
    folder of its base.
    """
    if isinstance(model, LoraDecoder):
        tokenizer.save(folder)
        write_adapter(model.adapter, folder)
        return
    raw = model.config.to_hf()
    raw["dtype"] = raw["torch_dtype"] = str(model.head_weight.dtype).removeprefix("torch.")
    if tokenizer.eos_token_ids:
        raw["eos_token_id"] = one_or_list(tokenizer.eos_token_ids)
    if tokenizer.bos_token_id is not None:
        raw["bos_token_id"] = tokenizer.bos_token_id
    kept = {key: value for key, value in tokenizer.generation.items() if value is not None}
    generation = {"bos_token_id": raw["bos_token_id"], **kept, "eos_token_id": raw["eos_token_id"]}
    for name, value in (("config.json", raw), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2), "utf-8")
    tokenizer.save(folder)
    _write_tensors(
        {k: v.detach().cpu().contiguous() for k, v in model.named_parameters()}, folder, max_shard_bytes
    )


def on_host(model: Decoder) -> Decoder:
    """A copy, in host memory, of what `write_checkpoint` writes of `model`."""
    if isinstance(model, LoraDecoder):
        pairs = {name: (host_copy(a), host_copy(b)) for name, (a, b) in model.adapter.pairs.items()}
        return LoraDecoder(model.adapter_off, Adapter(model.adapter.settings, pairs))
    copy = empty_decoder(model.config)
    for name, parameter in model.named_parameters():
        _set(copy, name, host_copy(parameter))
    return copy


def host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


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
