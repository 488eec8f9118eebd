"""Any environment of two players of TextArena (https://pypi.org/project/textarena, MIT) as a game.

Its own messages are taken as they come, each once, and not the whole history that its wrappers write anew
before every move. What a player said himself is not told to him again.
"""

from __future__ import annotations

import difflib
from typing import Any

from duologue.rollout.games.user_game import BadGameError

INSTALL = "pip install 'duologue[textarena]'"


class TextArenaGame:
    """`name` is the environment's, such as "KuhnPoker-v0"; `options` are those of its class."""

    def __init__(self, name: str, **options: Any) -> None:
        self._name = name
        self._env = _environment(name, options)
        self._prompts = ("", "")
        self._illegal = 0

    def reset(self, seed: int) -> None:
        try:
            self._env.reset(num_players=2, seed=seed)
        except (AssertionError, LookupError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise BadGameError(f"game.name = 'textarena:{self._name}': no game for two: {reason}") from error
        self._illegal = 0
        self._prompts = (self._taken(0, prompts=True), self._taken(1, prompts=True))

    def told(self, side: int) -> str:
        return self._prompts[side]

    def observe(self) -> tuple[int, str]:
        side = self._env.state.current_player_id
        return side, self._taken(side, prompts=False)

    def step(self, text: str) -> bool:
        state = self._env.state
        player = state.game_info[state.current_player_id]
        errors, lost = getattr(state, "error_count", 0), player["invalid_move"]
        done, _ = self._env.step(text)
        said_back = getattr(state, "error_count", 0) > errors
        self._illegal += said_back or (player["invalid_move"] and not lost)
        return bool(done)

    def scores(self) -> tuple[float, float]:
        rewards = self._env.state.rewards
        return float(rewards[0]), float(rewards[1])

    def summary(self) -> dict[str, float]:
        return {"illegal": float(self._illegal)}

    def _taken(self, side: int, prompts: bool) -> str:
        """The messages to a side that it has not seen: those that tell it the game, or all others."""
        from textarena.core import GAME_ID, ObservationType

        observations = self._env.state.observations
        chosen: list[Any] = []
        later: list[Any] = []
        for message in observations[side]:
            is_prompt = message[2] is ObservationType.PROMPT
            (chosen if is_prompt or not prompts else later).append(message)
        observations[side] = later
        names = self._env.state.role_mapping
        told = []
        for sender, text, _ in chosen:
            if sender != side:
                told.append(text if sender == GAME_ID else f"[{names.get(sender, sender)}] {text}")
        return "\n".join(told).strip()


def _environment(name: str, options: dict[str, Any]) -> Any:
    """Without its wrappers; BadGameError where the package, the environment or its lists of words lack."""
    key = f"game.name = 'textarena:{name}'"
    try:
        import textarena
        from textarena.envs.registration import ENV_REGISTRY
    except ImportError as error:
        raise BadGameError(f"{key}: {error}; the package textarena is needed: {INSTALL}") from error
    if name not in ENV_REGISTRY:
        near = difflib.get_close_matches(name, ENV_REGISTRY, 3) or list(ENV_REGISTRY)[:3]
        raise BadGameError(f"{key}: TextArena has no such environment; it has {', '.join(near)} and others")
    try:
        env = textarena.make(name, **options)
    except LookupError as error:  # nltk's, where a list of words is not there
        words = "python -m nltk.downloader words averaged_perceptron_tagger_eng"
        raise BadGameError(
            f"{key} needs lists of words that are downloaded; where there is a network, run {words}"
        ) from error
    except ImportError as error:
        raise BadGameError(f"{key} needs another package: {error}") from error
    except TypeError as error:
        raise BadGameError(f"game.options = {options}: {key} does not take them: {error}") from error
    while isinstance(env, textarena.Wrapper):
        env = env.env
    return env
