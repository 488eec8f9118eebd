"""A real checkpoint, SmolLM2-135M-Instruct: what transformers and peft make of it is what we make of it.

Its folder is what `python -m bench.real_model build/smollm2` writes, or what DUOLOGUE_REAL_MODEL names.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.cli import main
from duologue.grpo.config import load_config
from duologue.grpo.imitation import demonstration_rows
from duologue.kernels import backend
from duologue.model.checkpoint import load_model, save_model
from duologue.model.decoder import Decoder, score
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.model.peft import write_adapter
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams
from duologue.rollout.games.catalogue import corpus, kind_of
from duologue.rollout.games.scripted import ScriptedDialogue
from duologue.rollout.selfplay.arena import Arena

HERE = Path(__file__).parent.parent / "build" / "smollm2"
FOLDER = Path(os.environ.get("DUOLOGUE_REAL_MODEL", HERE))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (FOLDER / "config.json").is_file(),
        reason=f"no real checkpoint in {FOLDER}: python -m bench.real_model {FOLDER}",
    ),
    pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built: slow"),
]
IDS = torch.arange(900, 924).view(1, -1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@cache
def ours(dtype: str) -> tuple[Decoder, Tokenizer]:
    return load_model(FOLDER, "cpu", DTYPES[dtype])


@cache
def theirs(dtype: str) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=DTYPES[dtype]).eval()


@cache
def scripted() -> list[ScriptedDialogue]:
    """Twenty dialogues of three games in English."""
    games = [load_config(name, ["game.telling=english"]).game for name in ("deal", "price", "priorities")]
    return [
        dialogue for g, n in zip(games, (7, 7, 6), strict=True) for dialogue in corpus(kind_of(g)(g), n, 5)
    ]


def messages(dialogue: ScriptedDialogue, side: int) -> list[dict[str, str]]:
    """As transformers' chat templates take a side's view: what it was told, each turn, the question."""
    found = [{"role": "system", "content": dialogue.scenario.private_text[side]}]
    for role, text, kind in dialogue.turns:
        if kind == "final" and role == side:
            found.append({"role": "user", "content": dialogue.final_prompt})
        if kind != "final" or role == side:
            found.append({"role": "assistant" if role == side else "user", "content": text})
    return found


def test_both_views_of_a_dialogue_have_the_ids_of_the_chat_template() -> None:
    import transformers

    _, tokenizer = ours("bfloat16")
    peer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    for dialogue in scripted():
        for row in demonstration_rows(dialogue, tokenizer, 0):
            text = peer.apply_chat_template(messages(dialogue, row.role), tokenize=False)
            expected = peer(text, add_special_tokens=False)["input_ids"]
            assert row.token_ids == expected[: len(row.token_ids)]
            assert peer.decode(expected[len(row.token_ids) :]).strip() == ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_words_are_those_of_transformers(dtype: str) -> None:
    """Every token is the likeliest by transformers, given those before it; in bf16, whose logits have ties,
    one of the likeliest to within what rounding moves transformers' own logits by."""
    model, tokenizer = ours(dtype)
    system = tokenizer.encode("You negotiate.")
    prompts = [
        tokenizer.chat.open(system)
        + tokenizer.chat.heard(tokenizer.encode(d.turns[0][1]))
        + tokenizer.chat.reply()
        for d in scripted()
    ]
    stop = tuple(tokenizer.stop_token_ids)
    params = SamplingParams(max_new_tokens=8, temperature=0.0, stop_token_ids=stop)
    written = [c.token_ids for c in Engine(model, cache_tokens=8192).generate(prompts, params)]
    rows = [torch.tensor([*p, *w]) for p, w in zip(prompts, written, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        by_dtype = {d: theirs(d)(padded, attention_mask=mask).logits.float() for d in {dtype, "float32"}}
    equal = total = 0
    for i, (prompt, words) in enumerate(zip(prompts, written, strict=True)):
        span = slice(len(prompt) - 1, len(prompt) - 1 + len(words))
        logits, exact = (by_dtype[d][i, span] for d in (dtype, "float32"))
        behind = logits.amax(1) - logits.gather(1, torch.tensor(words).view(-1, 1)).squeeze(1)
        rounding = 2 * (logits - exact).abs().amax(1)
        assert (behind <= rounding).all(), (tokenizer.decode(words), behind, rounding)
        equal += int((behind == 0).sum())
        total += len(words)
    assert total > 100
    assert equal == total if dtype == "float32" else equal > 0.95 * total


def adapted(model: Decoder, base: Path = FOLDER) -> LoraDecoder:
    """With an adapter that changes what is said."""
    settings = LoraSettings(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"), base=str(base))
    policy = LoraDecoder(model, new_adapter(model, settings, 0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, b in policy.adapter.pairs.values():
            b.normal_(std=0.02, generator=generator)
    return policy


@pytest.mark.parametrize("adapter", [False, True])
def test_log_probs_of_dialogues_are_those_of_training(adapter: bool) -> None:
    """Groups that fork from one prompt, six turns and a statement, where not all dialogues have room at once;
    and forks of which some are preempted while they write."""
    plain, tokenizer = ours("bfloat16")
    model = adapted(plain) if adapter else plain
    few = ["dialogue.max_rounds=3", "dialogue.max_tokens_per_turn=5", "dialogue.max_tokens_final=24"]
    config = load_config("deal", ["game.telling=english", *few])
    game = kind_of(config.game)(config.game)
    engine = Engine(model, cache_tokens=800)
    arena = Arena(engine, tokenizer, game, config.dialogue)
    rng = random.Random(0)
    groups = arena.play([game.sample(rng, "train") for _ in range(2)], group_size=3, seed=1)
    views = [view for group in groups for d in group.dialogues for view in d.views]
    assert engine.stats.evictions > 0
    assert engine.stats.shared_tokens > 0
    with torch.no_grad():
        exact = score(model, [view.token_ids for view in views])
    n = 0
    for view, logprobs in zip(views, exact, strict=True):
        at = torch.tensor([t for t, kind in enumerate(view.kinds) if kind])
        n += len(at)
        assert torch.equal(torch.tensor(view.logprobs)[at], logprobs[at - 1].float())
    assert n > 100
    crowded, prompt = Engine(model, cache_tokens=160), views[0].token_ids[:30]
    written = crowded.generate([prompt], SamplingParams(max_new_tokens=36, seed=1), n=6)
    assert crowded.stats.preemptions > 0
    with torch.no_grad():
        exact = score(model, [[*prompt, *w.token_ids] for w in written])
    for completion, logprobs in zip(written, exact, strict=True):
        assert torch.equal(torch.tensor(completion.logprobs), logprobs[len(prompt) - 1 :].float())


def logits(model: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return getattr(found, "logits", found)


def test_transformers_makes_the_same_of_an_export(tmp_path: Path) -> None:
    import transformers

    model, tokenizer = load_model(FOLDER, "cpu", torch.float32)
    with torch.no_grad():
        model.head_weight.mul_(1.5)  # as training would, it moves the weights
    save_model(model, tokenizer, tmp_path / "trained")
    assert main(["export", str(tmp_path / "trained"), str(tmp_path / "out")]) == 0
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), logits(peer), rtol=1e-3, atol=1e-3)
    assert (logits(peer) - logits(theirs("float32"))).abs().max() > 1


def test_peft_makes_the_same_of_an_adapter(tmp_path: Path) -> None:
    import peft
    import transformers

    policy = adapted(ours("float32")[0])
    write_adapter(policy.adapter, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    peer = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(policy), logits(peer), rtol=1e-3, atol=1e-3)
    assert (logits(peer) - logits(theirs("float32"))).abs().max() > 0.1
