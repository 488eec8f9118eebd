"""How well a policy negotiates: dialogues on held-out scenarios, and the game's own measures."""

from __future__ import annotations

import random

from duologue.grpo.build import AnyGame, AnyJudge, build_arena
from duologue.grpo.config import Config
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.dialogue import Dialogue


def evaluate(
    model: Decoder, tokenizer: Tokenizer, game: AnyGame, config: Config, judge: AnyJudge
) -> tuple[dict[str, float], list[Dialogue]]:
    """`eval.dialogues` dialogues of the policy with itself on `eval.split`, sampled at `eval.temperature` (0 = greedy).

    The scenarios and the draws follow from `train.seed` alone, so two policies are compared on the same ones.
    """
    arena = build_arena(config, model, tokenizer, game, judge, temperature=config.eval.temperature)
    rng = random.Random(derive_seed(config.train.seed, "eval"))
    scenarios = [game.sample(rng, config.eval.split) for _ in range(config.eval.dialogues)]
    dialogues = []
    for start in range(0, len(scenarios), 256):  # bounds the pool that is needed
        groups = arena.play(
            scenarios[start : start + 256], group_size=1, seed=derive_seed(config.train.seed, "eval", start)
        )
        dialogues += [group.dialogues[0] for group in groups]
    judge.settle(dialogues)
    return game.summarise([d.outcome for d in dialogues if d.outcome is not None]), dialogues
