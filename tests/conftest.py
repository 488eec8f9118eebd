"""Tiny checkpoints with random weights, written by transformers: one per family and option, made when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.model.tokenizer import Tokenizer, train_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}  # fmt: skip
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (family, what differs from its defaults)
    "llama": ("Llama", {}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 3.0}}),
    "llama-attention-bias": ("Llama", {"attention_bias": True}),
    "llama-mlp-bias": ("Llama", {"mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4, "head_dim": 20}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3-tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-attention-bias": ("Qwen3", {"head_dim": 12, "attention_bias": True}),
}


def write_transformers_checkpoint(name: str, folder: Path) -> Any:
    """The transformers model `name` of CHECKPOINTS, also saved in `folder`. No parameter is left at a special value."""
    import transformers

    family, options = CHECKPOINTS[name]
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 283, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
            "bos_token_id": 0, "eos_token_id": 4, **options,
        }
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread if parameter.dim() > 1 else spread + 0.7)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat and the hat and 3 books", "the deal is 2 hats"] * 5, 275)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Callable[[str], tuple[Path, Any]]:
    """checkpoint(name) -> (folder, transformers model); the folder holds a tokenizer too. Neither may be changed."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (folder, write_transformers_checkpoint(name, folder))
            tiny_tokenizer.save(folder)
        return made[name]

    return get


@pytest.fixture(params=list(CHECKPOINTS))
def each_checkpoint(request: pytest.FixtureRequest, checkpoint: Callable[[str], tuple[Path, Any]]) -> tuple[Path, Any]:
    """Every checkpoint in turn."""
    return checkpoint(request.param)
