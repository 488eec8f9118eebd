"""The configuration of a run: frozen, read from TOML and `section.key=value` overrides; nothing writes back.

Whatever is unknown, of another type or out of range is a ValueError that names the key, the value and what is accepted.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from duologue.grpo.judged import judged_rules
from duologue.grpo.loss import KL_ESTIMATORS, VARIANTS
from duologue.grpo.opposition import OpponentSection, opponent_rules
from duologue.grpo.optimizer import SCHEDULES
from duologue.grpo.settings import meant, parse, to_toml, typed
from duologue.kernels.advantage import METHODS
from duologue.model.checkpoint import DTYPES
from duologue.model.lora import TARGETS
from duologue.rollout.games.catalogue import GAMES
from duologue.rollout.games.game import GameSettings

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """`path` names a Hugging Face checkpoint; empty, a Qwen3 decoder of the sizes below starts from nothing."""

    path: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 0  # 0 = hidden_size / num_heads
    vocab_size: int = 512
    max_position: int = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """Rank 0 trains all weights; above, only an adapter on the frozen weights of `model.path`."""

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0  # in updates only, so the ratio to the rollout's log-probs carries its noise
    quantize: str = ""  # "nf4": the frozen layers in four bits, by bitsandbytes


@dataclass(frozen=True, kw_only=True, slots=True)
class GameSection:
    name: str = "deal"
    objective: str = "cooperative"
    walk_away: float = 0.0  # points of a side without a deal, under objective "selfish"
    item_types: int = 3
    total_value: int = 10
    dilemmas: str = ""  # .jsonl files of the dilemma games, "" for those that come with the package
    personas: str = ""
    tasks: str = ""
    prompts: str = ""  # a folder of prompts that replace the package's


@dataclass(frozen=True, kw_only=True, slots=True)
class ImitationSection:
    """Imitating scripted negotiators before self-play; 0 steps skips the stage."""

    steps: int = 0
    dialogues: int = 20_000  # size of the scripted corpus
    dialogues_per_step: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    steps: int = 100
    seed: int = 0
    save_every: int = 25
    keep_checkpoints: int = 2
    tokens_per_microbatch: int = 16_384
    max_seconds: float = 0.0  # of training time; self-play ends after the step that passes it; 0 = no limit
    threads: int = 0  # 0 = all cores
    kl_every: int = 10  # measure KL to the start on every k-th step; 0 = never


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoSection:
    group_size: int = 8
    groups_per_step: int = 16
    updates_per_rollout: int = 1
    train_roles: str = "both"
    train_kinds: tuple[str, ...] = ("utterance", "final")
    learning_rate: float = 1e-4
    warmup_steps: int = 5
    schedule: str = "constant"
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    loss: str = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    advantage: str = "std"
    per_role: bool = True
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    tis_cap: float = 0.0
    imitation_coef: float = 0.0  # weight of imitation batches mixed into the updates


@dataclass(frozen=True, kw_only=True, slots=True)
class DialogueSection:
    max_rounds: int = 5
    max_tokens_per_turn: int = 48
    max_tokens_final: int = 12
    context: str = "full"
    temperature: float = 1.0
    top_p: float = 1.0  # a truncated draw is trained by the distribution that it was drawn from
    final_temperature: float = -1.0  # of the final; below 0: as temperature
    final_top_p: float = 0.0  # 0: as top_p
    first_speaker: str = "random"  # drawn per group; "first": side 0; "alternate": in turn, from group to group and step to step


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeSection:
    """Who scores. "endpoint": the server at `url`; "model": the checkpoint in the folder `model`; "policy": the starting weights."""

    backend: str = "rules"
    url: str = ""
    model: str = ""  # the server's name of it, or a folder
    key_env: str = "DUOLOGUE_JUDGE_KEY"  # the environment variable that holds the server's API key
    prompts: str = ""  # a folder of prompts that replace the package's
    show_dialogue: bool = False  # to the scorer
    ledger: str = ""  # the file of all answers; "" for judge.sqlite in the run directory
    offline: bool = False  # ask nobody: all answers come from the ledger
    concurrency: int = 16
    timeout_s: float = 60.0  # of a request
    deadline_s: float = 240.0  # of a question with all its tries
    temperature: float = 0.0
    max_tokens: int = 512
    max_unscored_share: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSection:
    page_size: int = 16
    cache_tokens: int = (
        65_536  # 0: 85 % of the GPU memory that is free when the engine is made, given back during updates
    )
    max_batch: int = 256
    exact: bool = True
    release_memory: bool = False  # give the KV pool's memory back during each update


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSection:
    dialogues: int = 500
    split: str = "heldout"
    temperature: float = 1.0
    questions: str = ""  # a .jsonl file of open-ended questions in place of the package's
    judge_url: str = ""  # a second judge, which compares answers: a server, and its name of the model
    judge_model: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    model: ModelSection = field(default_factory=ModelSection)
    game: GameSection = field(default_factory=GameSection)
    imitation: ImitationSection = field(default_factory=ImitationSection)
    train: TrainSection = field(default_factory=TrainSection)
    grpo: GrpoSection = field(default_factory=GrpoSection)
    lora: LoraSection = field(default_factory=LoraSection)
    dialogue: DialogueSection = field(default_factory=DialogueSection)
    judge: JudgeSection = field(default_factory=JudgeSection)
    opponent: OpponentSection = field(default_factory=OpponentSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    eval: EvalSection = field(default_factory=EvalSection)

    def __post_init__(self) -> None:
        for key, accepted in _CHOICES.items():
            value = self.value(key)
            for item in value if isinstance(value, tuple) else (value,):
                if item not in accepted:
                    raise ValueError(f"{key} = {item!r}: accepted is one of {', '.join(map(repr, accepted))}")
        game_settings(self.game)
        for key, (low, high) in _RANGES.items():
            value = self.value(key)
            if not low <= value <= high:
                raise ValueError(f"{key} = {value}: accepted is {low} to {'any' if high == _ANY else high}")
        for key, rule, holds in _rules(self):
            if not holds:
                raise ValueError(f"{key} = {to_toml(self.value(key))}: accepted is {rule}")

    def value(self, key: str) -> Any:
        """What `section.key` is set to."""
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    def to_toml(self) -> str:
        """The resolved configuration; `load_config` reads it back to an equal one."""
        lines: list[str] = []
        for section in dataclasses.fields(self):
            lines.append(f"[{section.name}]")
            values = getattr(self, section.name)
            lines += [f"{f.name} = {to_toml(getattr(values, f.name))}" for f in dataclasses.fields(values)]
            lines.append("")
        return "\n".join(lines)


def game_settings(section: GameSection) -> GameSettings:
    """The settings of the game that is named."""
    kind = GAMES[section.name].Settings
    return kind(**{field.name: getattr(section, field.name) for field in dataclasses.fields(kind)})


_ANY = 10**12
_CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": tuple(DTYPES),
    "lora.targets": TARGETS,
    "lora.quantize": ("", "nf4"),
    "game.name": (*GAMES,),
    "grpo.train_roles": ("both", "first"),
    "grpo.train_kinds": ("utterance", "final"),
    "grpo.schedule": SCHEDULES,
    "grpo.loss": VARIANTS,
    "grpo.advantage": METHODS,
    "grpo.kl_estimator": KL_ESTIMATORS,
    "dialogue.context": ("full", "last_2"),
    "dialogue.first_speaker": ("random", "first", "alternate"),
    "judge.backend": ("rules", "endpoint", "model", "policy"),
    "eval.split": ("heldout", "train"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "model.hidden_size": (1, _ANY),
    "model.intermediate_size": (1, _ANY),
    "model.num_layers": (1, _ANY),
    "model.num_heads": (1, _ANY),
    "model.num_kv_heads": (1, _ANY),
    "model.vocab_size": (261, _ANY),
    "model.max_position": (32, _ANY),
    "model.head_dim": (0, 256),
    "lora.rank": (0, 4096),
    "lora.alpha": (1e-6, _ANY),
    "lora.dropout": (0, 0.99),
    "imitation.steps": (0, _ANY),
    "imitation.dialogues": (1, _ANY),
    "imitation.dialogues_per_step": (1, _ANY),
    "imitation.learning_rate": (1e-12, 1),
    "imitation.warmup_steps": (0, _ANY),
    "train.steps": (0, _ANY),
    "train.seed": (0, 2**31),
    "train.save_every": (1, _ANY),
    "train.keep_checkpoints": (1, _ANY),
    "train.tokens_per_microbatch": (1, _ANY),
    "train.max_seconds": (0, _ANY),
    "train.threads": (0, 4096),
    "train.kl_every": (0, _ANY),
    "grpo.group_size": (2, _ANY),
    "grpo.groups_per_step": (1, _ANY),
    "grpo.updates_per_rollout": (1, 100),
    "grpo.learning_rate": (1e-12, 1),
    "grpo.weight_decay": (0, 1),
    "grpo.warmup_steps": (0, _ANY),
    "grpo.max_grad_norm": (0, _ANY),
    "grpo.clip_low": (0, 1),
    "grpo.clip_high": (0, _ANY),
    "grpo.dual_clip": (0, _ANY),
    "grpo.kl_coef": (0, _ANY),
    "grpo.entropy_coef": (0, _ANY),
    "grpo.tis_cap": (0, _ANY),
    "grpo.imitation_coef": (0, _ANY),
    "dialogue.max_rounds": (1, _ANY),
    "dialogue.max_tokens_per_turn": (1, _ANY),
    "dialogue.max_tokens_final": (1, _ANY),
    "dialogue.temperature": (0, 100),
    "dialogue.final_temperature": (-1, 100),
    "dialogue.final_top_p": (0, 1),
    "judge.concurrency": (1, 4096),
    "judge.timeout_s": (0.01, _ANY),
    "judge.deadline_s": (0.01, _ANY),
    "judge.temperature": (0, 100),
    "judge.max_tokens": (1, _ANY),
    "judge.max_unscored_share": (0, 0.99),
    "rollout.page_size": (16, 1024),
    "rollout.cache_tokens": (0, _ANY),
    "rollout.max_batch": (1, _ANY),
    "eval.dialogues": (1, _ANY),
    "eval.temperature": (0, 100),
}


def _rules(c: Config) -> list[tuple[str, str, bool]]:
    """(key, what is accepted, whether it holds) where a range is not enough: forms, and keys that depend on others."""
    m, game, g, r = c.model, c.game, c.grpo, c.rollout
    scratch = not m.path  # otherwise the sizes are the checkpoint's
    dual = f"0, or above 1 + clip_high = {1 + g.clip_high:g} for a loss other than cispo"
    size = f"an even number, or 0 where hidden_size / num_heads ({m.hidden_size} / {m.num_heads}) is one"
    deal = "deal with item_types, total_value or walk_away changed, which the rules of other games set"
    return [
        ("model.device", "cpu, cuda or cuda:N", bool(re.fullmatch(r"cpu|cuda(:\d+)?", m.device))),
        (
            "model.num_heads",
            f"a multiple of num_kv_heads ({m.num_kv_heads})",
            not scratch or m.num_heads % m.num_kv_heads == 0,
        ),
        ("model.head_dim", size, not scratch or (m.head_dim or m.hidden_size / m.num_heads) % 2 == 0),
        (
            "lora.rank",
            "0 without model.path, the frozen weights that an adapter needs",
            not (c.lora.rank and scratch),
        ),
        ("lora.targets", "at least one linear", bool(c.lora.targets)),
        (
            "lora.quantize",
            "'' with lora.rank = 0, where all weights are trained",
            not c.lora.quantize or c.lora.rank > 0,
        ),
        (
            "game.name",
            deal,
            game.name == "deal" or (game.item_types, game.total_value, game.walk_away) == (3, 10, 0),
        ),
        *judged_rules(c),
        *opponent_rules(c),
        ("dialogue.top_p", "above 0 and up to 1", 0 < c.dialogue.top_p <= 1),
        (
            "dialogue.temperature",
            "above 0: greedy dialogues are all alike and teach nothing",
            c.dialogue.temperature > 0,
        ),
        ("rollout.page_size", "a multiple of 16", r.page_size % 16 == 0),
        ("rollout.exact", "true on cpu, where the kernels are always exact", r.exact or m.device != "cpu"),
        (
            "grpo.tis_cap",
            "0 while rollout.exact = true, where the weight would be 1",
            not (g.tis_cap and r.exact),
        ),
        ("grpo.updates_per_rollout", "1 with grpo.tis_cap", not g.tis_cap or g.updates_per_rollout == 1),
        (
            "grpo.betas",
            "a list of two numbers from 0 to below 1",
            len(g.betas) == 2 and all(0 <= b < 1 for b in g.betas),
        ),
        (
            "grpo.train_kinds",
            "'utterance', 'final' or both, each once",
            0 < len(set(g.train_kinds)) == len(g.train_kinds),
        ),
        ("grpo.dual_clip", dual, not g.dual_clip or (g.dual_clip > 1 + g.clip_high and g.loss != "cispo")),
        (
            "grpo.per_role",
            "true with grpo.advantage = 'running', which is per role",
            g.per_role or g.advantage != "running",
        ),
    ]


def load_config(recipe_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe's name or a TOML file, with `section.key=value` overrides.

    ValueError names an unknown recipe, section, key or value, and what is accepted.
    """
    path = Path(recipe_or_path)
    if not path.suffix and not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.toml"))
        if recipe_or_path not in known:
            accepted = f"{meant(recipe_or_path, known)}, or a path to a .toml file"
            raise ValueError(f"unknown recipe {recipe_or_path!r}: {accepted}")
        path = RECIPES / f"{recipe_or_path}.toml"
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        key, found, text = override.partition("=")
        section, _, name = key.partition(".")
        if not found or not name:
            raise ValueError(f"override {override!r}: accepted is section.key=value, e.g. grpo.group_size=8")
        table = raw.setdefault(section.strip(), {})
        if isinstance(table, dict):
            default = getattr(getattr(Config(), section.strip(), None), name.strip(), None)
            table[name.strip()] = parse(text.strip(), isinstance(default, str))
    return from_dict(raw)


def from_dict(raw: dict[str, Any]) -> Config:
    """Sections and keys to a Config; every one must be known and of its type."""
    sections: dict[str, Any] = get_type_hints(Config)
    built: dict[str, Any] = {}
    for name, values in raw.items():
        if name not in sections:
            raise ValueError(f"unknown section [{name}]: {meant(name, list(sections))}")
        kind = sections[name]
        fields = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
        if not isinstance(values, dict):
            raise ValueError(f"{name} = {values!r}: accepted is a section [{name}] of keys")
        for key in values:
            if key not in fields:
                raise ValueError(f"unknown key {name}.{key}: {meant(key, list(fields))}")
        built[name] = kind(
            **{key: typed(f"{name}.{key}", value, fields[key]) for key, value in values.items()}
        )
    return Config(**built)
