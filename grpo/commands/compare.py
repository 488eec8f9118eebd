"""How well a policy deliberates: both held-out sets, greedy and sampled, measured by a judge, and against
another checkpoint.

Two answers to one task are shown to the judge in both orders. A win counts only when both orders agree on
it; pairs whose orders contradict each other are counted as inconsistent and belong to nobody. Intervals
hold 95 % of the percentile bootstrap over tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from duologue.grpo.build import MEMORY, build_arena, build_engine, build_judge
from duologue.grpo.config import Config
from duologue.grpo.crossplay import RESAMPLES, Interval, interval
from duologue.grpo.policy import load_policy
from duologue.grpo.sections import HELD, JudgeSection
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.dilemma import AloneGame, DilemmaGame, DilemmaSettings
from duologue.rollout.games.game import UNSCORED
from duologue.rollout.judge.judge import Answer, FeedbackJudge
from duologue.rollout.judge.questions import PREFERENCE, Case
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.dialogue import Dialogue
from rich.table import Table

Policy = tuple[Engine, Tokenizer]
VERDICTS = {"wins": 1, "losses": -1, "ties": 0}
# by the winners in both orders, in the second of which our answer is shown last
KINDS: dict[tuple[str, str], str] = {
    ("1", "2"): "wins",
    ("2", "1"): "losses",
    ("tie", "tie"): "ties",
}


def bootstrap(statistic: Callable[[np.ndarray], float], values: np.ndarray, seed: int) -> Interval:
    """`statistic` of values [n] and the 2.5 and 97.5 percentiles of it over resampled ones (Efron 1979), of
    which NaN are left out.
    """
    value = statistic(values)
    rng, n = np.random.default_rng(seed), len(values)
    resampled = [statistic(values[rng.integers(0, n, n)]) for _ in range(RESAMPLES)]
    return interval(value, np.array(resampled))


def mean(values: np.ndarray) -> float:
    """Of what is there: NaN marks what was not measured."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def win_rate(verdicts: np.ndarray) -> float:
    """Of the pairs with a winner in both orders; verdicts are 1, -1, 0 for a tie and NaN for inconsistent
    or unscored pairs.
    """
    return mean(verdicts[np.abs(verdicts) == 1] == 1)


def hold(
    policy: Policy, game: DilemmaGame, config: Config, judge: FeedbackJudge, temperature: float
) -> list[Dialogue]:
    """One dialogue, or answer, per held-out task, in their order."""
    engine, tokenizer = policy
    arena = build_arena(config, engine, tokenizer, game, judge, temperature=temperature)
    tasks = game.items["heldout"][: config.eval.dialogues]
    scenarios = [game.scenario(item, "heldout", item.personas) for item in tasks]
    groups = arena.play(scenarios, group_size=1, seed=derive_seed(config.train.seed, "eval"))
    engine.release_memory()
    return [group.dialogues[0] for group in groups]


def measures(dialogues: Sequence[Dialogue], alone: bool, seed: int) -> dict[str, Any]:
    """Score, and for talks agreement and rounds to it, each with its interval."""
    outcomes = [d.outcome for d in dialogues if d.outcome is not None]
    scores = np.array([np.nan if o.failure == UNSCORED else o.scores[0] for o in outcomes])
    row: dict[str, Any] = {
        "tasks": len(outcomes),
        "unscored": int(np.isnan(scores).sum()),
        "score": bootstrap(mean, scores, seed),
    }
    if not alone:
        judged = np.array(
            [float(o.agreed) if o.agreed or o.failure != UNSCORED else np.nan for o in outcomes]
        )
        rounds = np.array([float(o.rounds or 0) if o.agreed else np.nan for o in outcomes])
        row |= {"agreement": bootstrap(mean, judged, seed), "rounds": bootstrap(mean, rounds, seed)}
    return row


def final_text(dialogue: Dialogue) -> str:
    return "".join(turn.text for turn in dialogue.turns if turn.kind == "final")


def cut_short(dialogue: Dialogue) -> bool:
    """Whether it ended because a question to the judge stayed unanswered."""
    o = dialogue.outcome
    return o is None or (o.failure == UNSCORED and not any(turn.kind == "final" for turn in dialogue.turns))


def prefer(
    judge: FeedbackJudge, ours: Sequence[Dialogue], theirs: Sequence[Dialogue], seed: int
) -> dict[str, Any]:
    """Pairwise preference for our answers, asked in both orders. Of a judge that gives probabilities also how
    probable it is that ours is better, as the mean of both orders; a tie is half of it. A talk that came to
    no answer for want of a judge is compared with none.
    """
    said: dict[tuple[int, int], Answer] = {}
    for i, pair in enumerate(zip(ours, theirs, strict=True)):
        if any(cut_short(d) for d in pair):
            said[i, 0] = said[i, 1] = None
            continue
        for order in (0, 1):
            first, second = (final_text(d) for d in (pair if order == 0 else pair[::-1]))
            scenario = pair[0].scenario
            case = Case(dilemma=scenario.shared_text, personas=scenario.personas, answers=(first, second))
            judge.submit(PREFERENCE, case, (i, order))
    while len(said) < 2 * len(ours):
        for tag, answer in judge.answered(wait=True):
            said[tag] = answer
    counts = dict.fromkeys((*VERDICTS, "inconsistent", "unscored"), 0)
    verdicts, probabilities = np.full((2, len(ours)), np.nan)
    for i in range(len(ours)):
        one, two = said[i, 0], said[i, 1]
        kind = "unscored"
        if one is not None and two is not None:
            kind = KINDS.get((one["winner"], two["winner"]), "inconsistent")
            if "probabilities" in one:
                shown_first, shown_last = one["probabilities"], two["probabilities"]
                ties = (shown_first["tie"] + shown_last["tie"]) / 2
                probabilities[i] = (shown_first["1"] + shown_last["2"] + ties) / 2
        counts[kind] += 1
        verdicts[i] = VERDICTS.get(kind, np.nan)
    found: dict[str, Any] = {"win_rate": bootstrap(win_rate, verdicts, seed), **counts}
    if not np.isnan(probabilities).all():
        found["probability"] = bootstrap(mean, probabilities, seed)
    return found


def judges(config: Config, policy: tuple[Decoder, Tokenizer]) -> tuple[FeedbackJudge, FeedbackJudge]:
    """Who scores, and who compares: the same judge, or the one that eval.judge_url and eval.judge_model
    name.
    """
    start = (lambda: load_policy(config.model.folder, config)) if config.model.path else (lambda: policy)
    scorer = build_judge(config, MEMORY, start)
    assert scorer is not None
    e = config.eval
    if not (e.judge_url or e.judge_model):
        return scorer, scorer
    unused = {key: getattr(JudgeSection(), key) for key in HELD}
    url = e.judge_url or config.judge.url
    other = dataclasses.replace(config.judge, backend="endpoint", url=url, model=e.judge_model, **unused)
    second = build_judge(dataclasses.replace(config, judge=other), MEMORY, start)
    assert second is not None
    return scorer, second


def both_games(texts: DilemmaSettings, questions: str) -> tuple[DilemmaGame, AloneGame]:
    """The talks and the answers alone: `game.tasks` are of the one that `texts` are of, `questions` of the
    other, where they are given.
    """
    own = texts.tasks if texts.name == AloneGame.name else ""
    talks = dataclasses.replace(texts, tasks="") if own else texts
    alone = dataclasses.replace(texts, tasks=questions or own or str(DilemmaGame.questions))
    return DilemmaGame(talks), AloneGame(alone)


def compare(config: Config, models: dict[str, tuple[Decoder, Tokenizer]]) -> dict[str, Any]:
    """`models`: the policy that is measured, and perhaps one to compare it with; JSON-able."""
    texts = config.game
    if texts.name == "dilemma_alone":  # a recipe without talks has no context for them
        config = dataclasses.replace(config, dialogue=dataclasses.replace(config.dialogue, context="last_2"))
    assert isinstance(texts, DilemmaSettings)
    talks, alone = both_games(texts, config.eval.questions)
    scorer, second = judges(config, next(iter(models.values())))
    policies: dict[str, Policy] = {}
    for name, (model, tokenizer) in models.items():
        policies[name] = build_engine(config, model), tokenizer
        policies[name][0].release_memory()  # only one pool is there at a time
    result: dict[str, Any] = {
        "judge": scorer.backend.name,
        "preference_judge": second.backend.name,
        "seed": config.train.seed,
    }
    try:
        for mode, temperature in (("greedy", 0.0), ("sampled", config.eval.temperature)):
            result[mode] = {}
            for name, game in (("conflicts", talks), ("questions", alone)):
                held = {
                    policy: hold(pair, game, config, scorer, temperature) for policy, pair in policies.items()
                }
                row: dict[str, Any] = {
                    policy: measures(d, game.alone, config.train.seed) for policy, d in held.items()
                }
                if len(held) == 2:
                    ours, theirs = held.values()
                    row["preference"] = prefer(second, ours, theirs, config.train.seed)
                result[mode][name] = row
    finally:
        for judge in {id(j): j for j in (scorer, second)}.values():
            judge.close()
    return result


def table(result: dict[str, Any], policies: Sequence[str]) -> Table:
    """What `compare` found, for people."""

    def cell(x: Interval, form: str) -> str:
        if x["value"] is None:
            return "none"
        return f"{x['value']:{form}}  [{x['low']:{form}}, {x['high']:{form}}]"

    shown = Table(title=f"held-out tasks, judged by {result['judge']}, 95 % intervals", title_justify="left")
    for heading in ("", "measure", *policies):
        shown.add_column(heading, justify="left" if heading in ("", "measure") else "right")
    for mode in ("greedy", "sampled"):
        for name, row in result[mode].items():
            for key, form in (("agreement", ".1%"), ("rounds", ".2f"), ("score", ".2f")):
                if key in row[policies[0]]:
                    shown.add_row(
                        f"{mode} {name}", key, *(cell(row[policy][key], form) for policy in policies)
                    )
            if "preference" in row:
                p = row["preference"]
                rest = ", ".join(f"{p[key]} {key}" for key in (*VERDICTS, "inconsistent", "unscored"))
                shown.add_row(
                    f"{mode} {name}",
                    f"preferred by {result['preference_judge']}",
                    cell(p["win_rate"], ".1%"),
                    rest,
                )
                if "probability" in p:
                    what = "probability of ours, both orders"
                    shown.add_row(f"{mode} {name}", what, cell(p["probability"], ".1%"), "")
    return shown
