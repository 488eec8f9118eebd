"""What a policy has kept of its base's language: instructions that can be checked, the perplexity of a plain
text, and how far both are from each other on that text and on dialogues of the base.

    found = measure(config, policy, base)         # JSON-able, for summary.json
    print(found["line"])

Answers are greedy, in the chat template's own form of one question without a system turn of ours. The scores
of one policy say little, for the noise of the prompts is larger than most changes: what counts is the paired
difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from duologue.grpo.ability.distance import PLAIN, Distance, Passage, distance, passages
from duologue.grpo.ability.instructions import Verdict, verdict
from duologue.grpo.ability.paired import paired
from duologue.grpo.ability.prompts import Prompt, own_prompts, read_prompts
from duologue.grpo.build import build_engine
from duologue.grpo.config import Config
from duologue.grpo.evaluate import AT_ONCE, evaluate
from duologue.grpo.policy import load_policy
from duologue.grpo.world import ALONE, World
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder
from duologue.model.peft import CONFIG as ADAPTER_CONFIG
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.pages import CACHE_TOKENS
from duologue.rollout.engine.sequence import SamplingParams
from duologue.rollout.games.game import Game
from duologue.rollout.judge.judge import FeedbackJudge

DIALOGUES = 64  # of the base, at most
LEVELS = ("strict", "loose")
Scores = dict[str, np.ndarray]  # "strict", "loose": [prompts, instructions], NaN beyond a prompt's own
Row = dict[str, Any]
Note = Callable[[str], None]


def _silently(line: str) -> None:
    return


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model to be measured, on its engine."""

    engine: Engine
    tokenizer: Tokenizer

    @property
    def model(self) -> Decoder:
        return self.engine.model


def measure(
    config: Config,
    policy: Subject,
    base: Subject | None = None,
    game: Game | None = None,
    judge: FeedbackJudge | None = None,
    world: World = ALONE,
    note: Note = _silently,
) -> Row:
    """Everything, of the policy alone where there is no base; dialogues where a `game` is given. `note` is
    told how far it is.
    """
    if base is not None and not base.tokenizer.equals(policy.tokenizer):
        raise ValueError("--against: the tokenizers differ, accepted is a base with the same tokenizer")
    e = config.eval
    prompts = read_prompts(Path(e.ifeval)) if e.ifeval else own_prompts(e.ability_prompts)
    checked = [prompt for prompt in prompts if prompt.checks]
    subjects = {"policy": policy} if base is None else {"base": base, "policy": policy}
    limit = min(one.engine.most_tokens for one in subjects.values())
    said = {}
    for name, one in subjects.items():
        said[name] = answers(one, checked, e.ability_tokens, limit, world, note=note, name=name)
    asked = [i for i, answer in enumerate(said["policy"]) if answer is not None]
    row: Row = {
        "prompts": Path(e.ifeval).name if e.ifeval else "ours",
        "asked": len(asked),
        "left_out": {
            "langdetect is not installed": len(prompts) - len(checked),
            "longer than the context": len(checked) - len(asked),
        },
        "max_new_tokens": e.ability_tokens,
    }
    kept = [checked[i] for i in asked]
    scored = {name: scores(kept, [of[i] or "" for i in asked]) for name, of in said.items()}
    if kept:
        row |= _shares(scored, config.train.seed)
    row["answers"] = [
        {"key": checked[i].key, "prompt": checked[i].text, **{name: of[i] for name, of in said.items()}}
        for i in asked
    ]
    text = passages(policy.tokenizer, PLAIN.read_text("utf-8"), limit)
    row["plain_text"] = _distance(policy, base, text, world)
    if base is not None and game is not None:
        note("dialogues of the base")
        talks = base_dialogues(config, base, game, judge, world)
        row["dialogues"] = _distance(policy, base, talks, world)
    row["line"] = line(row)
    return row


def at_end(
    config: Config,
    engine: Engine,
    tokenizer: Tokenizer,
    game: Game,
    judge: FeedbackJudge | None,
    world: World,
    note: Note = _silently,
) -> Row:
    """Of a run that began from `model.path`, which is the base."""
    policy = Subject(engine=engine, tokenizer=tokenizer)
    found = measure(config, policy, base_of(config, policy), game, judge, world, note)
    del found["answers"]  # a summary has no room for them
    return found


def base_of(config: Config, policy: Subject) -> Subject:
    """What `model.path` holds; under an adapter that is new, the policy's own frozen weights."""
    path, model = config.model.folder, policy.model
    if isinstance(model, LoraDecoder) and not (path / ADAPTER_CONFIG).is_file():
        base, tokenizer = model.adapter_off, policy.tokenizer
    else:
        base, tokenizer = load_policy(path, config)
    return subject(config, base, tokenizer)


def subject(config: Config, model: Decoder, tokenizer: Tokenizer) -> Subject:
    """On an engine whose pool is made when it is needed."""
    engine = build_engine(config, model, CACHE_TOKENS)
    engine.release_memory()
    return Subject(engine=engine, tokenizer=tokenizer)


# ---- instructions ------------------------------------------------------------------------------------------


def answers(
    subject: Subject,
    prompts: Sequence[Prompt],
    n_tokens: int,
    limit: int,
    world: World = ALONE,
    *,
    note: Note = _silently,
    name: str = "",
) -> list[str | None]:
    """One greedy answer per prompt, of `n_tokens` at most; None for a prompt that leaves a context of `limit`
    tokens no place for one. `note` is told how many there are, of `name`.
    """
    chat, tokenizer = subject.tokenizer.turn_chat, subject.tokenizer
    contexts = [chat.question(tokenizer.encode(prompt.text)) for prompt in prompts]
    fits = [i for i, ids in enumerate(contexts) if len(ids) < limit]
    said: list[str | None] = [None] * len(prompts)
    subject.engine.name_weights(0)
    for start in range(0, len(fits), AT_ONCE):
        part = fits[start : start + AT_ONCE]
        texts: list[str] = []
        for numbers in world.hand_out([0.0] * len(part)):  # world
            mine = [contexts[part[number]] for number in numbers]
            params = [_greedy(min(n_tokens, limit - len(ids)), tokenizer) for ids in mine]
            done = subject.engine.generate(mine, params)
            texts += [tokenizer.decode(completion.token_ids) for completion in done]
        for i, text in zip(part, world.gather(texts), strict=True):  # world
            said[i] = text
        note(f"{name}: {start + len(part)} of {len(fits)} answers")
    subject.engine.release_memory()
    return said


def _greedy(limit: int, tokenizer: Tokenizer) -> SamplingParams:
    stops = tuple(sorted(tokenizer.turn_chat.stop_token_ids))
    return SamplingParams(max_new_tokens=limit, temperature=0.0, stop_token_ids=stops)


def scores(prompts: Sequence[Prompt], said: Sequence[str]) -> Scores:
    width = max((len(prompt.checks) for prompt in prompts), default=0)
    found = {level: np.full((len(prompts), width), np.nan) for level in LEVELS}
    for i, (prompt, answer) in enumerate(zip(prompts, said, strict=True)):
        of_answer: Verdict = verdict(prompt.checks, answer)
        for level in LEVELS:
            held = getattr(of_answer, level)
            found[level][i, : len(held)] = held
    return found


def _shares(scored: dict[str, Scores], seed: int) -> Row:
    """By level: of prompts all of whose instructions are followed, and of instructions."""
    row: Row = {}
    for level in LEVELS:
        held = {name: of[level] for name, of in scored.items()}
        whole = {name: np.nanmin(of, axis=1, keepdims=True) for name, of in held.items()}
        row[f"{level}_prompt"] = _compared(whole, seed)
        row[f"{level}_instruction"] = _compared(held, seed)
    return row


def _compared(values: Scores, seed: int) -> Row:
    if "base" in values:
        return dataclasses.asdict(paired(values["base"], values["policy"], seed))
    return {"after": float(np.nanmean(values["policy"]))}


# ---- distance ----------------------------------------------------------------------------------------------


def base_dialogues(
    config: Config, base: Subject, game: Game, judge: FeedbackJudge | None, world: World
) -> list[Passage]:
    """What the base says to itself on held-out scenarios, as each side sees it; its own tokens count."""
    e = dataclasses.replace(config.eval, dialogues=min(DIALOGUES, config.eval.dialogues))
    held = dataclasses.replace(config, eval=e)
    _, dialogues = evaluate(base.engine, base.tokenizer, game, held, judge, world)
    base.engine.release_memory()
    views = [view for dialogue in dialogues for view in dialogue.views]
    found = [
        Passage(token_ids=view.token_ids, places=[t for t, kind in enumerate(view.kinds) if kind and t])
        for view in views
    ]
    return [passage for passage in found if passage.places]


def _distance(policy: Subject, base: Subject | None, texts: Sequence[Passage], world: World) -> Row:
    found: Distance = distance(policy.model, None if base is None else base.model, texts, world)
    row = dataclasses.asdict(found) | {"perplexity": found.perplexity}
    if found.base_perplexity is not None:
        row |= {"base_perplexity": found.base_perplexity}
        row["perplexity_change"] = found.perplexity / found.base_perplexity - 1
    return row


# ---- in words ----------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """One line for tables: with a base the paired difference, without one what there is."""
    name = "instructions" if row["prompts"] == "ours" else "IFEval"
    text, parts = row["plain_text"], []
    share = row.get("strict_prompt", {})
    if "before" in share:
        before, after, value, low, high = (
            100 * share[key] for key in ("before", "after", "value", "low", "high")
        )
        parts.append(f"{name} strict {before:.1f} -> {after:.1f} ({value:+.1f}, [{low:.1f}, {high:.1f}])")
    elif share:
        parts.append(f"{name} strict {100 * share['after']:.1f}")
    if "perplexity_change" in text:
        parts.append(f"perplexity {100 * text['perplexity_change']:+.1f} %")
        parts.append(f"KL {text['kl_base_policy']:.2f}")
    else:
        parts.append(f"perplexity {text['perplexity']:.1f}, no base to compare with")
    return "language: " + ", ".join(parts)
