"""`duologue play`: a person negotiates with a policy in the terminal, in any game or on a dilemma.

The protocol is the arena's: the same contexts, turns and final question. What the person types is encoded once and heard as ids;
nothing is trained on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duologue.grpo.build import build_engine, build_game
from duologue.grpo.config import Config, load_config
from duologue.grpo.policy import load_policy, use_threads
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.common import SelectionGame
from duologue.rollout.games.dilemma import DilemmaGame
from duologue.rollout.games.game import Scenario
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.arena import Arena, Rules
from duologue.rollout.selfplay.deliberation import Deliberation, TalkRules
from duologue.rollout.selfplay.dialogue import FINAL, KINDS, UTTERANCE, Transcript, Turn
from rich.console import Console

HELP = "/help shows this, /private your side again, /done ends the talk, /quit leaves"
FRAMES = 64  # tokens that the fragments around two turns and a question take at most
UNCLEAR = ("malformed", "out_of_range")  # of a selection on its own


class Quit(Exception):
    """The person has left."""


class Terminal:
    """Where the person reads and types. Commands are answered here; `read` gives words, "" for /done, or raises Quit."""

    def __init__(
        self, private: str, console: Console | None = None, ask: Callable[[str], str] = input
    ) -> None:
        self.private, self.ask = private, ask
        self.console = console or Console(highlight=False, markup=False)

    def say(self, text: str, style: str = "") -> None:
        text = "".join(
            c for c in text if c.isprintable() or c == "\n"
        )  # a policy can sample an escape sequence
        self.console.print(text, style=style, soft_wrap=True)

    def too_long(self, room: int) -> None:
        self.say(
            f"That is too long for this policy, whose context holds {room} tokens. Say it shorter, or /done."
        )

    def read(self, prompt: str) -> str:
        while True:
            try:
                words = self.ask(f"{prompt}> ").strip()
            except EOFError:
                raise Quit from None
            if words == "/quit":
                raise Quit
            if words == "/done":
                return ""
            if words == "/private":
                self.say(self.private)
            elif words.startswith("/"):
                self.say(HELP)
            elif words:
                return words


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(str(find_recipe(options)), overrides)
    rules = rules_of(config, options.temperature)
    use_threads(config)
    game = build_game(config)
    policy = load_policy(options.checkpoint, config)
    engine = build_engine(config, policy[0])
    scenario = game.sample(random.Random(derive_seed(options.seed, "play")), "heldout")
    side = {"first": 0, "second": 1}[options.side]
    private = scenario.private_text[side]
    terminal = Terminal(f"{scenario.shared_text}\n{private}".strip())
    terminal.say(f"You are side {side + 1} in {game.name}. {HELP}", "bold")
    terminal.say(f"Told to you alone: {private.strip()}" if not scenario.shared_text else terminal.private)
    try:
        if isinstance(game, DilemmaGame):
            return talk(
                engine,
                policy[1],
                game,
                rules,
                config.dialogue.context,
                scenario,
                side,
                options.seed,
                terminal,
            )
        assert isinstance(game, SelectionGame)
        return negotiate(engine, policy[1], game, rules, scenario, side, options.seed, terminal)
    except Quit:
        terminal.say("You left; nothing is agreed.")
        return 0


def find_recipe(options: argparse.Namespace) -> str | Path:
    """--game, or the configuration of the run that the checkpoint belongs to."""
    if options.game:
        return str(options.game)
    for folder in (options.checkpoint, *options.checkpoint.resolve().parents[:3]):
        if (folder / "config.toml").is_file():
            return Path(folder / "config.toml")
    raise ValueError(
        f"--game: {options.checkpoint} lies in no run directory, accepted is a recipe's name, for example deal"
    )


def rules_of(config: Config, temperature: float | None) -> Rules:
    """Those of training; `temperature`, if given, is that of both talk and selection, 0 for the likeliest words."""
    rules = Rules(**{field.name: getattr(config.dialogue, field.name) for field in dataclasses.fields(Rules)})
    if temperature is None:
        return rules
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature = {temperature}: accepted is a finite number from 0")
    return dataclasses.replace(rules, temperature=temperature, final_temperature=-1.0)


def room(engine: Engine) -> int:
    """Tokens that one context can hold."""
    return min(engine.model.config.max_position_embeddings, engine.pool.n_pages * engine.pool.page_size)


def negotiate(
    engine: Engine,
    tokenizer: Tokenizer,
    game: SelectionGame[Any],
    rules: Rules,
    scenario: Scenario,
    side: int,
    seed: int,
    terminal: Terminal,
) -> int:
    """A game with rules: talk until somebody closes, then both state their selection."""
    arena = Arena(engine, tokenizer, game, rules)
    transcript = Transcript(tokenizer.chat, arena.private_ids(scenario))
    branch = engine.open(())

    def policy_says(kind: int) -> str:
        transcript.ask(1 - side, arena.final_prompt_ids if kind == FINAL else None)
        view = transcript.views[1 - side]
        branch.append(view.token_ids[len(branch) :])
        found = branch.generate(
            arena.rules.sampling(kind, derive_seed(seed, len(transcript.turns)), arena.stop_token_ids)
        )
        text = tokenizer.decode(found.token_ids).strip()
        transcript.say(1 - side, found.token_ids, found.logprobs, kind, text, found.kept)
        terminal.say(f"policy> {text}" if kind == UTTERANCE else f"policy states> {text}", "cyan")
        return text

    def person_says(text: str, kind: int) -> str:
        transcript.ask(side, arena.final_prompt_ids if kind == FINAL else None)
        transcript.say(side, tokenizer.encode(text), None, kind, text)
        return text

    speaker, closed = rules.opener(seed, 0, 0), False
    terminal.say(
        f"To close the talk, end what you say with {game.close}; then both state a selection: {game.selection_form}."
    )
    while not closed and len(transcript.turns) < 2 * rules.max_rounds:
        if speaker != side:
            closed = game.closes(policy_says(UTTERANCE))
        else:
            words = terminal.read("you")
            rest = rules.max_tokens_per_turn + rules.max_tokens_final + FRAMES
            if words and len(transcript.views[1 - side].token_ids) + len(
                tokenizer.encode(words)
            ) + rest > room(engine):
                terminal.too_long(room(engine))
                continue
            closed = game.closes(person_says(words or game.close, UTTERANCE))
        speaker = 1 - speaker
    finals = None
    if closed:
        own = select(game, scenario, terminal)
        person_says(own, FINAL)
        other = policy_says(FINAL)
        finals = (own, other) if side == 0 else (other, own)
    outcome = game.judge(scenario, finals)
    terminal.say(
        f"{'Agreed' if outcome.agreed else f'No deal ({outcome.failure})'}: you score {outcome.scores[side]:g}, "
        f"the policy {outcome.scores[1 - side]:g}.",
        "bold",
    )
    terminal.say("The policy was told: " + scenario.private_text[1 - side].strip())
    branch.close()
    return 0


def select(game: SelectionGame[Any], scenario: Scenario, terminal: Terminal) -> str:
    """The person's selection; one that the rules cannot read is asked for again."""
    while True:
        words = terminal.read("your selection")
        if game.judge(scenario, (words, words)).failure not in UNCLEAR and words:
            return words
        terminal.say(f"{words!r} is no selection here: accepted is {game.selection_form}, of what there is.")


def talk(
    engine: Engine,
    tokenizer: Tokenizer,
    game: DilemmaGame,
    rules: Rules,
    context: str,
    scenario: Scenario,
    side: int,
    seed: int,
    terminal: Terminal,
) -> int:
    """A dilemma: both speak in turn, and at the end the policy writes the resolution. Nobody scores it."""
    if game.alone:
        raise ValueError(
            "--game: with dilemma_alone the policy answers alone, accepted is a game of two, e.g. collective-agency"
        )
    arena = Deliberation(
        engine, tokenizer, game, TalkRules(**dataclasses.asdict(rules), context=context), None
    )
    turns: list[Turn] = []
    first = rules.opener(seed, 0, 0)
    rest = max(rules.max_tokens_per_turn, rules.max_tokens_final) + rules.max_tokens_per_turn + FRAMES

    def heard() -> list[Turn]:
        return turns if arena.grows else turns[-2:]

    def policy_says(kind: int) -> str:
        view = (
            arena.final_view(scenario, turns)
            if kind == FINAL
            else arena.recent_view(scenario, 1 - side, heard())
        )
        branch = engine.open(view.token_ids)
        found = branch.generate(
            arena.rules.sampling(kind, derive_seed(seed, len(turns)), tuple(arena.chat.stop_token_ids))
        )
        branch.close()
        text = tokenizer.decode(found.token_ids).strip()
        turns.append(
            Turn(
                role=1 - side, kind=KINDS[kind], text=text, token_ids=found.token_ids, logprobs=found.logprobs
            )
        )
        return text

    while len(turns) < 2 * rules.max_rounds:
        if (first + len(turns)) % 2 != side:
            terminal.say(f"{scenario.personas[1 - side].name}> {policy_says(UTTERANCE)}", "cyan")
            continue
        words = terminal.read(scenario.personas[side].name)
        if not words:
            break
        turns.append(
            Turn(role=side, kind="utterance", text=words, token_ids=tokenizer.encode(words), logprobs=None)
        )
        views = arena.final_view(scenario, turns), arena.recent_view(scenario, 1 - side, heard())
        if max(len(view.token_ids) for view in views) + rest > room(engine):
            turns.pop()
            terminal.too_long(room(engine))
    terminal.say(f"The resolution, as the policy writes it:\n{policy_says(FINAL)}", "bold")
    return 0
