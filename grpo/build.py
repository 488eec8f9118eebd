"""Builds what a configuration names: the game, the model with its tokenizer, the engine's arena."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duologue.grpo.config import Config
from duologue.grpo.mix import ENDPOINT
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.policy import load_policy
from duologue.grpo.sections import JudgeSection, OpponentSection
from duologue.grpo.world import ALONE, World
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.pages import CACHE_TOKENS
from duologue.rollout.games.catalogue import corpus, kind_of
from duologue.rollout.games.finals import ReadFinals
from duologue.rollout.games.game import Game
from duologue.rollout.games.scripted import ScriptedDialogue
from duologue.rollout.games.text_game import TextGame
from duologue.rollout.judge.asking import Backend
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.model import ModelJudge
from duologue.rollout.judge.questions import REQUIRED, load_prompt
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.contexts import Contexts
from duologue.rollout.selfplay.rules import Rules
from duologue.rollout.selfplay.speakers import Server

MEMORY = Path(":memory:")  # in place of a ledger's file
FIRST_TEXTS = 500  # games


def build_game(config: Config) -> Game:
    return kind_of(config.game)(config.game)


def build_judge(
    config: Config, ledger: Path, start: Callable[[], tuple[Decoder, Tokenizer]], world: World = ALONE
) -> FeedbackJudge | None:
    """The judge that the configuration names, None where the game's rules are it. `start` loads the
    starting weights; `ledger` is the file where none is named.
    """
    j = config.judge
    if j.backend == "rules":
        return None
    held = j.backend != "endpoint"
    if held:
        backend = _model_judge(config, start)
    else:
        backend = _endpoint(config, own=not j.ledger and ledger != MEMORY)
    prompts = {kind: load_prompt(kind, j.prompts, j.show_dialogue, held) for kind in REQUIRED}
    return FeedbackJudge(
        backend,
        _ledger(Path(j.ledger) if j.ledger else ledger, world),
        prompts,
        show_dialogue=j.show_dialogue,
        max_unscored_share=j.max_unscored_share,
        offline=j.offline,
        held=held,
    )


def ledger_of_node(path: Path, world: World) -> Path:
    """`path` on the first node, the same name with a number on each other: SQLite's log of writes is no file
    that two machines can share.
    """
    hosts = [*dict.fromkeys(world.each(socket.gethostname()))]  # world
    n = hosts.index(socket.gethostname())
    return path.with_name(f"{path.stem}.{n}{path.suffix}") if n else path


def _ledger(path: Path, world: World) -> Ledger:
    """Which the ranks of a node share."""
    if world.size == 1:
        return Ledger(path)
    path = ledger_of_node(path, world)
    from duologue.grpo.distributed.ledger import SharedLedger
    from duologue.grpo.distributed.world import Ranks

    assert isinstance(world, Ranks)
    return SharedLedger(path, world)


def build_optimizer(config: Config, model: Decoder, world: World) -> Optimizer:
    g = config.grpo
    settings: dict[str, Any] = {
        "betas": (g.betas[0], g.betas[1]),
        "weight_decay": g.weight_decay,
        "max_grad_norm": g.max_grad_norm,
        "offload": config.train.offload_moments,
        "fuse": config.train.gradient_accumulation_fusion,
    }
    if config.train.offload_moments and config.model.device == "cpu":
        raise ValueError("train.offload_moments = true: accepted is false on cpu, whose memory it would be")
    shares = config.train.shares
    if shares % world.size:
        raise ValueError(f"train.shares = {shares}: accepted is 0 or a multiple of the {world.size} ranks")
    if world.size == 1 and not shares:
        return Optimizer(model, **settings)
    from duologue.grpo.distributed.optimizer import ReplicatedOptimizer
    from duologue.grpo.distributed.sharded import ShardedOptimizer
    from duologue.grpo.distributed.world import Ranks

    if shares or (isinstance(world, Ranks) and not isinstance(model, LoraDecoder)):
        return ShardedOptimizer(model, world=world, shares=shares, **settings)
    return ReplicatedOptimizer(model, world=world, **settings)


def _endpoint(config: Config, own: bool) -> Backend:
    """`own`: whether nobody else's answers are in its ledger."""
    from duologue.rollout.judge.endpoint import Endpoint  # whoever asks no server needs no HTTP client

    j = config.judge
    if not j.url:
        accepted = "an OpenAI-compatible server, e.g. --judge.url http://127.0.0.1:8000/v1"
        raise ValueError(f"judge.url = '': accepted is {accepted}")
    return Endpoint(
        j.url,
        j.model,
        **_server(j),
        temperature=j.temperature,
        max_tokens=j.max_tokens,
        name="" if own else j.url,
    )


def _server(section: JudgeSection | OpponentSection) -> dict[str, Any]:
    """How a server is asked."""
    key = os.environ.get(section.key_env, "").strip()
    limits = {name: getattr(section, name) for name in ("concurrency", "deadline_s", "timeout_s")}
    return {"api_key": key, **limits}


def _model_judge(config: Config, start: Callable[[], tuple[Decoder, Tokenizer]]) -> Backend:
    j = config.judge
    if (j.backend == "model") != bool(j.model):
        accepted = "a checkpoint with judge.backend = 'model', '' with 'policy'"
        raise ValueError(f"judge.model = {j.model!r}: accepted is {accepted}")
    if not config.model.path:
        needed = "needs a checkpoint that the policy starts from"
        raise ValueError(f"model.path = '': judge.backend = {j.backend!r} {needed}")
    load = start if j.backend == "policy" else lambda: load_policy(Path(j.model), config)

    def engine() -> tuple[Engine, Tokenizer]:
        model, tokenizer = load()
        # The policy's pool took what was free.
        return build_engine(config, model, CACHE_TOKENS), tokenizer

    return ModelJudge(engine, threshold=j.threshold, score=j.score, readings=j.readings)


def add_server(config: Config, arena: Arena, ledger: Path, world: World) -> None:
    """Let the server that opponent.url names speak in `arena`; the file `ledger` keeps what it says."""
    if ENDPOINT in config.opponent.parts:
        arena.speakers.outside = build_server(config, arena.tokenizer, ledger_of_node(ledger, world))


def build_server(config: Config, tokenizer: Tokenizer, ledger: Path) -> Server:
    """Who speaks at opponent.url."""
    o = config.opponent
    answers, limit = Ledger(ledger, "the ledger of opponent.url"), config.judge.max_unscored_share
    return Server(o.url, o.model, answers, tokenizer, limit, **_server(o))


def build_corpus(config: Config, game: Game) -> list[ScriptedDialogue]:
    """The scripted dialogues that imitation learns from; empty when nothing imitates."""
    if not (config.imitation.steps or config.grpo.imitation_coef):
        return []
    if isinstance(game, TextGame) and not game.has_script:
        needed = f"0, for {config.game.name} has no script() to imitate"
        raise ValueError(f"imitation.steps or grpo.imitation_coef: accepted is {needed}")
    i, seed = config.imitation, derive_seed(config.train.seed, "corpus")
    dialogues = corpus(game, i.dialogues, seed, i.characters)
    if i.decisive_weight != 1 and not any(any(one.decisive) for one in dialogues):
        only = "accepted is 1, for no word of this game's scripts is marked as decisive"
        raise ValueError(f"imitation.decisive_weight = {i.decisive_weight}: {only}")
    return dialogues


def first_texts(config: Config, game: Game) -> list[ScriptedDialogue]:
    """What a tokenizer can be learned from where nobody imitates: a game of a user, played by chance."""
    if config.model.path or not isinstance(game, TextGame):
        return []
    return corpus(game, FIRST_TEXTS, derive_seed(config.train.seed, "corpus"))


def build_engine(
    config: Config, model: Decoder, cache_tokens: int | None = None, decode_steps: int | None = None
) -> Engine:
    r = config.rollout
    model.use_exact(r.exact)
    return Engine(
        model,
        page_size=r.page_size,
        cache_tokens=r.cache_tokens or cache_tokens,
        max_batch=r.max_batch,
        max_step_tokens=r.max_step_tokens,
        decode_steps=decode_steps,
    )


def build_arena(
    config: Config,
    engine: Engine,
    tokenizer: Tokenizer,
    game: Game,
    judge: FeedbackJudge | None = None,
    temperature: float | None = None,
) -> Arena:
    """An arena on `engine`; `temperature` replaces that of training, and a final is then always written."""
    rules = training_rules(config, game) if temperature is None else measuring_rules(config, temperature)
    arena = Arena(engine, tokenizer, game, rules, judge)
    check_context(engine, arena.contexts)
    return arena


def training_rules(config: Config, game: Game) -> Rules:
    """The rules of a talk that a policy learns from."""
    by_turn = config.grpo.credit == "turn"
    if by_turn and isinstance(game, TextGame) and not game.has_step_scores:
        lacks = f"{config.game.name} has no scores_so_far()"
        raise ValueError(f"grpo.credit = 'turn': accepted is 'dialogue', for {lacks}")
    return dataclasses.replace(config.dialogue, step_scores=by_turn)


def measuring_rules(config: Config, temperature: float) -> Rules:
    """The rules of a talk by which a policy is measured, at this temperature."""
    rules = config.dialogue
    final = rules.final_temperature if temperature else 0.0
    return dataclasses.replace(rules, temperature=temperature, final_temperature=final, always_final=True)


def check_context(engine: Engine, contexts: Contexts) -> None:
    """Raise ValueError when the longest dialogue could exceed the model's context or the KV pool; of a game
    that tells the sides, its first turn.
    """
    rules, longest = contexts.rules, contexts.longest()
    finals = max(
        (len(contexts.tokenizer.encode(text)) + 1 for text in contexts.game.final_examples()), default=0
    )
    if finals > rules.max_tokens_final:
        accepted = (
            f"{finals} or more, the tokens of a final statement in this telling of {contexts.game.name}"
        )
        raise ValueError(f"dialogue.max_tokens_final = {rules.max_tokens_final}: accepted is {accepted}")
    talk = "a first turn" if contexts.game.observed else f"a dialogue of {rules.max_rounds} rounds"
    limits = (
        ("model.max_position", engine.model.config.max_position_embeddings),
        ("rollout.cache_tokens", engine.pool.n_pages * engine.pool.page_size),
    )
    for key, limit in limits:
        if longest > limit:
            way = "raise it or lower dialogue.max_rounds or max_tokens_per_turn"
            if isinstance(contexts.game, ReadFinals) and key.startswith("model"):
                way += ", or name a chat model (--model DIR), for which this telling is meant"
            raise ValueError(
                f"{key} = {limit} is below the {longest} tokens that {talk} of {rules.max_tokens_per_turn} "
                f"tokens per turn can take; {way}"
            )
