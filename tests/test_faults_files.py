"""Any damage to any file of a checkpoint: what transformers makes of it, or one line that says what is wrong.

Hypothesis drops, doubles, cuts and retypes keys and bytes of every file. The cases are the same in every run;
FAULT_CASES says how many there are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_core, write_transformers_checkpoint
from duologue.model.checkpoint import load_model, read_config, save_model
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder
from duologue.model.tokenizer import Tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("FAULT_CASES", 1200))
IDS = torch.arange(24).view(2, 12)
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 3.5, 1e-3, 10**30, 2**40, float("inf"), float("nan"),
    "", "x", "2", "true", "default", "linear", "yarn", [], [1], ["x"], [[]], {}, {"a": 1}, {"content": "x"},
]  # fmt: skip
WORDS = [
    "the cat and the hat",
    "  two books ",
    "user\n\nI take 2",
    "<|im_end|>",
    "<think>the</think>",
    "café",
]
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATE = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
Paths = list[tuple[Any, ...]]


def write_folder(folder: Path, sharded: bool) -> None:
    """A tiny checkpoint with every file that one can have."""
    write_transformers_checkpoint("qwen3", folder)
    write_core(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ("<think>", "</think>"))
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>", "special": True},
        "additional_special_tokens": ["<think>"],
        "added_tokens_decoder": {"300": {"content": "<|endoftext|>", "special": True}},
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    generation = {"eos_token_id": [2, 0], "bos_token_id": 0, "temperature": 0.6, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16}
    config |= {"rope_scaling": yarn, "rope_theta": 10_000.0, "sliding_window": 4, "use_sliding_window": False}
    config |= {"vocab_size": 320, "max_window_layers": 1, "rope_parameters": None}
    config["hidden_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))


def write_peft(base: Path, folder: Path) -> None:
    """An adapter by peft that makes a difference."""
    import peft
    import transformers

    settings = {"r": 2, "lora_alpha": 6, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 2}}
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], **settings)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base)}))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint in one file and in shards, and an adapter on the first."""
    made = {}
    for name in ("single", "sharded"):
        folder = made[name] = tmp_path_factory.mktemp(name)
        write_folder(folder, name == "sharded")
        model = Decoder(read_config(folder))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        keep = {file.name: file.read_bytes() for file in folder.glob("*.json")}
        save_model(model, Tokenizer.from_dir(folder), folder, 10_000 if name == "sharded" else 10**9)
        for file, data in keep.items():
            (folder / file).write_bytes(data)
    made["adapter"] = tmp_path_factory.mktemp("adapter")
    write_peft(made["single"], made["adapter"])
    return made


# ---- damages -----------------------------------------------------------------------------------------------


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from paths(inner, (*at, key))


def doubled(value: Any, path: tuple[Any, ...], other: Any) -> str:
    """JSON text in which the key at `path` is there twice, last with another value."""
    if not path:
        return json.dumps(value)
    if isinstance(value, list):
        inner = [doubled(v, path[1:], other) if i == path[0] else json.dumps(v) for i, v in enumerate(value)]
        return f"[{', '.join(inner + (inner[path[0] : path[0] + 1] if len(path) == 1 else []))}]"
    inner = [
        f"{json.dumps(k)}: {doubled(v, path[1:], other) if k == path[0] else json.dumps(v)}"
        for k, v in value.items()
    ]
    more = [f"{json.dumps(path[0])}: {json.dumps(other)}"] if len(path) == 1 else []
    return "{" + ", ".join(inner + more) + "}"


def damaged_json(data: bytes, draw: Any) -> bytes:
    value = json.loads(data)
    shallow = [path for path in paths(value) if len(path) < 3 or path[-2] not in ("vocab", "merges")]
    path = draw(st.sampled_from(shallow))
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    match draw(st.sampled_from(["drop", "retype", "retype", "retype", "double", "add"])):
        case "drop":
            del owner[path[-1]]
        case "retype":
            owner[path[-1]] = draw(st.sampled_from(VALUES))
        case "double":
            return doubled(value, path, draw(st.sampled_from(VALUES))).encode()
        case "add":
            names = [
                "is_causal",
                "per_layer_config",
                "layer_types",
                "partial_rotary_factor",
                "dtype",
                "mystery",
            ]
            target = owner if isinstance(owner, dict) else value
            target[draw(st.sampled_from(names))] = draw(st.sampled_from(VALUES))
    return json.dumps(value).encode()


def damaged_bytes(data: bytes, draw: Any) -> bytes:
    at = draw(st.integers(0, len(data) - 1) | st.integers(0, min(len(data) - 1, 800)))
    match draw(st.sampled_from(["cut", "flip", "flip", "insert", "remove", "empty", "append"])):
        case "cut":
            return data[:at]
        case "flip":
            return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
        case "insert":
            return data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
        case "remove":
            return data[:at] + data[at + draw(st.integers(1, 64)) :]
        case "append":
            return data + draw(st.binary(min_size=1, max_size=9))
    return b""


def read(load: Callable[[], Any]) -> Any:
    """What it returns, or None where it says in one line why not."""
    try:
        return load()
    except (ValueError, OSError) as error:
        said = str(error)
    assert said
    assert "\n" not in said
    return None


def theirs(load: Callable[[], Any]) -> Any:
    """What transformers makes of it; None where it makes nothing, as of a null that is a default here."""
    try:
        return load()
    except Exception:
        return None


def the_model(folder: Path) -> None:
    """Ours and transformers' logits of a damaged folder; where it makes up weights it is no oracle."""
    import transformers

    def ours() -> torch.Tensor:
        model, tokenizer = load_model(folder)
        tokenizer.encode("the hat")
        with torch.no_grad():
            return model(IDS)

    def expected() -> torch.Tensor | None:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True
        )
        if info["missing_keys"]:
            return None
        with torch.no_grad():
            return model.eval()(IDS).logits.float()

    found = read(ours)
    oracle = None if found is None else theirs(expected)
    if oracle is not None:
        torch.testing.assert_close(found, oracle, atol=1e-2, rtol=1e-2, equal_nan=True)


def the_tokenizer(folder: Path) -> None:
    """The same of ids, of texts, and of a conversation where the template can be compiled.

    transformers' general class reads tokenizer.json as it is; what AutoTokenizer takes depends on more files.
    """
    import transformers

    def ours() -> tuple[Tokenizer, list[list[int]], list[str]]:
        tokenizer = Tokenizer.from_dir(folder)
        ids = [tokenizer.encode(text) for text in WORDS]
        return tokenizer, ids, [tokenizer.decode(i) for i in ids]

    found = read(ours)
    tokenizer = found and theirs(lambda: transformers.PreTrainedTokenizerFast.from_pretrained(folder))
    if not tokenizer:
        return
    _, ids, texts = found
    assert texts == theirs(lambda: tokenizer.batch_decode(ids, skip_special_tokens=True))
    chat = read(lambda: found[0].chat)
    if chat is None:
        return
    messages = [{"role": "system", "content": WORDS[0]}, {"role": "user", "content": WORDS[2]}]
    whole = theirs(
        lambda: tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=False,
            tokenizer_kwargs={"truncation": False, "padding": False},
        )
    )
    assert whole in (None, [*chat.open(ids[0]), *chat.heard(ids[2]), *chat.reply()])


def the_adapter(folder: Path) -> None:
    """Ours and peft's logits."""
    import peft
    import transformers

    def ours() -> tuple[str, torch.Tensor]:
        model, _ = load_model(folder)
        assert isinstance(model, LoraDecoder)
        with torch.no_grad():
            return model.adapter.settings.base, model(IDS)

    def expected(base: str) -> torch.Tensor:
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        with torch.no_grad():
            return peft.PeftModel.from_pretrained(plain, folder).eval()(IDS).logits

    found = read(ours)
    oracle = None if found is None else theirs(lambda: expected(found[0]))
    if oracle is not None:
        torch.testing.assert_close(found[1], oracle, atol=1e-2, rtol=1e-2, equal_nan=True)


FILES = {
    "config.json": the_model,
    "generation_config.json": the_model,
    "tokenizer.json": the_tokenizer,
    "tokenizer_config.json": the_tokenizer,
    "model.safetensors": the_model,
    "model.safetensors.index.json": the_model,
    "model-00002-of": the_model,
    "adapter_config.json": the_adapter,
    "adapter_model.safetensors": the_adapter,
}
SHARES = {
    "config.json": 4,
    "tokenizer.json": 3,
    "tokenizer_config.json": 3,
    "model.safetensors": 2,
    "adapter_config.json": 2,
}
SHARE = -(-CASES // sum(SHARES.get(name, 1) for name in FILES))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_means_what_transformers_makes_of_it_or_is_refused(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    kinds = {"model.safetensors.index.json": "sharded", "model-00002-of": "sharded"}
    base = bases["adapter" if name.startswith("adapter") else kinds.get(name, "single")]
    original = next(file for file in base.iterdir() if file.name.startswith(name))
    data = original.read_bytes()

    @settings(
        max_examples=SHARES.get(name, 1) * SHARE,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def search(drawn: st.DataObject) -> None:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        by_key = original.suffix == ".json" and drawn.draw(st.integers(0, 3)) > 0
        damage = damaged_json if by_key else damaged_bytes
        (folder / original.name).write_bytes(damage(data, drawn.draw))
        FILES[name](folder)

    search()
