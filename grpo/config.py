"""The settings of a run: frozen dataclasses, read from TOML, changed by `section.key=value`, written back with the run.

    config = load_config("deal", ["train.steps=50", "grpo.group_size=16"])

Whatever is unknown, of another type or out of range is a ValueError that names the key, the value and what is accepted.
A section of the file is a class below; a class lists each key with its default and its range.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from duologue.grpo.advantage import KINDS
from duologue.grpo.loss import KL_ESTIMATORS, VARIANTS, LossConfig
from duologue.grpo.optimizer import SCHEDULES

TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def setting(default: Any, *, least: float | None = None, above: float | None = None, most: float | None = None) -> Any:
    """A number and its range."""
    limits = [f"{sign} {limit:g}" for sign, limit in ((">=", least), (">", above), ("<=", most)) if limit is not None]
    return field(
        default=default, metadata={"least": least, "above": above, "most": most, "limits": " and ".join(limits)}
    )


def choice(default: Any, options: Sequence[str]) -> Any:
    """One of `options`, or for a list any of them."""
    return field(default=default, metadata={"options": tuple(options), "limits": f"one of {', '.join(options)}"})


class Section:
    """Checks each field of a subclass against its annotation and its range."""

    __slots__ = ()

    def __post_init__(self) -> None:
        hints, section = get_type_hints(type(self)), type(self).__name__.removesuffix("Section").lower()
        for item in fields(self):  # type: ignore[arg-type]
            value, hint = getattr(self, item.name), hints[item.name]
            if not _fits(value, hint, item.metadata):
                raise ValueError(
                    f"{section}.{item.name} = {_toml_value(value)}: accepted is {_accepted(hint, item.metadata)}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection(Section):
    path: str = ""  # a Hugging Face folder; "" = train a model of the sizes below from nothing
    device: str = "cpu"
    dtype: str = choice("float32", ("float32", "bfloat16"))
    hidden_size: int = setting(128, least=1)
    intermediate_size: int = setting(384, least=1)
    num_layers: int = setting(4, least=1)
    num_heads: int = setting(4, least=1)
    num_kv_heads: int = setting(2, least=1)
    head_dim: int = setting(0, least=0)  # 0 = hidden_size / num_heads
    vocab_size: int = setting(1024, least=1)
    max_position: int = setting(512, least=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GameSection(Section):
    name: str = choice("deal", ("deal",))
    objective: str = choice("cooperative", ("cooperative", "nash", "selfish"))
    walk_away: float = setting(0.0, least=0)  # selfish: what no deal is worth
    item_types: int = setting(3, least=2, most=5)
    total_value: int = setting(10, least=1)  # of all items, to each side


@dataclass(frozen=True, kw_only=True, slots=True)
class ImitationSection(Section):
    steps: int = setting(0, least=0)
    dialogues: int = setting(4000, least=1)  # size of the scripted corpus
    dialogues_per_step: int = setting(64, least=1)
    learning_rate: float = setting(1e-3, above=0)
    warmup_steps: int = setting(20, least=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection(Section):
    steps: int = setting(100, least=0)
    seed: int = setting(0, least=0)
    save_every: int = setting(50, least=1)
    keep_checkpoints: int = setting(2, least=1)
    tokens_per_microbatch: int = setting(16384, least=1)
    max_seconds: float = setting(0.0, least=0)  # 0 = no limit
    threads: int = setting(0, least=0)  # 0 = PyTorch's choice


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoSection(Section):
    group_size: int = setting(8, least=2)
    groups_per_step: int = setting(8, least=1)
    updates_per_rollout: int = setting(1, least=1)  # each on its share of the groups
    train_roles: str = choice("both", ("both", "first"))
    train_kinds: tuple[str, ...] = choice(("utterance", "final"), ("utterance", "final"))
    learning_rate: float = setting(3e-4, above=0)
    warmup_steps: int = setting(0, least=0)
    schedule: str = choice("constant", SCHEDULES)
    weight_decay: float = setting(0.0, least=0)
    betas: tuple[float, float] = setting((0.9, 0.95), least=0, most=0.99999)
    max_grad_norm: float = setting(1.0, least=0)  # 0 = no clipping
    loss: str = choice("dapo", VARIANTS)
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # 0 = off
    advantage: str = choice("std", KINDS)
    per_role: bool = True
    kl_coef: float = 0.0
    kl_estimator: str = choice("k3", KL_ESTIMATORS)
    entropy_coef: float = setting(0.0, least=0)
    tis_cap: float = 0.0  # 0 = off
    imitation_coef: float = setting(0.0, least=0)  # weight of the imitation batches that are mixed in

    @property
    def loss_config(self) -> LossConfig:
        try:
            return LossConfig(
                variant=self.loss,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                dual_clip=self.dual_clip,
                kl_coef=self.kl_coef,
                kl_estimator=self.kl_estimator,
                entropy_coef=self.entropy_coef,
                tis_cap=self.tis_cap,
            )
        except ValueError as error:
            raise ValueError(f"grpo.{error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class DialogueSection(Section):
    max_rounds: int = setting(7, least=1)  # a round: both speak once
    max_tokens_per_turn: int = setting(32, least=1)
    max_tokens_final: int = setting(16, least=1)
    context: str = choice("full", ("full",))
    temperature: float = setting(1.0, above=0)
    top_p: float = setting(1.0, above=0, most=1)

    @property
    def max_trained_tokens(self) -> int:
        """The most tokens that one role can have sampled in one dialogue."""
        return self.max_rounds * self.max_tokens_per_turn + self.max_tokens_final


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSection(Section):
    page_size: int = setting(16, least=16)
    cache_tokens: int = setting(65536, least=16)
    max_batch: int = setting(256, least=1)
    exact: bool = True  # rollout log-probs equal those of training bit for bit


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSection(Section):
    dialogues: int = setting(500, least=1)
    split: str = choice("heldout", ("train", "heldout"))
    temperature: float = setting(1.0, least=0)  # 0 = greedy


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run."""

    model: ModelSection = field(default_factory=ModelSection)
    game: GameSection = field(default_factory=GameSection)
    imitation: ImitationSection = field(default_factory=ImitationSection)
    train: TrainSection = field(default_factory=TrainSection)
    grpo: GrpoSection = field(default_factory=GrpoSection)
    dialogue: DialogueSection = field(default_factory=DialogueSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    eval: EvalSection = field(default_factory=EvalSection)

    def __post_init__(self) -> None:
        assert self.grpo.loss_config
        for key, accepted, ok in _cross_checks(self):
            if not ok:
                section, name = key.split(".")
                raise ValueError(
                    f"{key} = {_toml_value(getattr(getattr(self, section), name))}: accepted is {accepted}"
                )

    def to_toml(self) -> str:
        """The resolved settings; reading them gives an equal Config."""
        lines = []
        for table in fields(self):
            section = getattr(self, table.name)
            lines += [f"[{table.name}]"]
            lines += [f"{item.name} = {_toml_value(getattr(section, item.name))}" for item in fields(section)] + [""]
        return "\n".join(lines)


def load_config(recipe_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """Settings of a packaged recipe, or of the TOML file at a path, with overrides `section.key=value` on top."""
    source = _find(recipe_or_path)
    try:
        raw = tomllib.loads(source.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: not a TOML file: {error}") from None
    tables = _tables()
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot):
            raise ValueError(f"override {override!r}: accepted is section.key=value")
        table = raw.setdefault(section, {})
        if isinstance(table, dict):
            table[name] = _parse(text, get_type_hints(tables[section]).get(name) if section in tables else None)
    return from_tables(raw)


def from_tables(raw: Mapping[str, Any]) -> Config:
    """A Config from what a TOML file holds."""
    tables = _tables()
    sections = {}
    for name, values in raw.items():
        if name not in tables:
            raise ValueError(_unknown(f"section [{name}]", name, tables))
        if not isinstance(values, Mapping):
            raise ValueError(f"{name} = {values!r}: accepted is a section [{name}]")
        hints = get_type_hints(tables[name])
        for key in values:
            if key not in hints:
                raise ValueError(_unknown(f"key {name}.{key}", key, hints))
        sections[name] = tables[name](**{key: _convert(value, hints[key]) for key, value in values.items()})
    return Config(**sections)


def recipes() -> dict[str, Traversable]:
    """The packaged recipes by name."""
    folder = resources.files("duologue.grpo") / "recipes"
    return {item.name.removesuffix(".toml"): item for item in folder.iterdir() if item.name.endswith(".toml")}


def _find(recipe_or_path: str) -> Traversable:
    known = recipes()
    if recipe_or_path in known:
        return known[recipe_or_path]
    path = Path(recipe_or_path)
    if path.is_file():
        return path
    raise ValueError(_unknown(f"recipe {recipe_or_path!r}, and no such file", recipe_or_path, known))


def _tables() -> dict[str, Any]:
    return get_type_hints(Config)


def _unknown(what: str, name: str, accepted: Iterable[str]) -> str:
    names = sorted(accepted)
    close = difflib.get_close_matches(name, names, n=1)
    return f"unknown {what}{f'; did you mean {close[0]!r}?' if close else ''} (accepted: {', '.join(names)})"


def _cross_checks(c: Config) -> list[tuple[str, str, bool]]:
    """(key, what is accepted, whether it holds) for what involves more than one key or a special form."""
    model, dialogue, scratch = c.model, c.dialogue, c.model.path == ""
    words = 2 * dialogue.max_rounds * dialogue.max_tokens_per_turn + dialogue.max_tokens_final
    kinds = c.grpo.train_kinds
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    divides = model.head_dim > 0 or model.hidden_size % model.num_heads == 0
    full = "1.0: sampling from a truncated distribution biases the ratio of a loss over the full one"
    return [
        ("model.device", "cpu, cuda or cuda:N", re.fullmatch(r"cpu|cuda(:\d+)?", model.device) is not None),
        ("model.num_heads", f"a divisor of hidden_size ({model.hidden_size}), or a head_dim", not scratch or divides),
        ("model.num_heads", "one that gives an even head_dim", not scratch or head_dim % 2 == 0),
        (
            "model.num_kv_heads",
            f"a divisor of {model.num_heads}",
            not scratch or model.num_heads % model.num_kv_heads == 0,
        ),
        (
            "model.max_position",
            f"at least the {words} tokens of a talk by [dialogue]",
            not scratch or model.max_position >= words,
        ),
        ("game.walk_away", "0 unless objective = 'selfish'", c.game.walk_away == 0 or c.game.objective == "selfish"),
        ("game.walk_away", f"a number below total_value ({c.game.total_value})", c.game.walk_away < c.game.total_value),
        ("grpo.train_kinds", "a list of at least one kind, each once", 0 < len(set(kinds)) == len(kinds)),
        (
            "grpo.updates_per_rollout",
            f"a divisor of {c.grpo.groups_per_step}",
            c.grpo.groups_per_step % c.grpo.updates_per_rollout == 0,
        ),
        (
            "grpo.tis_cap",
            "0 while rollout.exact = true: the weight would be 1",
            c.grpo.tis_cap == 0 or not c.rollout.exact,
        ),
        ("dialogue.top_p", full, dialogue.top_p == 1),
        ("rollout.page_size", "a multiple of 16", c.rollout.page_size % 16 == 0),
        (
            "rollout.cache_tokens",
            f"at least a page ({c.rollout.page_size})",
            c.rollout.cache_tokens >= c.rollout.page_size,
        ),
        ("rollout.exact", "true on cpu, where it costs nothing", c.rollout.exact or model.device != "cpu"),
    ]


def _fits(value: Any, hint: Any, limits: Mapping[str, Any]) -> bool:
    if items := get_args(hint):
        return (
            isinstance(value, tuple)
            and (Ellipsis in items or len(value) == len(items))
            and all(_fits(item, items[0], limits) for item in value)
        )
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        return False
    if "options" in limits:
        return value in limits["options"]
    least, above, most = (limits.get(key) for key in ("least", "above", "most"))
    return (least is None or value >= least) and (above is None or value > above) and (most is None or value <= most)


def _accepted(hint: Any, limits: Mapping[str, Any]) -> str:
    items = get_args(hint)
    many = "" if not items else "a list, each of it " if Ellipsis in items else f"a list of {len(items)}, each of it "
    rule = limits.get("limits", "")
    return many + (rule if "options" in limits else f"{TYPE_NAMES[items[0] if items else hint]} {rule}".strip())


def _convert(value: Any, hint: Any) -> Any:
    """TOML's types to ours: lists to tuples, and an integer where a number is wanted."""
    if isinstance(value, list):
        return tuple(_convert(item, (get_args(hint) or (hint,))[0]) for item in value)
    return float(value) if hint is float and type(value) is int else value


def _parse(text: str, hint: Any) -> Any:
    """The value of an override: TOML, or else the bare text; where a string is wanted only quotes make it TOML."""
    text = text.strip()
    if hint is str and text[:1] not in ("'", '"'):
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, str):  # a JSON string is a TOML string, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
