"""Tiny checkpoints with random weights, written by transformers, made when first asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import own_cores  # before torch
import pytest
import torch
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from judge_server import JudgeServer, serving

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (family, what differs from its defaults)
    "llama": ("Llama", {}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 3.0}},
    ),
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
    """The transformers model `name`, also saved in `folder`. No parameter has a special value."""
    import transformers

    family, options = CHECKPOINTS[name]
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 283,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 4,
            **options,
        }
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread if parameter.dim() > 1 else spread + 0.7)
    model.save_pretrained(folder)
    return model


# Files that take longest: of tests that are dealt over processes they begin, so that all end together.
LONGEST = (
    "ranks",
    "triton",
    "real",
    "gpu_sessions",
    "collective",
    "readme",
    "bench",
    "faults_search",
    "run_dir",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Within a file tests stay in order."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Those of the machine, not this worker's share alone."""
    if not own_cores.cores:
        yield
        return
    share = os.sched_getaffinity(0)
    os.sched_setaffinity(0, own_cores.cores)
    yield
    os.sched_setaffinity(0, share)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat and the hat and 3 books", "the deal is 2 hats"] * 5, 275)


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer
) -> Callable[[str], tuple[Path, Any]]:
    """checkpoint(name) -> (folder with a tokenizer too, transformers model). Neither may be changed."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (folder, write_transformers_checkpoint(name, folder))
            tiny_tokenizer.save(folder)
        return made[name]

    return get


@pytest.fixture(params=list(CHECKPOINTS))
def each_checkpoint(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], tuple[Path, Any]]
) -> tuple[Path, Any]:
    """Every checkpoint in turn."""
    return checkpoint(request.param)


# Letters with what stands before them, single digits, punctuation with its newlines, spaces: as in Qwen's.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = [
    "the cat and the hat and more of my 3 books",
    "user assistant system\n\nthe deal is 2 hats, naïve café\n",
] * 5


def write_core(folder: Path, special: list[str], plain: tuple[str, ...] = ()) -> None:
    """tokenizer.json: a byte-level BPE tokenizer with the layout of Qwen's and Llama 3's."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Core

    core = Core(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    core.save(str(folder / "tokenizer.json"))


@pytest.fixture
def tokenizer_pair(tmp_path: Path) -> Callable[..., tuple[Tokenizer, Any]]:
    """make(special, template=None, plain=(), **settings) -> (ours, transformers'), both from one folder.

    A byte-level BPE tokenizer with the layout of Qwen's and Llama 3's, whose special tokens are the given
    ones. `plain` are added tokens that are not special; `settings` go into tokenizer_config.json, of which
    transformers also gets `template`.
    """
    import transformers

    def make(
        special: list[str], template: str | None = None, plain: tuple[str, ...] = (), **settings: Any
    ) -> Any:
        write_core(tmp_path, special, plain)
        named = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        if template is not None:
            named["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named), "utf-8")
        return Tokenizer.from_dir(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)

    return make


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 as it lies on the Hub, with the model's own chat template."""
    import shutil

    import transformers

    trl = pytest.importorskip("trl", reason="trl has the chat templates of the models")

    folder = tmp_path_factory.mktemp("models") / "qwen3-tiny"
    folder.mkdir()
    write_core(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja", folder / "chat_template.jinja")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def judge_server() -> Iterator[JudgeServer]:
    """A judge on loopback whose scores are known."""
    with serving() as server:
        yield server
