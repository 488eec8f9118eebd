"""Builds what a configuration names: the game, the model with its tokenizer, the engine's arena."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.config import Config
from duologue.grpo.judged import DILEMMAS
from duologue.kernels import backend
from duologue.model.checkpoint import load_model, load_weights, parse_dtype
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder, LoraSettings, merged, new_adapter, read_adapter
from duologue.model.quantized import quantize
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.catalogue import GAMES, corpus
from duologue.rollout.games.common import ScriptedDialogue
from duologue.rollout.games.dilemma import DilemmaGame
from duologue.rollout.games.game import Game
from duologue.rollout.judge.judge import Backend, FeedbackJudge, RuleJudge
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.model import ModelJudge
from duologue.rollout.judge.questions import REQUIRED, load_prompt
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.arena import Arena, Rules
from duologue.rollout.selfplay.deliberation import Deliberation, TalkRules

AnyGame = Game | DilemmaGame
AnyJudge = RuleJudge | FeedbackJudge


def use_threads(config: Config) -> None:
    """Give the cores to the C++ kernels on CPU: torch's OpenMP threads spin after every call and would starve them."""
    if config.model.device == "cpu" and backend.available():
        backend.lib().set_threads(config.train.threads)
        torch.set_num_threads(1)
    elif config.train.threads:
        torch.set_num_threads(config.train.threads)


def build_game(config: Config) -> AnyGame:
    c = config.game
    if c.name in DILEMMAS:
        alone = c.name == "dilemma_alone"
        return DilemmaGame(
            alone=alone, dilemmas=c.dilemmas, personas=c.personas, tasks=c.tasks, prompts=c.prompts
        )
    options: dict[str, Any] = (
        {"types": c.item_types, "total": c.total_value, "walk_away": c.walk_away} if c.name == "deal" else {}
    )
    game: Game = GAMES[c.name][0](**options)
    return game


def build_judge(
    config: Config, game: AnyGame, ledger: Path, start: Callable[[], tuple[Decoder, Tokenizer]]
) -> AnyJudge:
    """The judge that the configuration names. `start` loads the starting weights; `ledger` is the file where none is named."""
    j = config.judge
    if not isinstance(game, DilemmaGame):
        return RuleJudge(game, config.game.objective)
    answers: dict[str, Any] = {"temperature": j.temperature, "max_tokens": j.max_tokens}
    backend: Backend
    if j.backend == "endpoint":
        if not j.url:
            raise ValueError(
                "judge.url = '': accepted is an OpenAI-compatible server, e.g. --judge.url http://127.0.0.1:8000/v1"
            )
        try:
            from duologue.rollout.judge.endpoint import Endpoint
        except ModuleNotFoundError as error:
            raise ValueError(
                f"judge.backend = 'endpoint' needs {error.name}: pip install 'duologue[judge]'"
            ) from None
        key = os.environ.get(j.key_env, "").strip()
        limits: dict[str, Any] = {
            "concurrency": j.concurrency,
            "deadline_s": j.deadline_s,
            "timeout_s": j.timeout_s,
        }
        backend = Endpoint(j.url, j.model, api_key=key, **limits, **answers)
    else:
        if (j.backend == "model") != bool(j.model):
            raise ValueError(
                f"judge.model = {j.model!r}: accepted is a checkpoint with judge.backend = 'model', '' with 'policy'"
            )
        if not config.model.path:
            raise ValueError(
                f"model.path = '': judge.backend = {j.backend!r} needs a checkpoint that the policy starts from"
            )
        load = start if j.backend == "policy" else lambda: load_policy(Path(j.model), config)

        def engine() -> tuple[Engine, Tokenizer]:
            model, tokenizer = load()
            return build_engine(config, model, 65_536), tokenizer  # the policy's pool took what was free

        backend = ModelJudge(engine, **answers)
    prompts = {kind: load_prompt(kind, j.prompts, j.show_dialogue) for kind in REQUIRED}
    return FeedbackJudge(
        backend,
        Ledger(Path(j.ledger) if j.ledger else ledger),
        prompts,
        show_dialogue=j.show_dialogue,
        max_unscored_share=j.max_unscored_share,
        offline=j.offline,
    )


def add_server(config: Config, arena: Arena | Deliberation, ledger: Path) -> None:
    """Let the server that opponent.url names speak in `arena`; the file `ledger` keeps what it says."""
    o, speakers = config.opponent, arena.speakers
    speakers.max_unscored_share = config.judge.max_unscored_share
    if o.kind != "endpoint":
        return
    try:
        from duologue.rollout.selfplay.remote import ChatEndpoint, Remote
    except ModuleNotFoundError as error:
        raise ValueError(
            f"opponent.kind = 'endpoint' needs {error.name}: pip install 'duologue[judge]'"
        ) from None
    limits: dict[str, Any] = {
        "concurrency": o.concurrency,
        "deadline_s": o.deadline_s,
        "timeout_s": o.timeout_s,
    }
    endpoint = ChatEndpoint(o.url, o.model, api_key=os.environ.get(o.key_env, "").strip(), **limits)
    speakers.server = Remote(endpoint, Ledger(ledger), arena.tokenizer)


def build_corpus(config: Config, game: AnyGame) -> list[ScriptedDialogue]:
    """The scripted dialogues that imitation learns from; empty when nothing imitates."""
    if not (config.imitation.steps or config.grpo.imitation_coef):
        return []
    assert not isinstance(game, DilemmaGame)
    return corpus(game, config.imitation.dialogues, derive_seed(config.train.seed, "corpus"))


def build_policy(config: Config, demonstrations: list[ScriptedDialogue]) -> tuple[Decoder, Tokenizer]:
    """The checkpoint of `model.path`, with an adapter when `lora.rank` asks for one, or a Qwen3 decoder from nothing with a tokenizer
    trained on the demonstrations."""
    dtype = parse_dtype(config.model.dtype)
    if config.model.path:
        loaded, known_tokenizer = load_policy(Path(config.model.path), config)
        return with_adapter(loaded, config), known_tokenizer
    if not demonstrations:
        raise ValueError(
            "model.path = '' starts from nothing, which needs imitation.steps above 0: there is no text to learn from"
        )
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
    """A checkpoint; an adapter goes on `model.path` where that is set to other weights than the adapter's."""
    base = config.model.path if Path(config.model.path, "config.json").is_file() else ""
    model, tokenizer = load_model(path, config.model.device, parse_dtype(config.model.dtype), base)
    if isinstance(model, LoraDecoder) and config.lora.rank and config.lora.quantize:
        model.packed = quantize(model.adapter_off).packed
    return model, tokenizer


def with_adapter(model: Decoder, config: Config) -> Decoder:
    """What is trained: a new adapter on `model`, or the one that came with it, or with `lora.rank` 0 all weights, that one merged."""
    c = config.lora
    if isinstance(model, LoraDecoder):
        if c.rank not in (0, model.adapter.settings.rank):
            raise ValueError(
                f"lora.rank = {c.rank}: the adapter in {config.model.path} has rank {model.adapter.settings.rank}"
            )
        return model if c.rank else merged(model)
    if not c.rank:
        return model
    base = str(Path(config.model.path).resolve())
    model = quantize(model) if c.quantize else model
    settings = LoraSettings(
        rank=c.rank, alpha=c.alpha, targets=tuple(c.targets), dropout=c.dropout, base=base
    )
    return LoraDecoder(model, new_adapter(model, settings, derive_seed(config.train.seed, "adapter")))


def check_sizes(config: Config, model: Decoder, path: Path) -> None:
    """Raise ValueError when a checkpoint to resume from is not of the sizes that [model] names."""
    if config.model.path:
        return
    for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        wanted, found = getattr(config.model, key), getattr(model.config, key)
        if wanted != found:
            raise ValueError(
                f"{path} has {key} = {found}, but the run's configuration says model.{key} = {wanted}"
            )


def build_engine(config: Config, model: Decoder, cache_tokens: int | None = None) -> Engine:
    r = config.rollout
    model.use_exact(r.exact)
    return Engine(
        model, page_size=r.page_size, cache_tokens=r.cache_tokens or cache_tokens, max_batch=r.max_batch
    )


def build_arena(
    config: Config,
    model: Decoder,
    tokenizer: Tokenizer,
    game: AnyGame,
    judge: AnyJudge | None = None,
    temperature: float | None = None,
) -> Arena | Deliberation:
    """An arena on a new engine; `temperature` replaces the one of training, and a final is then always written."""
    d = config.dialogue
    engine = build_engine(config, model)
    rules = {field.name: getattr(d, field.name) for field in dataclasses.fields(Rules)}
    if temperature is not None:
        rules |= {
            "temperature": temperature,
            "final_temperature": d.final_temperature if temperature else 0.0,
        }
    arena: Arena | Deliberation
    if isinstance(game, DilemmaGame):
        assert isinstance(judge, FeedbackJudge)
        more = TalkRules(**rules, context=d.context, always_final=temperature is not None)
        arena = Deliberation(engine, tokenizer, game, more, judge)
        check_context(config, engine, arena.longest_context())
    else:
        arena = Arena(engine, tokenizer, game, Rules(**rules))
        check_context(config, engine, longest_context(config, arena))
    return arena


def longest_context(config: Config, arena: Arena) -> int:
    """Tokens that the longest dialogue of a game with rules can take."""
    d, chat = config.dialogue, arena.tokenizer.chat
    example = arena.game.sample(random.Random(0), "train")
    private = max(len(ids) for ids in arena.private_ids(example))
    frame = len(chat.reply()) + len(chat.close_reply(False)) + len(chat.heard([]))
    longest = len(chat.open([])) + private + d.max_rounds * (2 * d.max_tokens_per_turn + frame)
    return longest + len(chat.heard(arena.final_prompt_ids)) + frame + d.max_tokens_final


def check_context(config: Config, engine: Engine, longest: int) -> None:
    """Raise ValueError when the longest dialogue could exceed the model's context or the KV pool."""
    d = config.dialogue
    limits = (
        ("model.max_position", engine.model.config.max_position_embeddings),
        ("rollout.cache_tokens", engine.pool.n_pages * engine.pool.page_size),
    )
    for key, limit in limits:
        if longest > limit:
            raise ValueError(
                f"{key} = {limit} is below the {longest} tokens that a dialogue of {d.max_rounds} rounds of "
                f"{d.max_tokens_per_turn} tokens per turn can take; raise it or lower dialogue.max_rounds or max_tokens_per_turn"
            )


def load_beside(model: Decoder, folder: Path) -> Decoder:
    """The weights in `folder`, without gradient, for use beside `model`: a KL term's reference, or an opponent.

    Beside a `LoraDecoder` they are its own base with the folder's adapter, or with none when that changes nothing.
    """
    if isinstance(model, LoraDecoder):
        adapter = read_adapter(folder, model.adapter_off).requires_grad_(False)
        return model.adapter_off if adapter.changes_nothing else LoraDecoder(model.adapter_off, adapter)
    weight = model.head_weight
    with torch.device("meta"):
        other = Decoder(model.config)
    load_weights(other, folder, weight.device, weight.dtype)
    return other.requires_grad_(False)
