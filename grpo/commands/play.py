"""`duologue play`: a person talks with a policy in the terminal, in any game of two.

The person is one more speaker of the arena, so contexts, turns and the final question are those of
training. What the person types is encoded once and heard as ids; nothing is trained on it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duologue.grpo.build import build_engine, build_game
from duologue.grpo.checkpoints import checkpoint_of
from duologue.grpo.commands.aloud import Aloud, Wrapped
from duologue.grpo.config import RECIPES, Config, load_config
from duologue.grpo.policy import load_policy, use_device
from duologue.grpo.unsaid import run_of, unsaid
from duologue.rollout.engine.sequence import Completion
from duologue.rollout.games.game import Scenario
from duologue.rollout.games.texts import read_text
from duologue.rollout.judge.judge import Answer
from duologue.rollout.judge.questions import Case
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import FINAL, Turn
from duologue.rollout.selfplay.rules import Rules
from duologue.rollout.selfplay.speakers import LEFT, Opponent, Speak, Speaker
from rich.console import Console

HELP = "/help shows this, /private your side again, /done ends the talk, /quit leaves"
FRAMES = 64  # tokens that the fragments around two turns and a question take at most


class Quit(Exception):
    """The person has left."""


class Terminal:
    """Where the person reads and types. Commands are answered here; `read` gives words, "" for /done, or
    raises Quit.
    """

    def __init__(self, private: str) -> None:
        self.private = private
        self.console = Console(highlight=False, markup=False)

    def say(self, text: str, style: str = "") -> None:
        self.console.print(shown(text), style=style, soft_wrap=not self.console.is_terminal)

    def begin(self, name: str) -> Wrapped:
        """A turn whose words come one by one."""

        def write(piece: str) -> None:
            self.console.print(piece, style="cyan", end="", soft_wrap=True)

        screen = Wrapped(write, self.console.width)
        screen.prompt(f"{name}> ")
        return screen

    def read(self, prompt: str) -> str:
        while True:
            try:
                words = input(f"{prompt}> ").strip()
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


def shown(text: str) -> str:
    """Without what moves a terminal's cursor: a policy can sample an escape sequence."""
    return "".join(c for c in text if c.isprintable() or c == "\n")


def run(options: argparse.Namespace) -> int:
    config = load_config(find_recipe(options), options.overrides, unsaid(options.checkpoint))
    rules = rules_of(config, options.temperature)
    use_device(config)
    game = build_game(config)
    if game.alone:
        raise ValueError(
            f"--game: with {game.name} the policy answers alone, accepted is a game of two, "
            "e.g. collective-agency"
        )
    checkpoint = checkpoint_of(options.checkpoint)
    model, tokenizer = load_policy(checkpoint, config)
    scenario = game.sample(random.Random(derive_seed(options.seed, "play")), "heldout")
    side = {"first": 0, "second": 1}[options.side]
    private = scenario.private_text[side].strip()
    terminal = Terminal(f"{scenario.shared_text}\n{private}".strip())
    terminal.say(f"You are side {side + 1} in {game.name}. {HELP}", "bold")
    if scenario.shared_text or private:
        terminal.say(terminal.private if scenario.shared_text else f"Told to you alone: {private}")
    aloud = terminal.console.is_terminal and not game.observed  # whose moves may be hidden
    engine = build_engine(config, model, decode_steps=1 if aloud else None)
    speaker = Aloud(engine, lambda ids: shown(tokenizer.decode(ids)), lambda: terminal.begin(person.policy))
    arena = Arena(speaker if aloud else engine, tokenizer, game, rules, NoJudge())
    person = Person(arena, scenario, side, terminal, speaker)
    arena.speakers.outside = person
    try:
        hold(person, options.seed)
    except Quit:
        terminal.say("You left; nothing is agreed.")
    return 0


def find_recipe(options: argparse.Namespace) -> str:
    """--game, or the configuration of the run that the checkpoint belongs to."""
    if options.game:
        return str(options.game)
    if path := run_of(options.checkpoint):
        _check_whole(path)
        return str(path)
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    raise ValueError(
        f"--game: {options.checkpoint} lies in no run directory, accepted is a recipe's name, "
        f"one of {known}, or a TOML file"
    )


def _check_whole(path: Path) -> None:
    """A run's configuration says all; in one that was cut the rest would have its defaults."""
    with contextlib.suppress(tomllib.TOMLDecodeError):  # of which its reader says more
        if missing := {"game", "dialogue", "eval"} - tomllib.loads(read_text(path)).keys():
            raise ValueError(f"{path} lacks [{min(missing)}], as no run has written it: name a --game")


def rules_of(config: Config, temperature: float | None) -> Rules:
    """Those of training; `temperature`, if given, is that of both talk and final, 0 for the likeliest
    words.
    """
    rules = dataclasses.replace(config.dialogue, always_final=True)
    if temperature is None:
        return rules
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature = {temperature}: accepted is a finite number from 0")
    return dataclasses.replace(rules, temperature=temperature, final_temperature=-1.0)


def hold(person: Person, seed: int) -> None:
    """One dialogue of the person with the policy, and how it ended."""
    game, terminal, side = person.arena.game, person.terminal, person.side
    if game.ending:
        terminal.say(game.ending)
    opponents = [Opponent(role=side, name="person")]
    (group,) = person.arena.play([person.scenario], group_size=1, seed=seed, opponents=opponents)
    (dialogue,) = group.dialogues
    person.show(last_turns(dialogue.turns, side) if game.observed else dialogue.turns)
    assert dialogue.outcome is not None
    if result := game.result(dialogue.outcome, side):
        terminal.say(result, "bold")
    if told := person.scenario.private_text[1 - side].strip() if result else "":
        terminal.say(f"The policy was told: {told}")


def last_turns(turns: Sequence[Turn], side: int) -> Sequence[Turn]:
    """What the other side did after `side` spoke for the last time: no game tells that any more."""
    spoken = [i for i, turn in enumerate(turns) if turn.role == side]
    return turns[spoken[-1] + 1 :] if spoken else turns


class Person(Speaker):
    """A speaker who reads and types in the terminal."""

    who = "the person"

    def __init__(self, arena: Arena, scenario: Scenario, side: int, terminal: Terminal, aloud: Aloud) -> None:
        """`aloud` may have shown what the policy said already."""
        self.arena, self.scenario, self.side, self.terminal = arena, scenario, side, terminal
        self.aloud = aloud
        names = [persona.name for persona in scenario.personas] or ["you", "you"]
        self.name = names[side]
        self.policy = names[1 - side] if scenario.personas else "policy"
        self._asked: Speak | None = None
        self._turns: list[Turn] = []  # all that was said so far

    @property
    def busy(self) -> bool:
        return self._asked is not None

    def ask(self, turn: Speak) -> None:
        self._asked = turn

    def answered(self, wait: bool) -> list[tuple[Speak, Completion | None]]:
        turn, self._asked = self._asked, None
        assert turn is not None
        self.show(turn.heard)
        if self.arena.game.observed:
            words = self._move(turn.legal)
        else:
            words = self._final() if turn.kind == FINAL else self._utterance()
        if not words:
            return [(turn, Completion(finish_reason=LEFT))]
        return [(turn, Completion(token_ids=self.arena.tokenizer.encode(words)))]

    def show(self, turns: Sequence[Turn]) -> None:
        """Print what the policy has said since."""
        new = [turn for turn in turns if not any(turn is known for known in self._turns)]
        self._turns += new
        for turn in new:
            if turn.kind == "prompt":
                if turn.role == self.side:
                    self.terminal.say(turn.text)
            elif turn.role != self.side and turn.kind == "final":
                self.terminal.say(self.arena.game.final_form.format(turn.text), "cyan")
            elif turn.role != self.side and self.aloud.said:
                self.aloud.said -= 1
            elif turn.role != self.side:
                self.terminal.say(f"{self.policy}> {turn.text}", "cyan")

    def _final(self) -> str:
        """The person's final statement; one that the rules cannot read is asked for again."""
        game = self.arena.game
        while True:
            words = self.terminal.read("your selection")
            if words and game.can_state(self.scenario, words):
                return words
            self.terminal.say(f"{words!r} is no selection here: accepted is {game.selection_form}.")

    def _move(self, legal: Sequence[str] | None) -> str:
        """What the game gets; where it says which moves are legal, one of them. "" to leave."""
        while True:
            words = self.terminal.read(self.name)
            if not words or legal is None or words in legal:
                return words
            self.terminal.say(f"{words!r} is not legal here: accepted is {', '.join(legal)}.")

    def _utterance(self) -> str:
        """Words that the policy can hear and still say all that it may have to say; "" to leave."""
        engine, rules, close = self.arena.engine, self.arena.rules, self.arena.game.close
        limit = engine.most_tokens
        left = limit - rules.max_tokens_per_turn - rules.max_tokens_final - FRAMES
        while True:
            words = self.terminal.read(self.name) or close
            ids = self.arena.tokenizer.encode(words)
            turn = Turn(role=self.side, kind="utterance", text=words, token_ids=ids, logprobs=None)
            length = self.arena.contexts.length_after(self.scenario, [*self._turns, turn], 1 - self.side)
            if words in ("", close) or length <= left:
                return words
            too_long = f"That is too long for this policy, whose context holds {limit} tokens."
            self.terminal.say(f"{too_long} Say it shorter, or /done.")


class NoJudge:
    """In place of a judge: nobody sees an agreement, so a talk goes on until its rounds are over or the
    person leaves it.
    """

    who = "nobody"
    max_unscored_share = 0.0
    last_fault = ""

    def __init__(self) -> None:
        self._asked: list[Any] = []

    def submit(self, kind: str, case: Case, tag: Any) -> None:
        self._asked.append(tag)

    def answered(self, wait: bool) -> list[tuple[Any, Answer]]:
        asked, self._asked = self._asked, []
        return [(tag, {"agreed": False}) for tag in asked]
