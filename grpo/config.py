"""The configuration of a run: frozen, read from TOML and `section.key=value` overrides; nothing writes back.

Each key has its limits in its section; the rules between keys stand here. Whatever is unknown, of another
type or out of range is a ValueError that names the key, the value and what is accepted.
"""

# ruff: noqa: RUF009 - the sections are frozen

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from duologue.grpo.collapse import WatchSection
from duologue.grpo.learning import Rule, learning_rules
from duologue.grpo.mix import ENDPOINT, FROZEN, POOL, SCRIPTED
from duologue.grpo.sections import (
    HELD,
    HTTP_ADDRESS,
    SERVED,
    EvalSection,
    GrpoSection,
    ImitationSection,
    JudgeSection,
    LoraSection,
    ModelSection,
    OpponentSection,
    RolloutSection,
    TrainSection,
)
from duologue.grpo.settings import Text, meant, override_in, says_all, to_toml, typed
from duologue.model.checkpoint import natural_dtype
from duologue.model.hub import local
from duologue.model.recompute import NORMS
from duologue.model.settings import check, keys
from duologue.rollout.games.catalogue import (
    ACCEPTED,
    ENGLISH,
    GAMES,
    SCRIPTS,
    characters,
    game_kind,
    kind_of,
    partners,
)
from duologue.rollout.games.deal import DealSettings
from duologue.rollout.games.dilemma import DilemmaSettings
from duologue.rollout.games.game import GameSettings
from duologue.rollout.games.text_game import TextGameSettings
from duologue.rollout.games.texts import read_text
from duologue.rollout.selfplay.rules import Rules

RECIPES = Path(__file__).parent / "recipes"
ENGLISH_LENGTHS = {"max_tokens_per_turn": 128, "max_tokens_final": 32}  # where nothing is said of them
PAYOFFS = ("agreement", "policy", "opponent", "policy_points", "opponent_points", "score")  # of a partner
# On a GPU a page is a tile of attention, and more prefill tokens fill it. The pool stays, as graphs know its
# address. Norms made again cost 2 % of an update by bench/gpu_model.py and save a quarter of what it keeps; a
# CPU's memory is seldom short.
ON_CUDA: dict[str, dict[str, Any]] = {
    "rollout": {"page_size": 64, "cache_tokens": 131_072, "max_step_tokens": 8_192},
    "train": {
        "recompute": NORMS,
        "gradient_accumulation_fusion": True,
        "attention_backward": "library",
        "tokens_per_microbatch": 0,
    },
}
RUN_FILE = "config.toml"  # of a run directory: its configuration


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's settings by section; `game` holds those of the game that is named."""

    model: ModelSection = ModelSection()
    game: GameSettings = DealSettings(name="deal")
    imitation: ImitationSection = ImitationSection()
    train: TrainSection = TrainSection()
    grpo: GrpoSection = GrpoSection()
    lora: LoraSection = LoraSection()
    dialogue: Rules = Rules()
    judge: JudgeSection = JudgeSection()
    opponent: OpponentSection = OpponentSection()
    rollout: RolloutSection = RolloutSection()
    eval: EvalSection = EvalSection()
    watch: WatchSection = WatchSection()

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            check(section.name, getattr(self, section.name))
        for key, accepted, holds in rules(self):
            if not holds:
                raise ValueError(f"{key} = {to_toml(self.value(key))}: accepted is {accepted}")

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
            lines += [f"{f.name} = {to_toml(getattr(values, f.name))}" for f in keys(values)]
            lines.append("")
        return "\n".join(lines)


# ---- rules between keys ------------------------------------------------------------------------------------


def rules(config: Config) -> Iterator[Rule]:
    """All of them, whether they hold or not."""
    subjects = (
        _model_rules,
        _dialogue_rules,
        _judge_rules,
        _mix_rules,
        _opponent_rules,
        _learning_rules,
        _partner_rules,
        _best_rules,
    )
    for subject in subjects:
        yield from subject(config)


def _model_rules(c: Config) -> Iterator[Rule]:
    m, lora = c.model, c.lora
    scratch = not m.path  # otherwise the sizes are the checkpoint's
    multiple = f"a multiple of num_kv_heads ({m.num_kv_heads})"
    yield "model.num_heads", multiple, not scratch or m.num_heads % m.num_kv_heads == 0
    even = f"an even number, or 0 where hidden_size / num_heads ({m.hidden_size} / {m.num_heads}) is one"
    rotary_pairs = (m.head_dim or m.hidden_size / m.num_heads) % 2 == 0
    yield "model.head_dim", even, not scratch or rotary_pairs
    frozen = "0 without model.path, the frozen weights that an adapter needs"
    yield "lora.rank", frozen, not (lora.rank and scratch)
    yield "lora.targets", "at least one linear", bool(lora.targets)
    trained = "'' with lora.rank = 0, where all weights are trained"
    yield "lora.quantize", trained, not lora.quantize or lora.rank > 0
    yield "rollout.page_size", "a multiple of 16", c.rollout.page_size % 16 == 0
    exact = "true on cpu, where the kernels are always exact"
    on_gpu = m.device != "cpu"
    yield "train.attention_backward", "'own' on cpu", on_gpu or c.train.attention_backward == "own"
    yield "train.tokens_per_microbatch", "1 or more on cpu", on_gpu or c.train.tokens_per_microbatch > 0
    yield "rollout.exact", exact, c.rollout.exact or on_gpu


def _dialogue_rules(c: Config) -> Iterator[Rule]:
    d, text_game = c.dialogue, isinstance(c.game, TextGameSettings)
    scripts = "0 with dilemmas, for which there are no scripts"
    for key in ("imitation.steps", "grpo.imitation_coef"):
        yield key, scripts, c.game.name in SCRIPTS or text_game or not c.value(key)
    known = partners(c.game.name)
    some = f"some of {', '.join(known)}" if known else "[] with dilemmas, for which there are no scripts"
    yield "imitation.characters", some, set(c.imitation.characters) <= set(known)
    warm = "above 0: greedy dialogues are all alike and teach nothing"
    yield "dialogue.temperature", warm, d.temperature > 0
    dilemma = isinstance(c.game, DilemmaSettings)
    yield "dialogue.context", "'full' with a game that has rules", dilemma or d.context == "full"
    one = "dialogue.temperature, or -1, where grpo.train_kinds has 'final': one temperature is trained"
    same = d.final_temperature in (-1, d.temperature)
    yield "dialogue.final_temperature", one, same or "final" not in c.grpo.train_kinds
    default = Rules()
    for key in ("first_speaker", "max_tokens_final", "final_temperature", "final_top_p"):
        unused = "its default with a game of your own, which says who moves and has no final statements"
        yield f"dialogue.{key}", unused, not text_game or getattr(d, key) == getattr(default, key)
    if c.game.name == "dilemma_alone":
        yield "grpo.train_roles", "'first' where one answers alone", c.grpo.train_roles == "first"
        yield "grpo.train_kinds", "['final'] where one answers alone", c.grpo.train_kinds == ("final",)
        yield "opponent.kind", "'self' where one answers alone", c.opponent.kind == "self"


def _judge_rules(c: Config) -> Iterator[Rule]:
    judge, dilemma = c.judge, isinstance(c.game, DilemmaSettings)
    backend = "'rules' with a game that has them, otherwise another"
    yield "judge.backend", backend, (judge.backend == "rules") != dilemma
    for key in ("judge.prompts", "judge.ledger", "eval.questions", "eval.judge_url", "eval.judge_model"):
        yield key, "'' with a game that has rules", dilemma or not c.value(key)
    default = JudgeSection()
    served = judge.backend == "endpoint" or bool(c.eval.judge_url or c.eval.judge_model)
    here = judge.backend in ("model", "policy")
    for names, used, whose in ((SERVED, served, "a server"), (HELD, here, "'model' or 'policy'")):
        accepted = f"its default where no judge is {whose}"
        for key in names:
            yield f"judge.{key}", accepted, used or getattr(judge, key) == getattr(default, key)
    server = "'' without judge.backend = 'endpoint'"
    yield "judge.url", server, not judge.url or judge.backend == "endpoint"
    key_env = "the one place for a credential: judge.url takes none, and no query"
    yield "judge.key_env", key_env, not set("@?#") & set(judge.url)


def _mix_rules(c: Config) -> Iterator[Rule]:
    o = c.opponent
    yield "opponent.mix", "a table of shares with opponent.kind = 'mix'", o.kind != "mix" or bool(o.mix)
    where = "opponent.mix" if o.kind == "mix" else "opponent.kind"
    scripted = [name.partition(":")[2] for name in o.parts if name.startswith(SCRIPTED)]
    nobody = "nobody scripted where the game has no characters"
    yield where, nobody, not scripted or bool(characters(c.game.name))
    known = partners(c.game.name)
    somebody = f"scripted:NAME with NAME one of {', '.join(known)}"
    yield where, somebody, all(name in ("", *known) for name in scripted)


def _opponent_rules(c: Config) -> Iterator[Rule]:
    o, default = c.opponent, OpponentSection()
    met = o.parts
    server = ("url", "model", "key_env", "concurrency", "timeout_s", "deadline_s")
    for kind, names in ((POOL, ("pool_every", "pool_size", "pool_draw")), (ENDPOINT, server)):
        accepted = f"its default where opponent.kind is not '{kind}' and opponent.mix has none"
        for key in names:
            unused = getattr(o, key) == getattr(default, key)
            yield f"opponent.{key}", accepted, kind in met or unused
    folder = "a checkpoint's folder with 'frozen' in opponent.mix"
    yield "opponent.path", folder, FROZEN not in met or bool(o.path)
    yield "opponent.path", "'' where nobody is 'frozen'", FROZEN in met or not o.path
    least = o.sets(c.lora.rank > 0)
    yield "opponent.held", f"0, or at least {least}, one set for each that needs one", not 0 < o.held < least
    yield "opponent.held", "0 where no other weights are held", least > 0 or not o.held
    url = f"{HTTP_ADDRESS}, and no credential or query (opponent.key_env names one)"
    plain = re.fullmatch(r"https?://[^/@?#][^@?#]*", o.url) is not None
    yield "opponent.url", url, ENDPOINT not in met or plain


def _learning_rules(c: Config) -> Iterator[Rule]:
    before_end = isinstance(c.game, TextGameSettings) or c.game.name == "dilemma"
    yield from learning_rules(c.grpo, exact=c.rollout.exact, scores_before_end=before_end)


def _partner_rules(c: Config) -> Iterator[Rule]:
    e, default = c.eval, EvalSection()
    if isinstance(c.game, DilemmaSettings):
        yield "eval.partners", "[] or its default with dilemmas", e.partners in ((), default.partners)
        same = e.partner_dialogues == default.partner_dialogues
        yield "eval.partner_dialogues", "its default with dilemmas", same
        return
    known = [f"scripted:{name}" for name in partners(c.game.name)]
    named = {name for name in e.partners if ":" in name}
    accepted = f"a list of 'start', 'scripted' and {', '.join(map(repr, known))}"
    yield "eval.partners", accepted, named <= {*known}


def _best_rules(c: Config) -> Iterator[Rule]:
    off = "its default without eval.every, the evaluations that it counts"
    for key, default in (
        ("train.best_by", TrainSection().best_by),
        ("train.patience", 0),
        ("eval.every_dialogues", EvalSection().every_dialogues),
    ):
        yield key, off, bool(c.eval.every) or c.value(key) == default
    whom, _, name = c.train.best_by.lstrip("-").rpartition(":")
    both = "rules that are not in watch.stop as well"
    yield "watch.rollback", both, not {*c.watch.stop} & {*c.watch.rollback}
    alone, text_game = c.game.name == "dilemma_alone", isinstance(c.game, TextGameSettings)
    names = PAYOFFS if whom else ("reward", *kind_of(c.game).measures)
    known = text_game and not whom  # such a game's own measures show at its first evaluation
    accepted = f"one of {', '.join(names)}, '-' before it for the least"
    yield "train.best_by", accepted, name in names or known
    yield "train.best_by", "a measure with itself where one answers alone", not (whom and alone)


# ---- reading -----------------------------------------------------------------------------------------------


def load_config(
    recipe_or_path: str, overrides: Sequence[str] = (), unsaid: dict[str, Any] | None = None
) -> Config:
    """The configuration of a recipe's name or a TOML file, with `section.key=value` overrides. `unsaid` are
    values of settings that neither says: those of a checkpoint that no setting names.

    ValueError names an unknown recipe, section, key or value, and what is accepted.
    """
    raw = _read(recipe_or_path)
    is_run = Path(recipe_or_path).name == RUN_FILE and says_all(raw)
    for override in overrides:
        key, equals, text = override.partition("=")
        section, _, name = (part.strip() for part in key.partition("."))
        if not equals or not name:
            raise ValueError(f"override {override!r}: accepted is section.key=value, e.g. grpo.group_size=8")
        table = raw.setdefault(section, {})
        if isinstance(table, dict):
            override_in(table, name, Text(text.strip()))
    if not is_run:
        _leave_to_checkpoint(raw, unsaid or {})
        _suit_cuda(raw)
    game, dialogue = raw.get("game", {}), raw.setdefault("dialogue", {})
    telling = game.get("telling", "") if isinstance(game, dict) else ""
    if typed("game.telling", telling, "") == "english" and isinstance(dialogue, dict):
        raw["dialogue"] = ENGLISH_LENGTHS | dialogue
    return from_dict(raw)


def _suit_cuda(raw: dict[str, Any]) -> None:
    """Of a run on a GPU: what is said of nothing but suits a CPU by default."""
    model = raw.get("model", {})
    if not isinstance(model, dict):
        return
    if not typed("model.device", model.get("device", "cpu"), "").startswith("cuda"):
        return
    for section, values in ON_CUDA.items():
        said = raw.setdefault(section, {})
        if isinstance(said, dict):
            raw[section] = values | said


def _leave_to_checkpoint(raw: dict[str, Any], unsaid: dict[str, Any]) -> None:
    """What nothing says follows from the checkpoint: games are told in English, the type is its own. A run's
    own file says it, but for one of an older version, which knew the plain telling alone.
    """
    game, model = raw.get("game", {}), raw.get("model", {})
    if not isinstance(game, dict) or not isinstance(model, dict):
        return
    if path := typed("model.path", model.get("path", ""), ""):
        unsaid = {"game.telling": "english"} | unsaid
        device = typed("model.device", model.get("device", "cpu"), "")
        named = "dtype" in model or "model.dtype" in unsaid
        if not named and (dtype := natural_dtype(local(path, weights=False), device)):
            unsaid["model.dtype"] = dtype
    if typed("game.name", game.get("name", "deal"), "") not in ENGLISH:
        unsaid = {key: value for key, value in unsaid.items() if key != "game.telling"}
    for name, value in unsaid.items():
        section, key = name.split(".")
        raw[section] = {key: value} | raw.get(section, {})


def _read(recipe_or_path: str) -> dict[str, Any]:
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
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def from_dict(raw: dict[str, Any]) -> Config:
    """Sections and keys to a Config; every one must be known and of its type."""
    kinds: dict[str, Any] = get_type_hints(Config)
    sections: dict[str, Any] = {}
    for name, values in raw.items():
        if name not in kinds:
            raise ValueError(f"unknown section [{name}]: {meant(name, list(kinds))}")
        if not isinstance(values, dict):
            raise ValueError(f"{name} = {values!r}: accepted is a section [{name}] of keys")
        sections[name] = _game(values) if name == "game" else _section(name, kinds[name], values)
    return Config(**sections)


def _section(name: str, kind: Any, values: dict[str, Any]) -> Any:
    defaults = _defaults(kind)
    for key in values:
        if key not in defaults:
            raise ValueError(f"unknown key {name}.{key}: {meant(key, list(defaults))}")
    return kind(**{key: typed(f"{name}.{key}", value, defaults[key]) for key, value in values.items()})


def _game(values: dict[str, Any]) -> GameSettings:
    """The settings of the game that is named. A key of another game is dropped where it says what that game
    does anyway: until games had settings of their own, every configuration held the keys of all.
    """
    name = typed("game.name", values.get("name", "deal"), "")
    kind = game_kind(name)
    if kind is None:
        raise ValueError(f"game.name = {name!r}: accepted is {ACCEPTED}")
    known = {key: default for owner in GAMES.values() for key, default in _defaults(owner.Settings).items()}
    others = {key: known[key] for key in known.keys() - _defaults(kind.Settings)}
    mine = {"name": name}
    for key, value in values.items():
        if key not in others:
            mine[key] = value
        elif typed(f"game.{key}", value, others[key]) != others[key]:
            owners = [game for game, owner in GAMES.items() if key in _defaults(owner.Settings)]
            accepted = f"{' or '.join(owners)} with {key} changed, which {name} has not"
            raise ValueError(f"game.name = {to_toml(name)}: accepted is {accepted}")
    settings: GameSettings = _section("game", kind.Settings, mine)
    return settings


def _defaults(kind: Any) -> dict[str, Any]:
    return {f.name: f.default for f in keys(kind)}
