"""What this installation runs on, and a check that its central promise holds here."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from duologue.kernels import backend, cores, libraries
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, score
from duologue.rollout.engine import kv_memory
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams
from rich.console import Console
from rich.table import Table


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def largest_mismatch(device: str) -> float:
    """Largest difference between the engine's log-probs and the training forward's, on a small random
    model."""
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    model = Decoder(config)
    model.init_weights(0)
    model.to(device)
    prompts = [list(range(1, 3 + 7 * i)) for i in range(5)]
    completions = Engine(model, cache_tokens=2048).generate(prompts, SamplingParams(max_new_tokens=24))
    with torch.no_grad():
        scored = score(model, [p + c.token_ids for p, c in zip(prompts, completions, strict=True)])
    return max(
        float((torch.tensor(c.logprobs) - s.cpu()[len(p) - 1 :]).abs().max())
        for p, c, s in zip(prompts, completions, scored, strict=True)
    )


def examine() -> int:
    """Print the findings; 1 when the C++ kernels are in use and are not exact, else 0."""
    table = Table(show_header=False, box=None)
    cuda = torch.cuda.is_available()
    table.add_row("duologue", version("duologue"))
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    for name in ("triton", "flash-attn", "liger-kernel"):
        table.add_row(name, version(name))
    table.add_row(
        "device",
        torch.cuda.get_device_name() if cuda else f"cpu ({platform.processor() or platform.machine()})",
    )
    table.add_row("cores", cores.describe())
    table.add_row("CPU tensors", backend.describe())
    table.add_row("CUDA tensors", backend.describe("cuda") if cuda else "no CUDA device")
    table.add_row("CUDA attention, exact = false", libraries.describe_attention())
    table.add_row("CUDA attention, backward", libraries.describe_attention_backward())
    if cuda:
        table.add_row("KV pool, cuda", kv_memory.describe(torch.device("cuda")))
    mismatch = largest_mismatch("cpu")
    broken = backend.available() and mismatch != 0.0
    verdict = "exact" if mismatch == 0.0 else "NOT EXACT" if broken else "approximate, as PyTorch is"
    table.add_row("rollout against trainer, cpu", f"largest log-prob difference {mismatch:.1e}: {verdict}")
    if cuda:
        table.add_row(
            "rollout against trainer, cuda", f"largest log-prob difference {largest_mismatch('cuda'):.1e}"
        )
    Console(highlight=False).print(table)
    return 1 if broken else 0
