"""Settings that belong together where a judge scores dilemmas, and those that only a game with rules has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duologue.grpo.config import Config

DILEMMAS = ("dilemma", "dilemma_alone")


def judged_rules(c: Config) -> list[tuple[str, str, bool]]:
    """(key, what is accepted, whether it holds)."""
    game, g, d, judge = c.game, c.grpo, c.dialogue, c.judge
    dilemma, alone, final = game.name in DILEMMAS, game.name == "dilemma_alone", "final" in g.train_kinds
    own = (
        "game.dilemmas",
        "game.personas",
        "game.tasks",
        "game.prompts",
        "judge.prompts",
        "judge.ledger",
        "eval.questions",
        "eval.judge_url",
        "eval.judge_model",
    )
    return [
        *((key, "'' with a game that has rules", dilemma or not c.value(key)) for key in own),
        (
            "game.objective",
            "'cooperative' with dilemmas, which a judge scores",
            not dilemma or game.objective == "cooperative",
        ),
        (
            "judge.backend",
            "'rules' with a game that has them, otherwise another",
            (judge.backend == "rules") != dilemma,
        ),
        ("judge.url", "'' without judge.backend = 'endpoint'", not judge.url or judge.backend == "endpoint"),
        (
            "judge.url",
            "'' or an address that begins with http:// or https://",
            re.match(r"https?://[^/]|$", judge.url) is not None,
        ),
        (
            "judge.key_env",
            "the one place for a credential: judge.url takes none, and no query",
            not set("@?#") & set(judge.url),
        ),
        (
            "imitation.steps",
            "0 with dilemmas, for which there are no scripts",
            not (dilemma and c.imitation.steps),
        ),
        (
            "grpo.imitation_coef",
            "0 with dilemmas, for which there are no scripts",
            not (dilemma and g.imitation_coef),
        ),
        ("grpo.train_roles", "'first' where one answers alone", not alone or g.train_roles == "first"),
        ("grpo.train_kinds", "['final'] where one answers alone", not alone or g.train_kinds == ("final",)),
        ("dialogue.context", "'full' with a game that has rules", dilemma or d.context == "full"),
        (
            "dialogue.final_temperature",
            "dialogue.temperature, or -1, where grpo.train_kinds has 'final': one temperature is trained",
            not final or d.final_temperature in (-1, d.temperature),
        ),
    ]
