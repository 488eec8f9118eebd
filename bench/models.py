"""The models that the benches run: random weights in well-known shapes, ours and transformers' alike."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from duologue.model.checkpoint import load_weights, parse_dtype, read_config
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder

# How transformers' `generate` draws: from the full distribution, to the last token.
SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "top_k": 0,
    "top_p": 1.0,
    "temperature": 1.0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
SHAPES: dict[str, dict[str, Any]] = {
    "4.2M": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
        "vocab_size": 4096,
        "dtype": "float32",
    },
    "91M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2304,
        "vocab_size": 8192,
        "dtype": "bfloat16",
    },
}
TINY = [  # settings of a decoder that a run makes from nothing
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=16",
]
QWEN3 = {  # name: hidden, inner, layers, heads
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12_288, 36, 32),
}


def both(name: str, device: str, max_positions: int = 512) -> tuple[Any, Decoder]:
    """transformers' model of one of `SHAPES` and ours, with the same weights."""
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        theirs = make_checkpoint(shape, Path(folder), max_positions).to(device)
        ours = Decoder(read_config(Path(folder)))
        load_weights(ours, Path(folder), device, parse_dtype(shape["dtype"]))
    return theirs, ours


def make_checkpoint(shape: dict[str, Any], folder: Path, max_positions: int = 512) -> Any:
    """A random Qwen3 checkpoint in `folder`, and transformers' model of it."""
    import transformers

    sizes = {k: v for k, v in shape.items() if k != "dtype"}
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **sizes,
        head_dim=64,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        initializer_range=0.02,
    )
    model = transformers.Qwen3ForCausalLM(config).to(parse_dtype(shape["dtype"])).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def qwen3(name: str, device: str) -> Decoder:
    """Random weights in one of Qwen3's shapes, bf16."""
    hidden, inner, layers, heads = QWEN3[name]
    tied = name != "8B"
    return random_qwen3(
        device, torch.bfloat16, hidden=hidden, inner=inner, layers=layers, heads=heads, tied=tied
    )


def random_qwen3(
    device: str,
    dtype: torch.dtype,
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int = 8,
    head_dim: int = 128,
    vocab: int = 151_936,
    tied: bool = True,
) -> Decoder:
    """Random weights, made on the device."""
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(config).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in parameter_name else parameter.normal_(std=0.02)
    return model


def alone(name: str, device: str, max_positions: int = 512) -> Decoder:
    """Ours of one of `SHAPES`, with random weights of its own."""
    s = SHAPES[name]
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=s["vocab_size"],
        hidden_size=s["hidden_size"],
        intermediate_size=s["intermediate_size"],
        num_layers=s["num_hidden_layers"],
        num_heads=s["num_attention_heads"],
        num_kv_heads=s["num_key_value_heads"],
        head_dim=64,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
    )
    model = Decoder(config)
    model.init_weights(0)
    return model.to(device=device, dtype=parse_dtype(s["dtype"]))


def chosen(parser: ArgumentParser, args: Namespace, max_positions: int) -> tuple[Any, Decoder]:
    """transformers' model and ours, as `--model` and `--device` say. In Qwen3's shapes ours alone; with
    `--only ours` too, which then waits for no other library.
    """
    if args.model in SHAPES and args.only is None:
        return both(args.model, args.device, max_positions)
    if args.model in SHAPES:
        return None, alone(args.model, args.device, max_positions)
    if args.only is None:
        parser.error(
            f"--model {args.model}: its weights are made here, without transformers; add --only ours"
        )
    return None, qwen3(args.model, args.device)
