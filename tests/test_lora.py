"""LoRA against `peft`: outputs, gradients and files; and the engine's promise with rows of several adapters
in one step.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.kernels import backend
from duologue.model.checkpoint import load_model, save_model
from duologue.model.decoder import Decoder, score
from duologue.model.lora import (
    TARGETS,
    Adapter,
    AdapterRows,
    LoraDecoder,
    LoraSettings,
    merged,
    new_adapter,
)
from duologue.model.peft import read_adapter, write_adapter
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import Completion, SamplingParams

needs_cpp = pytest.mark.skipif(
    not backend.available(), reason="bitwise equality is a promise of the C++ kernels, which are not built"
)
Checkpoint = Callable[[str], tuple[Path, Any]]
VOCAB = 275


def random_adapter(model: Decoder, seed: int, /, **settings: Any) -> Adapter:
    adapter = new_adapter(model, LoraSettings(**{"rank": 4, "alpha": 8.0, **settings}), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in adapter.pairs.values():
            b.copy_(0.3 * torch.randn(b.shape, generator=generator))
    return adapter


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(folder, dtype=dtype)[0]


# ---- against peft ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-attention-bias", "qwen2", "qwen3-tied"])
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")])
def test_peft_loads_our_adapter_and_computes_the_same(
    checkpoint: Checkpoint, tmp_path: Path, name: str, targets: tuple[str, ...]
) -> None:
    import peft
    import transformers

    folder, _ = checkpoint(name)
    base = load_base(folder)
    ours = LoraDecoder(base, random_adapter(base, 1, targets=targets, base=str(folder)))
    write_adapter(ours.adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path
    ).eval()
    ids = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-4)
    with theirs.disable_adapter():
        torch.testing.assert_close(ours.adapter_off(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert float((ours(ids) - ours.adapter_off(ids)).detach().abs().max()) > 0.1


def test_gradients_are_those_of_peft_and_only_the_adapter_has_any(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    import peft
    import transformers

    folder, _ = checkpoint("qwen3")
    base = load_base(folder)
    ours = LoraDecoder(base, random_adapter(base, 2))
    write_adapter(ours.adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path, is_trainable=True
    )
    ids = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        logits = model(ids) if model is ours else model(ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(expected) == 2 * len(ours.adapter.pairs) == 2 * 14
    for name, pair in ours.adapter.pairs.items():
        for letter, tensor in zip("AB", pair, strict=True):
            wanted = expected[f"base_model.model.model.{name}.lora_{letter}.default.weight"]
            torch.testing.assert_close(tensor.grad, wanted, rtol=1e-3, atol=1e-6)
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in ours.named_parameters() if p.grad is not None
    ]
    assert all(not p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["down_proj", "k_proj"], "r": 3},
        {"target_modules": "all-linear"},
    ],
)
def test_an_adapter_made_by_peft_loads(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, Any]
) -> None:
    import peft
    import transformers

    folder, _ = checkpoint("llama")
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    defaults: dict[str, Any] = {
        "r": 6,
        "lora_alpha": 11,
        "target_modules": ["q_proj", "up_proj"],
        "init_lora_weights": False,
    }
    config = peft.LoraConfig(**defaults | settings)
    theirs = peft.get_peft_model(hf, config).eval()
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = load_model(tmp_path)
    assert isinstance(ours, LoraDecoder)
    assert tokenizer.vocab_size > 0
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    write_adapter(ours.adapter, tmp_path / "..")  # and what we write of it, peft reads again
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path.parent
    )
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("name", ["qwen2-tied", "llama-mlp-bias"])
def test_a_merged_model_is_pefts_merge(
    checkpoint: Checkpoint, tmp_path: Path, name: str, tiny_tokenizer: Any
) -> None:
    import peft
    import transformers

    folder, _ = checkpoint(name)
    base = load_base(folder)
    ours = LoraDecoder(base, random_adapter(base, 3))
    write_adapter(ours.adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path
    ).merge_and_unload()
    expected = dict(theirs.named_parameters())
    before = {n: p.clone() for n, p in base.named_parameters()}
    whole = merged(ours)
    for n, p in whole.named_parameters():
        torch.testing.assert_close(p, expected[n], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    save_model(whole, tiny_tokenizer, tmp_path / "whole")
    ids = torch.randint(0, VOCAB, (2, 9))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(loaded(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3', accepted is 'LORA'"),
        ({"use_dora": True}, "use_dora = True, accepted is False"),
        ({"bias": "all"}, "bias = 'all', accepted is 'none'"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        (
            {"r": 5},
            r"A and B of layers.0.self_attn.q_proj are \[4, 48\] and \[48, 4\], the model's are \[5, 48\] "
            r"and \[48, 5\]",
        ),
        ({"r": None}, "r = None, accepted is an integer >= 1"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x'"),
        (
            {"base_model_name_or_path": "Some/Hub-Name"},
            "is an adapter on Some/Hub-Name, which is no checkpoint here",
        ),
    ],
)
def test_what_is_not_computed_here_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder, _ = checkpoint("llama")
    write_adapter(random_adapter(load_base(folder), 0, base=str(folder)), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_an_adapter_of_another_model_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_adapter(random_adapter(load_base(checkpoint("llama-mha")[0]), 0), tmp_path)
    with pytest.raises(ValueError, match="q_proj are"):
        read_adapter(tmp_path, load_base(checkpoint("llama")[0]))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_adapter(tmp_path, load_base(checkpoint("llama")[0]))


# ---- rows --------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_a_seed_makes_it(checkpoint: Checkpoint) -> None:
    base = load_base(checkpoint("qwen3")[0])
    one, same, other = (new_adapter(base, LoraSettings(rank=3, alpha=6.0), seed) for seed in (1, 1, 2))
    assert one.changes_nothing
    ids = torch.randint(0, VOCAB, (2, 9))
    assert torch.equal(LoraDecoder(base, one)(ids), base(ids))
    pairs = [adapter.pairs["layers.1.mlp.up_proj"][0] for adapter in (one, same, other)]
    assert torch.equal(pairs[0], pairs[1])
    assert not torch.equal(pairs[0], pairs[2])
    assert float(pairs[0].detach().abs().max()) <= 48**-0.5


def test_dropout_falls_on_training_rows_only_and_follows_from_its_seed(checkpoint: Checkpoint) -> None:
    base = load_base(checkpoint("llama")[0])
    adapter = random_adapter(base, 1, dropout=0.5)
    x, zero = torch.randn(400, 48), torch.zeros(400, 48)
    name = "layers.0.self_attn.q_proj"

    def delta(seed: int | None) -> torch.Tensor:
        return AdapterRows([(adapter, None)], seed).add(name, x, zero.clone()).detach()

    assert torch.equal(delta(7), delta(7))
    assert not torch.equal(delta(7), delta(8))
    a, b = (t.detach() for t in adapter.pairs[name])
    torch.testing.assert_close(delta(None), 2.0 * x @ a.T @ b.T, rtol=1e-4, atol=1e-5)
    mean = torch.stack([delta(seed) for seed in range(400)]).mean(
        0
    )  # its expectation is the delta without dropout
    assert float((mean - delta(None)).norm() / delta(None).norm()) < 0.1


# ---- the engine --------------------------------------------------------------------------------------------


def differing(model: Decoder, branch: Branch, marks: list[tuple[int, Completion]]) -> int:
    scored = score(model, [branch.token_ids])[0].detach()
    return sum(
        int((torch.tensor(c.logprobs) != scored[at - 1 : at - 1 + len(c.token_ids)]).sum()) for at, c in marks
    )


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_tokens", [65_536, 384])
def test_logprobs_equal_the_training_forward_whatever_the_neighbours_adapter(
    checkpoint: Checkpoint, dtype: torch.dtype, cache_tokens: int
) -> None:
    """Turns of branches with the policy's adapter, none and a third one, in the same steps, on equal ids,
    forked and preempted.
    """
    base = load_base(checkpoint("qwen3-tied")[0], dtype)
    policy, other = (
        LoraDecoder(base, random_adapter(base, 1)),
        LoraDecoder(base, random_adapter(base, 2, rank=7, targets=("v_proj",))),
    )
    models = [policy, base, other]
    engine = Engine(policy, cache_tokens=cache_tokens, max_step_tokens=64)
    engine.use_adapters([None, other.adapter])
    rng = random.Random(0)
    prompt = [rng.randrange(VOCAB) for _ in range(35)]
    roots = [engine.open(prompt, adapter=i) for i in range(3)]
    engine.prefill(roots)
    branches = [b for root in roots for b in (root, *root.fork(2))]
    assert [b.adapter for b in branches] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    marks: list[list[tuple[int, Completion]]] = [[] for _ in branches]
    for turn in range(4):
        more = [rng.randrange(VOCAB) for _ in range(9)]
        for branch in branches:
            branch.append(more)
        requests = [engine.start(b, SamplingParams(max_new_tokens=9, seed=turn)) for b in branches]
        engine.run()
        for at, (branch, request) in enumerate(zip(branches, requests, strict=True)):
            marks[at].append((len(branch) - 9, request.completion))
    if cache_tokens == 384:
        assert engine.stats.preemptions + engine.stats.evictions > 0
    for branch, mark in zip(branches, marks, strict=True):
        assert differing(models[branch.adapter], branch, mark) == 0
        wrong = models[(branch.adapter + 1) % 3]
        assert differing(wrong, branch, mark) > 0
    for branch in branches:
        branch.close()
    assert engine.pool.n_free == engine.pool.n_pages


def test_pages_are_shared_within_an_adapter_only(checkpoint: Checkpoint) -> None:
    base = load_base(checkpoint("llama")[0])
    engine = Engine(LoraDecoder(base, random_adapter(base, 1)))
    engine.use_adapters([None])
    branches = [engine.open([5] * 40, adapter=i) for i in (0, 1, 0, 1)]
    engine.prefill(branches)
    pages = [set(b.pages[:2]) for b in branches]
    assert pages[0] == pages[2]
    assert pages[1] == pages[3]
    assert not pages[0] & pages[1]
    with pytest.raises(ValueError, match="adapter = 2, accepted is 0 to 1"):
        engine.open([1], adapter=2)


def test_a_changed_adapter_makes_kv_stale(checkpoint: Checkpoint) -> None:
    base = load_base(checkpoint("llama")[0])
    policy = LoraDecoder(base, random_adapter(base, 1))
    engine = Engine(policy)
    engine.use_adapters([None])
    params = SamplingParams(max_new_tokens=5, seed=1)
    branches = [engine.open([5] * 40, adapter=i) for i in (0, 1)]
    before = [b.generate(params).logprobs for b in branches]
    with torch.no_grad():
        policy.adapter.pairs["layers.0.mlp.up_proj"][1].mul_(3.0)
    for branch in branches:
        branch.rewind(5)
    after = [b.generate(params).logprobs for b in branches]
    assert engine.weights_version == 1
    assert after[0] == Engine(policy).generate([[5] * 40], params)[0].logprobs != before[0]
    assert after[1] == before[1]
