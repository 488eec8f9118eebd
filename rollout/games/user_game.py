"""A game that somebody brings: a class with four methods, found by its name, and one play of it.

    reset(seed)                 begin; the same seed is the same game
    observe() -> (side, text)   who moves now, and what that side has not seen yet
    step(text) -> done          the move of that side
    scores() -> (float, float)  of side 0 and side 1, once it is done

What it may have besides: told(side) -> what a side knows before anything is said; legal() -> the moves that
are open, or None for any text; scores_so_far() -> the scores as they stand before the next move; summary() ->
measures by name; script(side, rng) -> what a scripted side would say now.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import math
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from duologue.rollout.seeds import derive_seed
from numpy.random.mtrand import get_bit_generator, set_bit_generator

METHODS = ("reset", "observe", "step", "scores")
FORMS = "'mypackage.mymodule:MyGame', a path to a .py file, or 'textarena:NAME'"
Make = Callable[..., Any]  # of the game's options


class BadGameError(ValueError):
    """A name or options that make no game."""


class GameFailedError(RuntimeError):
    """A game of a user broke while it was played."""


def is_named(name: str) -> bool:
    """Whether a game's name has one of the forms that name a game of a user; "" is one that lacks yet."""
    return not name or ":" in name or name.endswith(".py")


# ---- by name -----------------------------------------------------------------------------------------------


def find(name: str) -> Make:
    """What makes the game that is named. BadGameError says what is wrong with the name or the class."""
    place, colon, attribute = name.rpartition(":")
    place = place if colon else name
    if not is_named(name) or not place or (not attribute and not place.endswith(".py")):
        raise BadGameError(f"game.name = {name!r}: accepted is {FORMS}")
    module = _from_file(Path(place).resolve(), name) if place.endswith(".py") else _from_package(place, name)
    made = getattr(module, attribute, None) if colon else _only_game(module, name)
    if not isinstance(made, type):
        known = ", ".join(kind.__name__ for kind in _classes(module)) or "none"
        raise BadGameError(f"game.name = {name!r}: {place} has no class {attribute!r}; its classes: {known}")
    lacking = [method for method in METHODS if not callable(getattr(made, method, None))]
    if lacking:
        methods = ", ".join(f"{method}()" for method in lacking)
        raise BadGameError(f"game.name = {name!r}: the class {made.__name__} lacks {methods}")
    return made


@cache
def _from_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise BadGameError(f"game.name = {name!r}: there is no file {path}")
    own_name = f"{path.stem}_{derive_seed(str(path)):x}"
    spec = importlib.util.spec_from_file_location(own_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[own_name] = module  # as dataclasses ask for
    with _imports(path.parent, name):
        spec.loader.exec_module(module)
    return module


def _from_package(dotted: str, name: str) -> ModuleType:
    with _imports(Path.cwd(), name):
        return importlib.import_module(dotted)


@contextlib.contextmanager
def _imports(folder: Path, name: str) -> Iterator[None]:
    """Modules of `folder` can be imported too; BadGameError for what goes wrong."""
    before = sys.path[:]
    sys.path.insert(0, str(folder))
    try:
        yield
    except (Exception, SystemExit) as error:
        raise BadGameError(f"game.name = {name!r}: {type(error).__name__}: {error}{_place(error)}") from error
    finally:
        sys.path[:] = before


def _classes(module: ModuleType) -> list[type]:
    kinds = [value for value in vars(module).values() if isinstance(value, type)]
    return [kind for kind in kinds if kind.__module__ == module.__name__]


def _only_game(module: ModuleType, name: str) -> type:
    games = [kind for kind in _classes(module) if any(hasattr(kind, method) for method in METHODS)]
    if len(games) != 1:
        count = ", ".join(kind.__name__ for kind in games) or "none"
        accepted = f"accepted is a file with one, or {name}:CLASS"
        raise BadGameError(f"game.name = {name!r}: classes with a game's methods: {count}; {accepted}")
    return games[0]


def _place(error: BaseException, own: str = "") -> str:
    """Where it was raised: the last line of the file `own` that took part, or else the last line of all."""
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if frame.filename != __file__ and "importlib" not in frame.filename]
    if isinstance(error, SyntaxError) or not frames:
        return ""
    frame = next((f for f in reversed(frames) if f.filename == own), frames[-1])
    return f" ({os.path.relpath(frame.filename)}, line {frame.lineno})"


def check_options(make: Make, name: str, options: Mapping[str, Any]) -> None:
    """BadGameError for names that the game does not know."""
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        what = f"game.options = {dict(options)}"
        raise BadGameError(f"{what}: {name} does not take them: {error}") from None


# ---- one play of it ----------------------------------------------------------------------------------------


class Match:
    """A game that was begun with a seed, and what it says after each move.

    Where it draws from the global generators of Python or numpy, it draws from its own state of them, which
    follows from the seed; theirs is as it was.
    """

    def __init__(self, make: Make, name: str, options: Mapping[str, Any], seed: int) -> None:
        self.name = name
        self._file = getattr(sys.modules.get(getattr(make, "__module__", "")), "__file__", "")
        self.done = False
        self.moves = self.illegal = 0
        self.side, self.text = 0, ""  # who moves now, and what that side has not seen yet
        self.legal: list[str] | None = None
        self.scores = (0.0, 0.0)
        self.summary: dict[str, float] = {}
        self._state: Any = random.Random(seed).getstate()  # as after random.seed(seed), and numpy's after its
        self._bits: Any = np.random.RandomState(seed)._bit_generator
        with self._own_generators():
            self._game = self._guarded("__init__", make, **options)
            self._call("reset", seed)
            self.told = (self._told(0), self._told(1))
            self._look()

    def step(self, text: str) -> None:
        """The move of `side`."""
        assert not self.done
        with self._own_generators():
            self.illegal += self.legal is not None and text not in self.legal
            self.moves += 1
            done = self._call("step", text)
            self.done = bool(self._checked("step", done, "True or False", _is_bool))
            if self.done:
                self._finish()
            else:
                self._look()

    def stop(self) -> None:
        """No further move is made: the measures are taken as they stand."""
        with self._own_generators():
            self.summary = self._summary()

    def scripted(self, rng: random.Random) -> str:
        """What a scripted side would say now."""
        with self._own_generators():
            said = self._call("script", self.side, rng)
        text: str = self._checked("script", said, "a text", _is_text)
        return text

    def scores_so_far(self) -> tuple[float, float]:
        """Of both sides, as they stand before the next move."""
        with self._own_generators():
            return self._scores("scores_so_far")

    def can(self, method: str) -> bool:
        """Whether the game has it."""
        return callable(getattr(self._game, method, None))

    # ---- its methods, each answer checked ------------------------------------------------------------------

    def _look(self) -> None:
        seen = self._checked("observe", self._call("observe"), "a side, 0 or 1, and a text", _is_observation)
        self.side, self.text = int(seen[0]), str(seen[1])
        legal = self._call("legal") if self.can("legal") else None
        self._checked("legal", legal, "None or a list of different texts, at least one", _is_legal)
        self.legal = None if legal is None else list(legal)

    def _finish(self) -> None:
        self.scores = self._scores("scores")
        self.summary = self._summary()

    def _scores(self, method: str) -> tuple[float, float]:
        scores = self._checked(method, self._call(method), "two finite numbers", _are_scores)
        return float(scores[0]), float(scores[1])

    def _told(self, side: int) -> str:
        told = self._call("told", side) if self.can("told") else ""
        text: str = self._checked("told", told, "a text", _is_text)
        return text

    def _summary(self) -> dict[str, float]:
        summary = self._call("summary") if self.can("summary") else {}
        accepted = "finite numbers by names such as my_measure"
        measures: dict[str, float] = self._checked("summary", summary, accepted, _are_measures)
        return {name: float(value) for name, value in measures.items()}

    def _call(self, method: str, *args: Any) -> Any:
        return self._guarded(method, getattr(self._game, method), *args)

    def _guarded(self, method: str, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """GameFailedError for what the game's own code raises, with the line of it."""
        try:
            return function(*args, **options)
        except BadGameError:
            raise
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {error}"
            place = _place(error, self._file)
            raise GameFailedError(f"{self.name}: {method}() raised {what}{place}") from error

    def _checked(self, method: str, answer: Any, accepted: str, fits: Callable[[Any], bool]) -> Any:
        if not fits(answer):
            raise GameFailedError(f"{self.name}: {method}() gave {answer!r:.200}: accepted is {accepted}")
        return answer

    @contextlib.contextmanager
    def _own_generators(self) -> Iterator[None]:
        outer, outer_bits = random.getstate(), get_bit_generator()
        random.setstate(self._state)
        set_bit_generator(self._bits)
        try:
            yield
        finally:
            self._state = random.getstate()
            random.setstate(outer)
            set_bit_generator(outer_bits)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_observation(seen: Any) -> bool:
    pair = isinstance(seen, tuple | list) and len(seen) == 2
    return pair and not isinstance(seen[0], bool) and seen[0] in (0, 1) and isinstance(seen[1], str)


def _is_legal(legal: Any) -> bool:
    if legal is None:
        return True
    texts = isinstance(legal, tuple | list) and all(isinstance(text, str) for text in legal)
    return texts and 0 < len(set(legal)) == len(legal)


def _is_number(value: Any) -> bool:
    """A number that a float can hold."""
    try:
        return isinstance(value, int | float | np.number | np.bool_) and math.isfinite(value)
    except OverflowError:
        return False


def _are_scores(scores: Any) -> bool:
    return isinstance(scores, tuple | list) and len(scores) == 2 and all(map(_is_number, scores))


def _are_measures(summary: Any) -> bool:
    if not isinstance(summary, dict):
        return False
    return all(isinstance(name, str) and name.isidentifier() for name in summary) and all(
        map(_is_number, summary.values())
    )
