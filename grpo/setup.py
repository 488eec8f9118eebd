"""Builds what a configuration names: the game, the model with its tokenizer, the engine's arena."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from duologue.grpo.config import Config
from duologue.kernels import cpu
from duologue.model.checkpoint import load_model, parse_dtype
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.deal import DealGame
from duologue.rollout.games.deal_scripts import ScriptedDialogue, corpus
from duologue.rollout.selfplay.arena import Arena, Rules, derive_seed


def use_threads(config: Config) -> None:
    """Give the cores to the C++ kernels on CPU: torch's OpenMP threads spin after every call and would starve them."""
    if config.model.device == "cpu" and cpu.available():
        cpu.lib().set_threads(config.train.threads)
        torch.set_num_threads(1)
    elif config.train.threads:
        torch.set_num_threads(config.train.threads)


def build_game(config: Config) -> DealGame:
    return DealGame(types=config.game.item_types, total=config.game.total_value, walk_away=config.game.walk_away)


def build_corpus(config: Config, game: DealGame) -> list[ScriptedDialogue]:
    """The scripted dialogues that imitation learns from; empty when nothing imitates."""
    if not (config.imitation.steps or config.grpo.imitation_coef):
        return []
    return corpus(game, config.imitation.dialogues, derive_seed(config.train.seed, "corpus"))


def build_policy(config: Config, demonstrations: list[ScriptedDialogue]) -> tuple[Decoder, Tokenizer]:
    """The checkpoint of `model.path`, or a Qwen3 decoder from nothing with a tokenizer trained on the demonstrations."""
    dtype = parse_dtype(config.model.dtype)
    if config.model.path:
        return load_policy(Path(config.model.path), config)
    if not demonstrations:
        raise ValueError("model.path = '' starts from nothing, which needs imitation.steps above 0: there is no text to learn from")
    texts = [line for d in demonstrations[:5000] for line in (*d.scenario.private_text, *(text for _, text, _ in d.turns))]
    m = config.model
    tokenizer = train_tokenizer(texts, m.vocab_size)
    sizes = ModelConfig(
        model_type="qwen3",
        vocab_size=tokenizer.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.head_dim or m.hidden_size // m.num_heads,
        max_position_embeddings=m.max_position,
        dtype=m.dtype,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_ids,
    )
    model = Decoder(sizes)
    model.init_weights(derive_seed(config.train.seed, "weights"))
    return model.to(device=m.device, dtype=dtype), tokenizer


def load_policy(path: Path, config: Config) -> tuple[Decoder, Tokenizer]:
    return load_model(path, config.model.device, parse_dtype(config.model.dtype))


def check_sizes(config: Config, model: Decoder, path: Path) -> None:
    """Raise ValueError when a checkpoint to resume from is not of the sizes that [model] names."""
    if config.model.path:
        return
    for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        wanted, found = getattr(config.model, key), getattr(model.config, key)
        if wanted != found:
            raise ValueError(f"{path} has {key} = {found}, but the run's configuration says model.{key} = {wanted}")


def build_arena(config: Config, model: Decoder, tokenizer: Tokenizer, game: DealGame, temperature: float | None = None) -> Arena:
    """An arena on a new engine; `temperature` replaces the one of training."""
    d, r = config.dialogue, config.rollout
    engine = Engine(model, page_size=r.page_size, cache_tokens=r.cache_tokens, max_batch=r.max_batch)
    rules = Rules(
        max_rounds=d.max_rounds,
        max_tokens_per_turn=d.max_tokens_per_turn,
        max_tokens_final=d.max_tokens_final,
        temperature=d.temperature if temperature is None else temperature,
        top_p=d.top_p,
    )
    arena = Arena(engine, tokenizer, game, rules)
    check_context(config, model, arena)
    return arena


def check_context(config: Config, model: Decoder, arena: Arena) -> None:
    """Raise ValueError when the longest dialogue could exceed the model's context or the KV pool."""
    d, chat = config.dialogue, arena.tokenizer.chat
    example = arena.game.sample(random.Random(0), "train")
    private = max(len(ids) for ids in arena.private_ids(example))
    frame = len(chat.reply()) + len(chat.close_reply(False)) + len(chat.heard([]))
    longest = len(chat.open([])) + private + d.max_rounds * (2 * d.max_tokens_per_turn + frame)
    longest += len(chat.heard(arena.final_prompt_ids)) + frame + d.max_tokens_final
    limits = (
        ("model.max_position", model.config.max_position_embeddings),
        ("rollout.cache_tokens", config.rollout.cache_tokens),
    )
    for key, limit in limits:
        if longest > limit:
            raise ValueError(
                f"{key} = {limit} is below the {longest} tokens that a dialogue of {d.max_rounds} rounds of "
                f"{d.max_tokens_per_turn} tokens per turn can take; raise it or lower dialogue.max_rounds or max_tokens_per_turn"
            )


def frozen_copy(model: Decoder) -> Decoder:
    """The same weights, apart and without gradient: the reference of a KL term."""
    copy = Decoder(model.config).to(device=model.head_weight.device, dtype=model.head_weight.dtype)
    copy.load_state_dict(model.state_dict())
    return copy.requires_grad_(False)
