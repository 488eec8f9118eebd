"""What holds for every game with scripts: its dialogues have the right form and nothing private leaks, and
its recipe runs.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from duologue.grpo.build import build_game
from duologue.grpo.cli import main
from duologue.grpo.config import RECIPES, load_config
from duologue.grpo.imitation import demonstration_rows
from duologue.grpo.run_dir import read_lines
from duologue.model.tokenizer import train_tokenizer
from duologue.rollout.games.catalogue import GAMES, SCRIPTS, corpus
from duologue.rollout.games.game import Game
from duologue.rollout.games.scripted import MAX_UTTERANCES, ScriptedDialogue
from duologue.rollout.games.selection import CLOSE
from tiny import TINY

every_game = pytest.mark.parametrize("name", SCRIPTS)


@cache
def game_of(name: str) -> Game:
    return build_game(load_config(name))


@cache
def scripts(name: str) -> list[ScriptedDialogue]:
    return corpus(game_of(name), 1000, 4)


@every_game
def test_a_game_is_known_by_its_name_and_has_a_recipe(name: str) -> None:
    assert game_of(name).name == name
    assert load_config(name).game.name == name
    assert (RECIPES / f"{name}.toml").is_file()
    for split in ("train", "heldout"):
        scenarios = [game_of(name).sample(random.Random(seed), split) for seed in range(40)]
        assert [game_of(name).sample(random.Random(seed), split) for seed in range(40)] == scenarios
        assert {s.split for s in scenarios} == {split}
        assert len({s.id for s in scenarios}) > 5
    with pytest.raises(ValueError, match="split = 'test': accepted is one of train, heldout"):
        game_of(name).sample(random.Random(0), "test")
    with pytest.raises(
        ValueError, match=r"game\.objective = 'greedy': accepted is one of 'cooperative', 'nash', 'selfish'"
    ):
        GAMES[name].Settings(objective="greedy")


@every_game
def test_the_form_of_a_scripted_dialogue(name: str) -> None:
    game = game_of(name)
    for dialogue in scripts(name):
        talk = [(side, text) for side, text, kind in dialogue.turns if kind == "utterance"]
        finals = {side: text for side, text, kind in dialogue.turns if kind == "final"}
        assert [kind for _, _, kind in dialogue.turns] == ["utterance"] * len(talk) + ["final"] * len(finals)
        assert [side for side, _ in talk] == [(dialogue.first_speaker + n) % 2 for n in range(len(talk))]
        assert 2 <= len(talk) <= MAX_UTTERANCES
        assert len(finals) == 2 * game.closes(talk[-1][1])
        assert not any(CLOSE in text for _, text in talk[:-1])
        assert game.judge(dialogue.scenario, (finals[0], finals[1]) if finals else None) == dialogue.outcome
        for text in (text for _, text, _ in dialogue.turns):
            assert text == text.lower() == " ".join(text.split())
    assert len({word for d in scripts(name) for _, text, _ in d.turns for word in text.split()}) < 200
    openings = Counter(dialogue.turns[0][1] for dialogue in scripts(name))
    assert max(openings.values()) < 0.08 * len(scripts(name))


@every_game
def test_a_corpus_follows_from_its_seed_and_from_training_contexts(name: str) -> None:
    assert [d.turns for d in corpus(game_of(name), 50, 4)] == [d.turns for d in scripts(name)[:50]]
    assert [d.turns for d in corpus(game_of(name), 50, 5)] != [d.turns for d in scripts(name)[:50]]
    assert {d.scenario.split for d in scripts(name)} == {"train"}
    assert abs(sum(d.first_speaker for d in scripts(name)) - 500) < 100


@every_game
def test_private_text_reaches_its_own_side_only(name: str) -> None:
    """The same words with other private text: the other side's ids and what is trained of them do not
    change.
    """
    tokenizer = train_tokenizer([text for d in scripts(name)[:300] for _, text, _ in d.turns], 400)
    for dialogue in scripts(name)[:40]:
        texts = dialogue.scenario.private_text
        assert texts[0] not in texts[1] or texts[0] == texts[1]
        for side in (0, 1):
            changed = tuple(f"secret {text}" if who == side else text for who, text in enumerate(texts))
            altered = replace(dialogue, scenario=replace(dialogue.scenario, private_text=changed))
            before, after = (
                demonstration_rows(dialogue, tokenizer, 0),
                demonstration_rows(altered, tokenizer, 0),
            )
            assert before[1 - side].token_ids == after[1 - side].token_ids
            assert before[1 - side].loss_mask == after[1 - side].loss_mask
            assert before[side].token_ids != after[side].token_ids


@every_game
def test_a_run_of_the_recipe_from_the_command_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert main(["train", name, *TINY, "--run-dir", str(path)]) == 0
    summary = json.loads((path / "summary.json").read_text())
    measures = game_of(name).summarise([]).keys()
    assert summary["warm_start"].keys() == summary["trained"].keys() == measures
    rows = read_lines(path / "metrics.jsonl")
    assert [row["stage"] for row in rows] == ["imitation"] * 2 + ["selfplay"] * 2
    assert measures <= rows[-1].keys()
    assert {d["scenario"]["game"] for d in read_lines(path / "dialogues.jsonl")} == {name}
    assert f"{name}, {load_config(name).game.objective}" in (path / "report.html").read_text()
    checkpoint = str(path / "checkpoints" / "step_000004")
    assert main(["eval", checkpoint, "--recipe", name, *TINY, "--greedy"]) == 0


@pytest.mark.parametrize("setting", ["game.item_types=4", "game.total_value=12", "game.walk_away=3"])
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "deal"])
def test_settings_of_deal_are_refused_elsewhere(name: str, setting: str) -> None:
    with pytest.raises(ValueError, match=f"game.name = ['\"]{name}['\"]: accepted is deal"):
        load_config(name, [setting, "game.objective=selfish"])
