"""grpo/config.py: what is read is what was written, and whatever is wrong is named with what is accepted."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from duologue.grpo.config import Config, from_tables, load_config, recipes
from duologue.grpo.loss import LossConfig


def test_every_recipe_loads_and_survives_a_round_trip(tmp_path: Path) -> None:
    assert "deal" in recipes()
    for name in recipes():
        config = load_config(name)
        path = tmp_path / f"{name}.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        assert load_config(str(path)) == config


def test_the_recipe_says_what_the_config_holds() -> None:
    raw = tomllib.loads(recipes()["deal"].read_text())
    config = load_config("deal")
    for section, values in raw.items():
        for key, value in values.items():
            held = getattr(getattr(config, section), key)
            assert (list(held) if isinstance(held, tuple) else held) == value, f"{section}.{key}"


def test_awkward_strings_and_numbers_survive_a_round_trip() -> None:
    path = 'a "quoted" \\ path\n\ttab \x7f \x01 é 🙂'
    config = from_tables({"model": {"path": path}, "grpo": {"learning_rate": 1e-9, "betas": [0, 0.999]}})
    assert config.model.path == path
    assert from_tables(tomllib.loads(config.to_toml())) == config


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
        ("grpo.group_sise=8", r"unknown key grpo\.group_sise; did you mean 'group_size'\? \(accepted: advantage, "),
        ("gprpo.group_size=8", r"unknown section \[gprpo\]; did you mean 'grpo'\? \(accepted: dialogue, "),
        ("train.zzzz=8", r"unknown key train\.zzzz \(accepted: keep_checkpoints, "),
        ("steps=8", r"override 'steps=8': accepted is section\.key=value"),
        ("train.steps", r"override 'train\.steps': accepted is section\.key=value"),
        ("train.steps=ten", r'train\.steps = "ten": accepted is an integer >= 0'),
        ("train.steps=1.5", r"train\.steps = 1\.5: accepted is an integer >= 0"),
        ("train.steps=true", r"train\.steps = true: accepted is an integer >= 0"),
        ("train.steps=1\nseed=2", r'train\.steps = "1\\nseed=2": accepted is an integer'),
        ("train.steps={a=1}", r"train\.steps = {'a': 1}: accepted is an integer"),
        ("grpo.group_size=1", r"grpo\.group_size = 1: accepted is an integer >= 2"),
        ("grpo.per_role=1", r"grpo\.per_role = 1: accepted is true or false"),
        ("grpo.learning_rate=0", r"grpo\.learning_rate = 0\.0: accepted is a number > 0"),
        ("grpo.learning_rate=inf", r"grpo\.learning_rate = inf: accepted is a number > 0"),
        ("grpo.loss=ppo", r'grpo\.loss = "ppo": accepted is one of grpo, dr_grpo, dapo, bnpo, gspo, cispo'),
        ("grpo.clip_low=2", r"grpo\.clip_low = 2\.0: accepted is a number in \(0, 1\]"),
        ("grpo.dual_clip=1.1", r"grpo\.dual_clip = 1\.1: accepted is 0 \(off\), or a number > 1 \+ clip_high"),
        ("grpo.betas=[0.9]", r"grpo\.betas = \[0\.9\]: accepted is a list of 2, each of it a number"),
        (
            "grpo.train_kinds=final",
            r'grpo\.train_kinds = "final": accepted is a list, each of it one of utterance, fin',
        ),
        ("grpo.train_kinds=[]", r"grpo\.train_kinds = \[\]: accepted is a list of at least one kind, each once"),
        ('grpo.train_kinds=["final", "final"]', r"grpo\.train_kinds = .*: accepted is a list of at least one kind"),
        ("grpo.updates_per_rollout=3", r"grpo\.updates_per_rollout = 3: accepted is a divisor of 16"),
        ("grpo.tis_cap=2", r"grpo\.tis_cap = 2\.0: accepted is 0 while rollout\.exact = true"),
        ("model.device=tpu", r'model\.device = "tpu": accepted is cpu, cuda or cuda:N'),
        ("model.num_heads=3", r"model\.num_heads = 3: accepted is a divisor of hidden_size \(128\)"),
        ("model.num_kv_heads=3", r"model\.num_kv_heads = 3: accepted is a divisor of 4"),
        ("model.hidden_size=12", r"model\.num_heads = 4: accepted is one that gives an even head_dim"),
        ("model.max_position=64", r"model\.max_position = 64: accepted is at least the \d+ tokens of a talk"),
        ("game.walk_away=2", r"game\.walk_away = 2\.0: accepted is 0 unless objective = 'selfish'"),
        (
            "dialogue.top_p=0.9",
            r"dialogue\.top_p = 0\.9: accepted is 1\.0: sampling from a truncated distribution biases",
        ),
        ("dialogue.temperature=0", r"dialogue\.temperature = 0\.0: accepted is a number > 0"),
        ("rollout.page_size=24", r"rollout\.page_size = 24: accepted is a multiple of 16"),
        ("rollout.exact=false", r"rollout\.exact = false: accepted is true on cpu"),
    ],
)
def test_what_is_wrong_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("deal", [override])


def test_what_depends_on_other_keys_is_accepted_with_them() -> None:
    load_config("deal", ["model.device=cuda:1", "rollout.exact=false", "grpo.tis_cap=2"])
    load_config("deal", ["game.objective=selfish", "game.walk_away=2"])
    load_config("deal", ["model.num_heads=3", "model.num_kv_heads=1", "model.head_dim=32"])
    load_config("deal", ["model.path=somewhere", "model.max_position=64"])  # the sizes are the checkpoint's then


def test_unknown_recipe_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown recipe 'dael', and no such file; did you mean 'deal'\? \(accepted: "
    ):
        load_config("dael")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\nsteps = 1")
    with pytest.raises(ValueError, match=r"broken\.toml: not a TOML file: .*line 1"):
        load_config(str(broken))
    broken.write_text("steps = 1")
    with pytest.raises(ValueError, match=r"unknown section \[steps\]"):
        load_config(str(broken))
    broken.write_text("train = 1")
    with pytest.raises(ValueError, match=r"train = 1: accepted is a section \[train\]"):
        load_config(str(broken), ["train.steps=5"])


def test_nothing_can_be_written_back() -> None:
    config = load_config("deal")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train = Config().train


def test_loss_config_carries_every_setting_of_the_loss() -> None:
    settings = {
        "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0, "kl_coef": 0.04,
        "kl_estimator": "k2", "entropy_coef": 0.01, "tis_cap": 1.5,
    }  # fmt: skip
    config = from_tables(
        {"grpo": {"loss": "gspo", **settings}, "model": {"device": "cuda"}, "rollout": {"exact": False}}
    )
    assert config.grpo.loss_config == LossConfig(variant="gspo", **settings)
    assert {field.name for field in dataclasses.fields(LossConfig)} == {"variant", *settings}


def test_the_most_that_one_role_can_say() -> None:
    config = load_config(
        "deal", ["dialogue.max_rounds=3", "dialogue.max_tokens_per_turn=10", "dialogue.max_tokens_final=4"]
    )
    assert config.dialogue.max_trained_tokens == 34
