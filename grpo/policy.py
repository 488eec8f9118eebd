"""The policy: a checkpoint, an adapter on it, a decoder from nothing, or a frozen copy beside it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from duologue.grpo.config import Config
from duologue.kernels import backend, cores
from duologue.model.checkpoint import is_checkpoint, load_model, load_weights, parse_dtype
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, empty_decoder
from duologue.model.hub import folder_of, is_pinned, local
from duologue.model.lora import LoraDecoder, merged, new_adapter
from duologue.model.peft import CONFIG as ADAPTER_CONFIG
from duologue.model.peft import read_adapter, read_settings
from duologue.model.quantized import quantize
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.games.scripted import ScriptedDialogue
from duologue.rollout.seeds import derive_seed

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")


def check_device(config: Config) -> None:
    """Raise ValueError for a GPU that is not here."""
    device, count = torch.device(config.model.device), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"model.device = {config.model.device!r}: accepted is cpu or one of {count} CUDA devices here"
        )


def check_path(config: Config) -> None:
    """Raise ValueError for a `model.path` that holds no checkpoint."""
    path = config.model.path
    if path and not is_checkpoint(local(path, weights=False)):
        accepted = "a folder with a config.json or an adapter_config.json, or ORG/NAME in the Hub"
        raise ValueError(f"model.path = {path!r} is not a checkpoint: accepted is {accepted}")


def use_device(config: Config) -> None:
    """Make the GPU that is named the current one, which library kernels, streams and events go to. Give the
    cores to the C++ kernels on CPU: torch's OpenMP threads spin after every call and would starve them.
    """
    check_device(config)
    on_cpu = config.model.device == "cpu"
    if on_cpu:
        keep_freed_memory()
    else:
        torch.cuda.set_device(torch.device(config.model.device).index or 0)
    if on_cpu and backend.available():
        backend.lib().set_threads(config.train.threads or cores.thread_count())
        torch.set_num_threads(1)
    elif config.train.threads:
        torch.set_num_threads(config.train.threads)


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free for the next ones. It gives the top of its heap back from 64 MB on,
    and every tensor of 32 MB or more at once, and the system then clears the same pages again: some 10 % of
    a training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def build_policy(
    config: Config, demonstrations: list[ScriptedDialogue], checkpoint: Path | None = None
) -> tuple[Decoder, Tokenizer]:
    """The run's own `checkpoint`, or the one of `model.path`, with an adapter when `lora.rank` asks for one,
    or a Qwen3 decoder from nothing with a tokenizer trained on the demonstrations.
    """
    if checkpoint is not None:
        model, tokenizer = load_policy(checkpoint, config, own=True)
        check_sizes(config, model, checkpoint)
        return model, tokenizer
    if config.model.path:
        folder = config.model.folder
        if _packs(config) and not (folder / ADAPTER_CONFIG).is_file():
            model, tokenizer = load_model(folder, "cpu", parse_dtype(config.model.dtype))
        else:
            model, tokenizer = load_policy(folder, config)
        return with_adapter(model, config), tokenizer
    if not demonstrations:
        needed = "which needs imitation.steps above 0: there is no text to learn from"
        raise ValueError(f"model.path = '' starts from nothing, {needed}")
    texts = [
        line
        for d in demonstrations[:5000]
        for line in (*d.scenario.private_text, *(text for _, text, _ in d.turns))
    ]
    m = config.model
    tokenizer = train_tokenizer(texts, m.vocab_size)
    sizes = ModelConfig(
        model_type="qwen3",
        vocab_size=tokenizer.vocab_size,
        **{size: getattr(m, size) for size in SIZES},
        head_dim=m.head_dim or m.hidden_size // m.num_heads,
        max_position_embeddings=m.max_position,
        dtype=m.dtype,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_ids,
    )
    model = Decoder(sizes)
    model.init_weights(derive_seed(config.train.seed, "weights"))
    return model.to(device=m.device, dtype=parse_dtype(m.dtype)), tokenizer


def load_policy(path: Path, config: Config, own: bool = False) -> tuple[Decoder, Tokenizer]:
    """A checkpoint. An adapter goes on the weights that it names where these are there, otherwise on
    `model.path`; the run's `own` on that in any case, for what it names may have been replaced.
    """
    m, is_adapter = config.model, (path / ADAPTER_CONFIG).is_file()
    base = m.path if (m.folder / "config.json").is_file() else ""
    if base and not own and is_adapter and _names_its_base(path):
        base = ""
    packs = is_adapter and _packs(config)
    model, tokenizer = load_model(path, "cpu" if packs else m.device, parse_dtype(m.dtype), base)
    if packs:
        assert isinstance(model, LoraDecoder)
        model.packed = quantize(model.adapter_off, m.device).packed
        model.adapter.to(m.device)
    return model, tokenizer


def _packs(config: Config) -> bool:
    """Whether frozen weights are packed: they wait on the host, for unpacked they may not fit the device."""
    return bool(config.lora.rank and config.lora.quantize)


def _names_its_base(adapter: Path) -> bool:
    """Whether the weights that an adapter was trained on are there."""
    named = read_settings(adapter).base
    try:
        return bool(named) and (folder_of(named, weights=False) / "config.json").is_file()
    except ValueError:
        return False


def with_adapter(model: Decoder, config: Config) -> Decoder:
    """What is trained: a new adapter on `model`, or the one that came with it, or with `lora.rank` 0 all
    weights, that one merged.
    """
    c = config.lora
    if isinstance(model, LoraDecoder):
        if c.rank not in (0, model.adapter.settings.rank):
            raise ValueError(
                f"lora.rank = {c.rank}: the adapter in {config.model.path} has rank "
                f"{model.adapter.settings.rank}"
            )
        return model if c.rank else merged(model)
    if not c.rank:
        return model
    base = config.model.path if is_pinned(config.model.path) else str(config.model.folder.resolve())
    model = quantize(model, config.model.device) if c.quantize else model
    return LoraDecoder(model, new_adapter(model, c.settings(base), derive_seed(config.train.seed, "adapter")))


def check_sizes(config: Config, model: Decoder, path: Path) -> None:
    """Raise ValueError when a checkpoint to resume from is not of the sizes that [model] names."""
    if config.model.path:
        return
    for key in SIZES:
        wanted, present = getattr(config.model, key), getattr(model.config, key)
        if wanted != present:
            raise ValueError(
                f"{path} has {key} = {present}, but the run's configuration says model.{key} = {wanted}"
            )


@torch.no_grad()
def restore_weights(model: Decoder, folder: Path) -> None:
    """What of `model` is trained becomes what is in `folder`, in place."""
    if isinstance(model, LoraDecoder):
        mine = model.adapter.parameters()
        saved = read_adapter(folder, model.adapter_off).parameters()
    else:
        other = empty_decoder(model.config)
        load_weights(other, folder, "cpu", model.head_weight.dtype)
        mine, saved = model.parameters(), other.parameters()
    for parameter, value in zip(mine, saved, strict=True):
        parameter.copy_(value)


def load_beside(model: Decoder, folder: Path) -> Decoder:
    """The weights in `folder`, without gradient, for use beside `model`: a KL term's reference, or an
    opponent.

    Beside a `LoraDecoder` they are its own base with the folder's adapter, or with none when that changes
    nothing.
    """
    if isinstance(model, LoraDecoder):
        base = model.adapter.settings.base  # which may lie elsewhere since the folder was written
        adapter = read_adapter(folder, model.adapter_off, base).requires_grad_(False)
        return model.adapter_off if adapter.changes_nothing else LoraDecoder(model.adapter_off, adapter)
    weight = model.head_weight
    other = empty_decoder(model.config)
    load_weights(other, folder, weight.device, weight.dtype)
    return other.requires_grad_(False)
