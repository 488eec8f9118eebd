"""Two checkpoints on the same contexts: what each says to itself from the same scenarios and seeds, and how
likely each finds the other's words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duologue.grpo.build import build_engine, build_game, check_context, measuring_rules
from duologue.grpo.checkpoints import latest_checkpoint
from duologue.grpo.config import Config
from duologue.grpo.evaluate import draw_contexts, hold
from duologue.grpo.microbatch import fitted
from duologue.grpo.packing import Row, pack, split_rows
from duologue.grpo.policy import load_policy, use_device
from duologue.grpo.rows import view_row
from duologue.grpo.update import trained_logprobs
from duologue.model.checkpoint import is_checkpoint
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.pages import CACHE_TOKENS
from duologue.rollout.judge.judge import Answer
from duologue.rollout.judge.questions import AGREEMENT, Case
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import FINAL, UTTERANCE, Dialogue, assign_rewards
from duologue.rollout.selfplay.rules import Rules

STAGE = "checkpoints"  # of a record: these dialogues are no run's
KINDS = {"utterance": UTTERANCE, "final": FINAL}
Logprobs = list[list[float]]  # of each dialogue, of all tokens of its turns


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """The dialogues of a checkpoint with itself. `own` are the log-probs of its words by the training forward
    of its weights, `other` by those of the other checkpoint, over what each token was drawn from.
    """

    name: str
    dialogues: Sequence[Dialogue]
    own: Logprobs
    other: Logprobs

    def records(self) -> Iterator[tuple[dict[str, Any], list[float]]]:
        """As lines of dialogues.jsonl, with the log-probs by the other checkpoint."""
        for number, dialogue in enumerate(self.dialogues):
            record = dialogue.record(True, step=0, stage=STAGE, policy=self.name)
            yield record | {"weights_version": None}, self.other[number]

    @property
    def mismatch(self) -> float:
        """The largest difference between `own` and what the engine gave when it drew the tokens."""
        drawn = [x for d in self.dialogues for turn in d.turns for x in turn.logprobs or ()]
        own = [x for values in self.own for x in values if not math.isnan(x)]
        return max((abs(a - b) for a, b in zip(drawn, own, strict=True)), default=0.0)


class Silent:
    """In place of a judge: nobody sees an agreement, and nothing is scored."""

    who = "nobody"
    max_unscored_share = 1.0
    last_fault = ""

    def __init__(self) -> None:
        self._asked: list[tuple[Any, Answer]] = []

    def submit(self, kind: str, case: Case, tag: Any) -> None:
        self._asked.append((tag, {"agreed": False} if kind == AGREEMENT else None))

    def answered(self, wait: bool) -> list[tuple[Any, Answer]]:
        asked, self._asked = self._asked, []
        return asked


def find(run_dir: Path, name: str) -> Path:
    """A checkpoint by its name in the run, by its step, as its last one, or by its folder."""
    folder = run_dir / "checkpoints"
    if name == "last" and (latest := latest_checkpoint(run_dir)):
        return latest
    names = [name, f"step_{int(name):06d}"] if name.isdecimal() else [name]
    places = [*(folder / each for each in names), Path(name)]
    for place in places:
        if is_checkpoint(place):
            return place
    there = ", ".join(sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())) or "none yet"
    raise ValueError(f"--checkpoints {name}: accepted is a folder, or one of {folder}: {there}")


def compare(config: Config, checkpoints: dict[str, Path], n: int, greedy: bool) -> list[Held]:
    """Both checkpoints on the first `n` contexts that policies of the run are measured on, with the draws and
    the openers of an evaluation; `greedy` takes the likeliest tokens.
    """
    use_device(config)
    config = fitted(config)
    policies = {name: load_policy(path, config) for name, path in checkpoints.items()}
    (first, tokenizer), (second, other) = policies.values()
    if not tokenizer.equals(other):
        a, b = checkpoints
        raise ValueError(f"--checkpoints {a} {b}: accepted are two with the same tokenizer and chat template")
    rules = measuring_rules(config, 0.0 if greedy else config.eval.temperature)
    results = []
    for name, model, stranger in zip(policies, (first, second), (second, first), strict=True):
        dialogues = _play(config, model, tokenizer, rules, n)
        limit = config.train.tokens_per_microbatch
        own, others = (logprobs(by, dialogues, rules, limit) for by in (model, stranger))
        results.append(Held(name=name, dialogues=dialogues, own=own, other=others))
    return results


def _play(config: Config, model: Decoder, tokenizer: Tokenizer, rules: Rules, n: int) -> list[Dialogue]:
    game, engine = build_game(config), build_engine(config, model, CACHE_TOKENS)
    engine.name_weights(0)
    arena = Arena(engine, tokenizer, game, rules, Silent())
    check_context(engine, arena.contexts)
    dialogues = hold(arena, draw_contexts(config, game, n), config.train.seed)
    assign_rewards(game, dialogues)
    engine.release_memory()
    return dialogues


def logprobs(model: Decoder, dialogues: Sequence[Dialogue], rules: Rules, max_tokens: int) -> Logprobs:
    """Of all tokens of the dialogues' turns under `model`, NaN of those that nobody sampled."""
    by_role: list[tuple[list[float], list[float]]] = [([], []) for _ in dialogues]
    marked = _marked(model, dialogues, rules, max_tokens)
    for number, dialogue in enumerate(dialogues):
        for v, role in enumerate(dialogue.view_roles):
            by_role[number][role].extend(marked[number, v])
    values = []
    for dialogue, sides in zip(dialogues, by_role, strict=True):
        left = [iter(side) for side in sides]
        values.append(
            [
                math.nan if turn.logprobs is None else next(left[turn.role])
                for turn in dialogue.turns
                for _ in turn.token_ids
            ]
        )
    return values


def _marked(
    model: Decoder, dialogues: Sequence[Dialogue], rules: Rules, max_tokens: int
) -> dict[tuple[int, int], list[float]]:
    """(dialogue, view) -> log-probs of the view's sampled tokens, in their order."""
    found: dict[tuple[int, int], dict[int, float]] = {}
    for kind, number in KINDS.items():
        rows: list[Row] = []
        for d, dialogue in enumerate(dialogues):
            for v, view in enumerate(dialogue.views):
                found.setdefault((d, v), {})
                rows.append(view_row(view, (kind,), 0.0, d, v))
        temperature = rules.sampling(number, 0, ()).temperature or 1.0  # greedy ones have that of 1
        for part in split_rows([row for row in rows if row.n_trained], max_tokens):
            values = iter(trained_logprobs(model, pack(part, model.head_weight.device), temperature).tolist())
            for row in part:
                marked = [t for t, trained in enumerate(row.loss_mask) if trained]
                found[row.dialogue_id, row.role].update({t: next(values) for t in marked})
    return {place: [values[t] for t in sorted(values)] for place, values in found.items()}
