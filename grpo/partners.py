"""Whom a policy is measured with beside its own copy: its start, scripted characters, other checkpoints,
servers.

    players = [load_player(name, config, game, start) for name in in_full(["start", "scripted"], game)]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from duologue.grpo.build import build_engine, build_server
from duologue.grpo.checkpoints import checkpoint_of
from duologue.grpo.config import Config
from duologue.grpo.crossplay import CrossPlay, Player
from duologue.grpo.policy import load_policy
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.pages import CACHE_TOKENS
from duologue.rollout.games import catalogue
from duologue.rollout.games.game import Game
from duologue.rollout.selfplay.partners import ScriptedSpeaker

START, SCRIPTED = "start", "scripted"
ADDRESS = "://"  # of a server
Row = dict[str, Any]


def in_full(names: Iterable[str], game: Game) -> list[str]:
    """The names with `scripted` replaced by all characters of the game, each once."""
    scripted = [f"{SCRIPTED}:{character}" for character in catalogue.characters(game.name)]
    return list(dict.fromkeys(n for name in names for n in (scripted if name == SCRIPTED else [name])))


def start_of(player: Path) -> Path:
    """The checkpoint that the self-play of a run began with, of its directory or one of its checkpoints."""
    beside = player.parent / "warm_start"
    return beside if beside.is_dir() else player / "checkpoints" / "warm_start"


def load_player(name: str, config: Config, game: Game, start: Path) -> Player:
    """By its name in full: `start` is the checkpoint there, and what is neither that, nor scripted, nor an
    address is the folder of a checkpoint or of a run, for its last one.
    """
    if ADDRESS in name:
        ledger = Path(":memory:")
        there = dataclasses.replace(config, opponent=dataclasses.replace(config.opponent, url=name))
        return Player(name=name, speaker=lambda tokenizer: build_server(there, tokenizer, ledger))
    if name.startswith(f"{SCRIPTED}:"):
        return scripted_player(name, config, game)
    return policy_player(name, *load_policy(weights_of(name, start), config), config)


def weights_of(name: str, start: Path) -> Path:
    """The checkpoint of a player that has one, by its name; `start` is the run's."""
    if name == START and not start.is_dir():
        raise ValueError(f"{START}: there is no {start}; accepted where the first player is a run directory")
    return checkpoint_of(start if name == START else name)


def policy_player(name: str, model: Decoder, tokenizer: Tokenizer, config: Config) -> Player:
    """On an engine of its own, whose pool is made when it is needed."""
    engine = build_engine(config, model, CACHE_TOKENS)
    engine.release_memory()
    return Player(name=name, engine=engine, tokenizer=tokenizer)


def scripted_player(name: str, config: Config, game: Game) -> Player:
    """The character of `scripted:NAME`."""
    character, known = name.partition(":")[2], catalogue.partners(game.name)
    if character not in known:
        accepted = ", ".join(f"{SCRIPTED}:{one}" for one in known) or f"none with {game.name}"
        raise ValueError(f"{name}: accepted is {accepted}")
    speaker = partial(ScriptedSpeaker, game, max_rounds=config.dialogue.max_rounds, character=character)
    return Player(name=name, speaker=speaker)


def with_partners(held: CrossPlay, trained: Player, start: Player, partners: Sequence[Player]) -> Row:
    """For each partner how the trained policy fares with it in both seats, how the start does in its place,
    and what it has more than the start; the first row is of each with itself.
    """
    rows = {"itself": _row(held, (trained, trained), (start, start))}
    for partner in partners:
        rows[partner.name] = _row(held, (trained, partner), (start, partner))
    return rows


def _row(held: CrossPlay, here: tuple[Player, Player], there: tuple[Player, Player]) -> Row:
    values, others = (held.fares(dict.fromkeys((pair, pair[::-1])), of=pair[0]) for pair in (here, there))
    return {
        "trained": held.intervals(values),
        "start": held.intervals(others),
        "difference": held.differences(values, others),
    }
