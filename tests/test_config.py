"""grpo/config.py: what is read is what was written, and whatever is wrong is named with what is accepted."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from duologue.grpo.commands.config import described
from duologue.grpo.config import RECIPES, Config, from_dict, load_config
from duologue.grpo.loss import LossConfig
from duologue.model.settings import Shares, keys, limits
from duologue.rollout.games.catalogue import GAMES

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_says_what_it_means_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(str(path)) == config
    for section, values in tomllib.loads((RECIPES / f"{name}.toml").read_text()).items():
        for key, value in values.items():
            held = getattr(getattr(config, section), key)
            assert (list(held) if isinstance(held, tuple) else held) == value, f"{section}.{key}"


def test_the_recipe_of_the_demo_exists() -> None:
    assert "deal" in NAMES


def test_awkward_strings_and_numbers_survive_a_round_trip() -> None:
    path = 'a "quoted" \\ path\n\ttab \x7f \x01 é 🙂'
    config = from_dict({"model": {"path": path}, "grpo": {"learning_rate": 1e-9, "betas": [0, 0.999]}})
    assert config.model.path == path
    assert from_dict(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("grpo.group_size=16", 16),
        ("grpo.group_size = 1_6 ", 16),
        ("grpo.learning_rate=1e-5", 1e-5),
        ("grpo.learning_rate=1", 1.0),
        ("grpo.per_role=false", False),
        ("grpo.loss=gspo", "gspo"),
        ('grpo.loss="gspo"', "gspo"),
        ('grpo.train_kinds=["final"]', ("final",)),
        ("grpo.betas=[0, 0.9]", (0.0, 0.9)),
        ("model.path=runs/a b=c", "runs/a b=c"),
        ("model.path=123", "123"),
        ("model.path=true", "true"),
        ("model.path=", ""),
    ],
)
def test_overrides(override: str, value: object) -> None:
    section, key = override.partition("=")[0].strip().split(".")
    held = getattr(getattr(load_config("deal", [override]), section), key)
    assert held == value
    assert type(held) is type(value)


def test_the_last_override_wins() -> None:
    assert load_config("deal", ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "grpo.group_sise=8",
            r"unknown key grpo\.group_sise: did you mean 'group_size'\? accepted is one of group_size",
        ),
        (
            "gprpo.group_size=8",
            r"unknown section \[gprpo\]: did you mean 'grpo'\? accepted is one of model, game",
        ),
        ("train.zzzz=8", r"unknown key train\.zzzz: accepted is one of steps, seed"),
        ("steps=8", r"override 'steps=8': accepted is section\.key=value"),
        ("train.steps", r"override 'train\.steps': accepted is section\.key=value"),
        ("train.steps=ten", r"train\.steps = 'ten': accepted is an integer"),
        ("train.steps=1.5", r"train\.steps = 1\.5: accepted is an integer"),
        ("train.steps=true", r"train\.steps = True: accepted is an integer"),
        ("train.steps=-1", r"train\.steps = -1: accepted is 0 to any"),
        ("train.steps=1\nseed=2", r"train\.steps = '1\\nseed=2': accepted is an integer"),
        ("train.steps={a=1}", r"train\.steps = \{'a': 1\}: accepted is an integer"),
        ("grpo.group_size=1", r"grpo\.group_size = 1: accepted is 2 to any"),
        ("grpo.per_role=1", r"grpo\.per_role = 1: accepted is true or false"),
        ("grpo.learning_rate=0", r"grpo\.learning_rate = 0\.0: accepted is 1e-12 to 1"),
        ("grpo.learning_rate=nan", r"grpo\.learning_rate = nan: accepted is 1e-12 to 1"),
        ("grpo.kl_coef=inf", r"grpo\.kl_coef = inf: accepted is 0 to any"),
        ("grpo.loss=ppo", r"grpo\.loss = 'ppo': accepted is one of 'dapo', 'grpo'"),
        ("grpo.clip_low=2", r"grpo\.clip_low = 2\.0: accepted is 0 to 1"),
        ("grpo.dual_clip=1.1", r"grpo\.dual_clip = 1\.1: accepted is 0, or above 1 \+ clip_high = 1\.2"),
        ("grpo.betas=[0.9]", r"grpo\.betas = \[0\.9\]: accepted is a list of two numbers from 0 to below 1"),
        ("grpo.betas=[0.9, 1]", r"grpo\.betas = \[0\.9, 1\.0\]: accepted is a list of two numbers"),
        ('grpo.betas=[0.9, "a"]', r"grpo\.betas = 'a': accepted is a number"),
        ("grpo.train_kinds=final", r"grpo\.train_kinds = 'final': accepted is a list"),
        (
            'grpo.train_kinds=["finale"]',
            r"grpo\.train_kinds = 'finale': accepted is one of 'utterance', 'final'",
        ),
        (
            "grpo.train_kinds=[]",
            r"grpo\.train_kinds = \[\]: accepted is 'utterance', 'final' or both, each once",
        ),
        (
            'grpo.train_kinds=["final", "final"]',
            r"grpo\.train_kinds = .*: accepted is 'utterance', 'final' or both",
        ),
        ("grpo.tis_cap=2", r"grpo\.tis_cap = 2\.0: accepted is 0 while rollout\.exact = true"),
        ("model.device=tpu", r'model\.device = "tpu": accepted is cpu, cuda or cuda:N'),
        ("model.num_kv_heads=3", r"model\.num_heads = 4: accepted is a multiple of num_kv_heads \(3\)"),
        ("model.head_dim=31", r"model\.head_dim = 31: accepted is an even number"),
        (
            "grpo.advantage=running",
            r"grpo\.per_role = false: accepted is true with grpo\.advantage = 'running'",
        ),
        ("game.walk_away=20", r"game\.walk_away = 20\.0: accepted is 0 to the total value 10"),
        ("dialogue.top_p=0.0", r"dialogue\.top_p = 0\.0: accepted is above 0 and up to 1"),
        ("dialogue.temperature=0", r"dialogue\.temperature = 0\.0: accepted is above 0"),
        ("rollout.page_size=24", r"rollout\.page_size = 24: accepted is a multiple of 16"),
        ("rollout.exact=false", r"rollout\.exact = false: accepted is true on cpu"),
    ],
)
def test_what_is_wrong_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("deal", [override] if "running" not in override else [override, "grpo.per_role=false"])


def test_what_depends_on_other_keys_is_accepted_with_them() -> None:
    load_config("deal", ["model.device=cuda:1", "rollout.exact=false", "grpo.tis_cap=2"])
    load_config("deal", ["game.objective=selfish", "game.walk_away=2"])
    load_config("deal", ["game.walk_away=2"])  # a part of its reward is a side's own
    refused = r"game\.walk_away = 2\.0: accepted is 0, or with game\.objective = 'selfish'"
    with pytest.raises(ValueError, match=refused):
        load_config("deal", ["game.objective=cooperative", "game.walk_away=2"])
    load_config("deal", ["grpo.dual_clip=1.5", "grpo.clip_high=0.28"])
    load_config("deal", ["model.path=somewhere", "model.num_heads=3"])  # the sizes are the checkpoint's then
    with pytest.raises(
        ValueError, match=r"model\.head_dim = 0: .*where hidden_size / num_heads \(128 / 3\) is one"
    ):
        load_config("deal", ["model.num_heads=3", "model.num_kv_heads=1", "model.head_dim=0"])


def test_unknown_recipe_and_broken_files_are_named(tmp_path: Path) -> None:
    known = (
        r"unknown recipe 'dael': did you mean 'deal'\? accepted is one of "
        r"collective-agency, deal, deal-english, dynamic-alignment"
    )
    with pytest.raises(ValueError, match=known):
        load_config("dael")
    with pytest.raises(ValueError, match=r"there is no file nowhere\.toml"):
        load_config("nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\nsteps = 1")
    with pytest.raises(ValueError, match=r"broken\.toml is not valid TOML: .*line 1"):
        load_config(str(broken))
    broken.write_text("train = 1")
    with pytest.raises(ValueError, match=r"train = 1: accepted is a section \[train\] of keys"):
        load_config(str(broken), ["train.steps=5"])


def test_nothing_can_be_written_back() -> None:
    config = load_config("deal")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train = Config().train


def test_every_setting_of_the_loss_is_a_key() -> None:
    keys = {field.name for field in dataclasses.fields(Config().grpo)}
    assert {field.name for field in dataclasses.fields(LossConfig)} - {"variant"} <= keys


def test_the_loss_of_a_run_is_what_its_keys_say() -> None:
    config = load_config(
        "deal", ["grpo.loss=gspo", "grpo.clip_high=0.28", "grpo.kl_coef=0.1", "grpo.kl_estimator=k2"]
    )
    expected = LossConfig(variant="gspo", clip_high=0.28, kl_coef=0.1, kl_estimator="k2")
    assert config.grpo.loss_config == expected
    assert Config().grpo.loss_config == LossConfig()


# ---- a game's own keys -------------------------------------------------------------------------------------


def test_a_configuration_holds_the_keys_of_its_game_only() -> None:
    for name in ("deal", "price", "collective-agency"):
        config = load_config(name)
        written = tomllib.loads(config.to_toml())["game"]
        assert written.keys() == {field.name for field in keys(GAMES[config.game.name].Settings)}
        assert written["name"] == config.game.name


def test_a_file_with_the_keys_of_all_games_is_read_while_they_say_nothing() -> None:
    """As every config.toml was written once."""
    everything = {"walk_away": 0.0, "item_types": 3, "total_value": 10, "objective": "cooperative"}
    everything |= {"dilemmas": "", "personas": "", "tasks": "", "prompts": ""}
    assert from_dict({"game": {"name": "price", **everything}}) == from_dict({"game": {"name": "price"}})
    judged = {"judge": {"backend": "policy"}}
    assert from_dict({"game": {"name": "dilemma", **everything}, **judged}).game.name == "dilemma"
    for name, key, value, owners in (
        ("price", "item_types", 4, "deal"),
        ("dilemma", "objective", "nash", "deal or price or priorities"),
        ("deal", "dilemmas", "mine.jsonl", "dilemma or dilemma_alone"),
    ):
        with pytest.raises(
            ValueError, match=rf'game.name = "{name}": accepted is {owners} with {key} changed'
        ):
            from_dict({"game": {"name": name, **everything, key: value}})
    with pytest.raises(ValueError, match=r"game\.item_types = 'many': accepted is an integer"):
        from_dict({"game": {"name": "price", "item_types": "many"}})
    with pytest.raises(ValueError, match=r"unknown key game\.item_typs: did you mean 'item_types'\?"):
        from_dict({"game": {"name": "deal", "item_typs": 3}})


# ---- what `duologue config` prints -------------------------------------------------------------------------

EVERY_KEY = [
    (section.name, field)
    for game in GAMES.values()
    for section in dataclasses.fields(Config)
    for field in keys(game.Settings if section.name == "game" else getattr(Config(), section.name))
    if section.name == "game" or game.name == "deal"
]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_is_the_configuration(name: str) -> None:
    config = load_config(name, ['model.path=C:\\"x"', "train.seed=7"])
    assert from_dict(tomllib.loads(described(config))) == config
    for section in dataclasses.fields(config):
        alone = tomllib.loads(described(config, section.name))
        assert alone == {section.name: tomllib.loads(config.to_toml())[section.name]}
    assert all(len(line) <= 110 for line in described(config).splitlines())
    with pytest.raises(
        ValueError, match=r"unknown section \[grop\]: did you mean 'grpo'\? accepted is one of model"
    ):
        described(config, "grop")


@pytest.mark.parametrize(("section", "field"), EVERY_KEY)
def test_every_key_says_what_it_means(section: str, field: dataclasses.Field[object]) -> None:
    assert len(limits(field).meaning.split()) >= 2


@pytest.mark.parametrize(("section", "field"), [(s, f) for s, f in EVERY_KEY if limits(f).accepted])
def test_a_value_outside_is_refused_with_what_is_printed(
    section: str, field: dataclasses.Field[object]
) -> None:
    accepted = limits(field)
    outside: list[object] = []
    if accepted.one_of or accepted.form:
        outside = [["no such thing"]] if isinstance(field.default, tuple) else ["no such thing"]
        outside = [{"no such thing": 1.0}] if isinstance(field.default, Shares) else outside
    kind = type(field.default)
    outside += [kind(bound) - kind(1) for bound in (accepted.least,) if bound is not None]
    outside += [kind(bound) for bound in (accepted.above,) if bound is not None]
    outside += [kind(bound) + kind(1) for bound in (accepted.most,) if bound is not None]
    outside += [float("inf"), float("nan")] if kind is float else []
    assert outside
    recipe = load_config("deal")
    if section == "game" and field.name not in {f.name for f in keys(recipe.game)}:
        recipe = load_config("collective-agency")
    printed = " ".join(line.partition("#")[2].strip() for line in described(recipe, section).splitlines())
    assert f"(accepted: {accepted.accepted})" in printed
    for value in outside:
        raw = tomllib.loads(recipe.to_toml())
        raw[section][field.name] = value
        with pytest.raises(ValueError) as error:
            from_dict(raw)
        assert str(error.value).startswith(f"{section}.{field.name} = ")
        assert str(error.value).endswith(f": accepted is {accepted.accepted}")
