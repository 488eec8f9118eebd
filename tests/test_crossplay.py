"""Players with each other: the same dialogues whoever holds the weights, tables that swap with the names,
intervals by brute force and by the delta method, and the commands.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from duologue.grpo import crossplay
from duologue.grpo.build import build_arena, build_engine
from duologue.grpo.cli import main
from duologue.grpo.commands.players import duel_columns
from duologue.grpo.config import Config, load_config
from duologue.grpo.crossplay import CrossPlay, Player, interval, means, resampled
from duologue.grpo.evaluate import evaluate
from duologue.grpo.partners import in_full, load_player, start_of
from duologue.grpo.policy import load_policy
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.games.catalogue import GAMES, SCRIPTS, characters
from duologue.rollout.games.deal import DealGame
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.selfplay.dialogue import Dialogue
from duologue.rollout.selfplay.foreign import ForeignSpeaker
from duologue.rollout.selfplay.partners import ScriptedSpeaker
from duologue.rollout.selfplay.speakers import Opponent, Speak
from judge_server import serving
from tiny import RUN, run_whole

SHORT = ["imitation.steps=3", "train.steps=1", "train.kl_every=0", "dialogue.max_tokens_per_turn=40"]
SHORT += ["model.max_position=900", "rollout.cache_tokens=32768", "dialogue.max_tokens_final=12"]
GAMES_WITH_RULES = [name for name, game in GAMES.items() if game.compared]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of other sizes and another seed, and so with other tokenizers."""
    folder = tmp_path_factory.mktemp("runs")
    partners = ["eval.partners=['start', 'scripted:honest']", "eval.partner_dialogues=2"]
    run_whole(folder / "a", *SHORT, *partners)
    run_whole(folder / "b", *SHORT, "train.seed=1", "model.hidden_size=64", "eval.dialogues=1")
    return [folder / "a", folder / "b"]


def config(*more: str) -> Config:
    return load_config("deal", [*RUN, *SHORT, *more])


@pytest.fixture
def players(runs: list[Path]) -> dict[str, Player]:
    """The first run's policy, twice, each on an engine of its own, and its start; the other run's policy; two
    characters.
    """
    names = {"a": str(runs[0]), "twin": str(runs[0]), "start": "start", "b": str(runs[1])}
    names |= {name: f"scripted:{name}" for name in ("honest", "conceder")}
    first = start_of(runs[0])
    return {key: load_player(name, config(), DealGame(), first) for key, name in names.items()}


def cross(players: Sequence[Player], n: int = 5, *more: str) -> CrossPlay:
    return CrossPlay(config(*more), DealGame(), players, n)


def words(dialogues: Sequence[Dialogue]) -> list[Any]:
    """All that was said, with ids and log-probs to the bit."""
    return [[(t.role, t.kind, t.token_ids, t.logprobs) for t in d.turns] for d in dialogues]


@pytest.fixture
def held_dialogues(monkeypatch: pytest.MonkeyPatch) -> list[list[Dialogue]]:
    """What each call of `hold` gave."""
    found: list[list[Dialogue]] = []
    hold = crossplay.hold

    def kept(*args: Any) -> list[Dialogue]:
        found.append(hold(*args))
        return found[-1]

    monkeypatch.setattr(crossplay, "hold", kept)
    return found


# ---- pairings ----------------------------------------------------------------------------------------------


def test_the_same_weights_elsewhere_hold_the_same_dialogues(
    players: dict[str, Player], held_dialogues: list[list[Dialogue]], runs: list[Path]
) -> None:
    """To the bit: with itself, with a twin on another engine in either seat, and as `evaluate` does."""
    a, twin = players["a"], players["twin"]
    held = cross([a, twin])
    pairings = [held.pairing(*pair) for pair in ((a, a), (a, twin), (twin, a), (twin, twin))]
    itself, *others = [
        words(held_dialogues[i]) + words(held_dialogues[i + 1]) for i in range(0, len(held_dialogues), 2)
    ]
    assert all(other == itself for other in others)
    assert pairings[1].first is a
    for pairing in pairings[1:]:
        for side in (0, 1):
            for key, values in pairings[0].seen[side].items():
                np.testing.assert_array_equal(pairing.seen[side][key], values)
    c = config("eval.dialogues=5")
    model, tokenizer = load_policy(runs[0] / "checkpoints" / "step_000004", c)
    _, alone = evaluate(build_engine(c, model), tokenizer, DealGame(), c, None)
    assert words(alone) == words(held_dialogues[0])


@pytest.mark.parametrize("rule", ["random", "alternate", "first"])
def test_both_sides_open_unless_the_rules_name_one(
    players: dict[str, Player], held_dialogues: list[list[Dialogue]], rule: str
) -> None:
    held = cross([players["a"], players["honest"]], 6, f"dialogue.first_speaker={rule}")
    pairing = held.pairing(players["a"], players["honest"])
    openers = [[d.first_speaker for d in dialogues] for dialogues in held_dialogues]
    assert all(d.turns[0].role == d.first_speaker for dialogues in held_dialogues for d in dialogues)
    if rule == "first":
        assert openers == [[0] * 6]
    else:
        assert openers[1] == [1 - first for first in openers[0]]
        assert len(set(openers[0])) == 2
    assert pairing.dialogues == 6 * len(openers)
    assert (
        [d.scenario for d in held_dialogues[0]] == [d.scenario for d in held_dialogues[-1]] == held.scenarios
    )


def test_swapped_names_swap_the_table(players: dict[str, Player]) -> None:
    """What one sees from its seat the other sees from the other one; the order of the players is nothing."""
    honest, conceder, a = players["honest"], players["conceder"], players["a"]
    held, swapped = cross([honest, conceder, a], 8), cross([a, conceder, honest], 8)
    one, other = duel_columns(held, honest, conceder), duel_columns(swapped, conceder, honest)
    assert one["A with A"] == other["B with B"]
    assert one["B with B"] == other["A with A"]
    assert (one["A with A"]["agreement"]["value"] or 0) > 0
    seat, mirrored = one["A as side 1 with B"], other["A as side 2 with B"]
    assert seat["own"] == mirrored["partner"]
    assert seat["partner"] == mirrored["own"]
    assert seat["own"] != seat["partner"]
    for key in ("agreement", "pareto", "joint_ratio", "nash_ratio"):
        assert seat[key] == mirrored[key]


def test_each_pairing_is_held_once(players: dict[str, Player], held_dialogues: list[list[Dialogue]]) -> None:
    a, b = players["honest"], players["conceder"]
    held = cross([a, b, players["a"]], 2)
    assert held.fares([(a, b), (b, a)], a).keys() == DealGame.compared.keys()
    assert held.fares([(a, b), (b, a)], b)["own"].shape == (2, 4)
    assert held.fares([(a, a)], a)["own"].shape == (2, 4)  # it has both seats
    assert len(held_dialogues) == 2 * 3


# ---- another tokenizer -------------------------------------------------------------------------------------


class Witness(ScriptedSpeaker):
    """A scripted side that also asks a foreign speaker what it would have before it."""

    def __init__(self, *args: Any, foreign: ForeignSpeaker) -> None:
        super().__init__(*args)
        self.foreign = foreign
        self.contexts: list[tuple[list[int], list[int]]] = []  # the foreign one's, the arena's

    def ask(self, turn: Speak) -> None:
        self.contexts.append((self.foreign.context(turn), turn.view.token_ids[:]))
        super().ask(turn)


@pytest.mark.parametrize("whose", ["a", "b"])
def test_a_foreign_policy_has_the_same_conversation_before_it(players: dict[str, Player], whose: str) -> None:
    """With the arena's tokenizer the same ids, with another the same text, the markers of turns among it."""
    a, other = players["a"], players[whose]
    assert a.engine is not None
    assert a.tokenizer is not None
    assert other.tokenizer is not None
    game, c = DealGame(), config()
    arena = build_arena(c, a.engine, a.tokenizer, game)
    foreign = ForeignSpeaker(a.engine, other.tokenizer, a.tokenizer)
    limits = game, a.tokenizer, c.dialogue.max_rounds
    witness = arena.speakers.outside = Witness(*limits, "honest", foreign=foreign)
    arena.speakers.policy = ScriptedSpeaker(*limits, "conceder")
    rng = random.Random(1)
    scenarios = [game.sample(rng, "heldout") for _ in range(6)]
    arena.play(scenarios, group_size=1, seed=3, opponents=[Opponent(role=i % 2, name="x") for i in range(6)])
    assert len(witness.contexts) > 12
    for found, expected in witness.contexts:
        if whose == "a":
            assert found == expected
        else:
            assert found != expected
            assert text(other.tokenizer, found) == text(a.tokenizer, expected)


def text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    said: str = tokenizer._core.decode(list(ids), skip_special_tokens=False)
    return said


def test_policies_of_other_sizes_and_tokenizers_meet(
    players: dict[str, Player], held_dialogues: list[list[Dialogue]]
) -> None:
    a, b = players["a"], players["b"]
    held = cross([a, b], 3)
    for pair in ((a, b), (b, a)):
        held.pairing(*pair)
    for dialogues, tokenizer, own in zip(held_dialogues, (a, a, b, b), (0, 0, 0, 0), strict=True):
        assert tokenizer.tokenizer is not None
        ends = tokenizer.tokenizer.chat.stop_token_ids
        for dialogue in dialogues:
            assert dialogue.players[own] == "policy"
            for turn in dialogue.turns:
                assert (turn.logprobs is None) == (turn.role != own)
                if turn.role != own:  # its words, as the other side's tokenizer writes them
                    ids = turn.token_ids[:-1] if turn.token_ids[-1] in ends else turn.token_ids
                    assert tokenizer.tokenizer.decode(ids).strip() == turn.text
    for engine in (a.engine, b.engine):
        assert engine is not None
        assert not engine._branches


# ---- measures and intervals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GAMES_WITH_RULES)
def test_means_of_what_a_side_sees_are_the_games_own(name: str) -> None:
    """Over scripted dialogues, of which some fail in each way."""
    game, rng = GAMES[name](GAMES[name].Settings(name=name)), random.Random(3)
    outcomes: list[tuple[Scenario, Outcome]] = []
    for _ in range(300):
        script = SCRIPTS[name](game, game.sample(rng, "heldout"), rng)
        outcomes.append((script.scenario, script.outcome))
    whole = game.summarise([outcome for _, outcome in outcomes])
    seen = [[game.seen_from(s, o, side) for s, o in outcomes] for side in (0, 1)]

    def mean(side: int, key: str) -> float:
        return float(np.mean([row[key] for row in seen[side] if key in row]))

    shared = [key for key in game.compared if key in whole]
    assert {"agreement", "nash_ratio"} <= {*shared}
    for key in shared:
        assert mean(0, key) == mean(1, key) == pytest.approx(whole[key])
    assert mean(0, "own") == mean(1, "partner") == pytest.approx(np.mean([o.scores[0] for _, o in outcomes]))
    assert mean(1, "lead") == pytest.approx(mean(1, "own") - mean(1, "partner"))
    if name == "price":
        shares = [row["share_own"] for side in (0, 1) for row in seen[side] if "share_own" in row]
        assert np.mean(shares) == pytest.approx(0.5)  # of both sides, it is all there is
        bought = [s.data.buyer == 0 for s, o in outcomes if "share_buyer" in o.metrics]
        first = [row["share_own"] for row in seen[0] if "share_own" in row]
        of_buyers = np.where(bought, first, 1 - np.array(first))
        assert of_buyers.mean() == pytest.approx(whole["share_buyer"])


def sample(rng: np.random.Generator, n: int) -> np.ndarray:
    """Values that go together within a context, a fifth of them missing: [n, 3]."""
    values = rng.normal(1, 1, (n, 1)) + rng.normal(0, 0.5, (n, 3))
    return np.where(rng.random((n, 3)) < 0.2, np.nan, values)


def test_means_of_resamples_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    values, weights = sample(rng, 12), resampled(12, 5)
    assert (weights.sum(1) == 12).all()
    value, resamples = means(values, weights)
    assert value == pytest.approx(np.nanmean(values))
    for counts, found in zip(weights[:200], resamples, strict=False):
        drawn = np.repeat(values, counts.astype(int), axis=0)
        assert found == pytest.approx(np.nanmean(drawn))
    assert interval(value, resamples) == {
        "value": value,
        "low": np.quantile(resamples, 0.025),
        "high": np.quantile(resamples, 0.975),
    }
    nothing = np.full((12, 3), np.nan)
    assert interval(*means(nothing, weights)) == dict.fromkeys(("value", "low", "high"))


def standard_error(values: np.ndarray, others: np.ndarray | None = None) -> float:
    """Of a mean over clusters, or of a difference of two such means on the same clusters: the delta method
    for ratios (Cochran 1977, section 6.3).
    """
    residuals = np.zeros(len(values))
    for array, sign in ((values, 1), (others, -1)):
        if array is not None:
            count = (~np.isnan(array)).sum(1)
            total = np.nansum(array, 1)
            residuals += sign * (total - total.sum() / count.sum() * count) / count.mean()
    return float(residuals.std(ddof=1) / np.sqrt(len(values)))


def test_intervals_agree_with_the_delta_method_and_are_paired() -> None:
    rng = np.random.default_rng(1)
    values = sample(rng, 400)
    others = values + rng.normal(0.3, 0.2, values.shape)  # on the same contexts
    weights = resampled(400, 0)

    def width(value: float, resamples: np.ndarray) -> float:
        found = interval(value, resamples)
        assert found["high"] is not None
        assert found["low"] is not None
        return (found["high"] - found["low"]) / (2 * 1.96)

    (value, draws), (other, other_draws) = means(values, weights), means(others, weights)
    assert width(value, draws) == pytest.approx(standard_error(values), rel=0.1)
    paired = width(other - value, other_draws - draws)
    assert paired == pytest.approx(standard_error(others, values), rel=0.1)
    alone = width(other - value, means(others, resampled(400, 1))[1] - draws)
    assert paired < alone / 3


# ---- the commands ------------------------------------------------------------------------------------------


def run_eval(tmp_path: Path, *argv: str) -> dict[str, Any]:
    """`duologue eval ...`; what it wrote."""
    file = tmp_path / "measures.json"
    assert (
        main(["eval", *argv, "--recipe", "deal", *RUN, *SHORT, "--dialogues", "2", "--json", str(file)]) == 0
    )
    written: dict[str, Any] = json.loads(file.read_text())
    return written


def test_eval_against_the_start(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = ["--save-dialogues", str(tmp_path / "dialogues.jsonl")]
    found = run_eval(tmp_path, str(runs[0]), "--against", "start", *saved)
    (row,) = found["compared"]
    lines = (tmp_path / "dialogues.jsonl").read_text().splitlines()
    between = Counter(tuple(json.loads(line)["between"]) for line in lines)
    assert between == dict.fromkeys(itertools.product((str(runs[0]), "start"), repeat=2), 4)
    assert (found["against"], row["A"], row["B"]) == ("start", str(runs[0]), "start")
    columns = [key for key in row if key not in "AB"]
    assert {"A with A", "B with B", "A as side 1 with B", "A as side 2 with B"} < {*columns}
    for column in columns:
        assert row[column].keys() == DealGame.compared.keys()
        assert row[column]["own"].keys() == {"value", "low", "high"}
    said = capsys.readouterr().out
    assert "side 1" in said
    assert "own score" in said
    step = run_eval(tmp_path, str(runs[0] / "checkpoints" / "step_000004"), "--against", "start")
    assert {key: step["compared"][0][key] for key in columns} == {key: row[key] for key in columns}


def test_eval_against_every_character_and_a_server(runs: list[Path], tmp_path: Path) -> None:
    found = run_eval(tmp_path, str(runs[0]), "--against", "scripted")
    assert [row["B"] for row in found["compared"]] == [f"scripted:{name}" for name in characters("deal")]
    with serving() as server:
        server.answer = lambda prompt: "you take it all"  # type: ignore[assignment,return-value]
        found = run_eval(tmp_path, str(runs[0]), "--against", server.url, "--opponent.model", "other")
        spoke = {body["messages"][0]["content"] for body in server.requests}
        assert len(spoke) == 4  # what either side is told, in two contexts
    assert found["compared"][0]["B"] == server.url
    assert found["compared"][0]["B with B"]["agreement"]["value"] == 0


def test_eval_of_several_is_the_matrix_of_all_seats(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(runs[0]), str(runs[1]), "scripted:liar"]
    rows = run_eval(tmp_path, *names)["pairings"]
    assert [(row["side_1"], row["side_2"]) for row in rows] == [(a, b) for a in names for b in names]
    assert all((row["dialogues"], row["unscored"]) == (4, 0) for row in rows)
    for row in rows:
        assert row["of_side_1"]["own"] == row["of_side_2"]["partner"]
    assert "own score, as side 1 (left) with side 2 (above)" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_a_player_is_one_line(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = str(shutil.copytree(runs[0] / "checkpoints" / "warm_start", tmp_path / "bare"))
    cases = [
        ([str(runs[0]), "--against", "scripted:nobody"], "scripted:nobody: accepted is scripted:conceder,"),
        ([bare, "--against", "start"], "start: there is no"),
        (["scripted:honest", "scripted:liar"], "accepted are players of whom at least one is a checkpoint"),
        ([str(runs[0]), "--against", "nowhere"], "nowhere is not a checkpoint"),
    ]
    for argv, says in cases:
        assert main(["eval", *argv, "--recipe", "deal", *RUN, *SHORT]) == 2
        assert says in capsys.readouterr().err


def test_a_run_ends_with_its_partners(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    from duologue.grpo.commands.report import write_report

    rows = json.loads((runs[0] / "summary.json").read_text())["partners"]
    assert [*rows] == ["itself", "start", "scripted:honest"]
    c, game = config("train.seed=0"), DealGame()
    held_by = [load_player(name, c, game, start_of(runs[0])) for name in (str(runs[0]), "start")]
    honest = load_player("scripted:honest", c, game, start_of(runs[0]))
    held = CrossPlay(c, game, [*held_by, honest], 2)
    for who, player in zip(("trained", "start"), held_by, strict=True):
        found = held.intervals(held.fares([(player, honest), (honest, player)], player))
        assert rows["scripted:honest"][who] == found  # as another process measures the checkpoints
    for row in rows.values():
        for key, value in row["difference"].items():
            if value["value"] is not None:
                gain = row["trained"][key]["value"] - row["start"][key]["value"]
                assert value["value"] == pytest.approx(gain)
    page = write_report(runs[0]).read_text()
    assert "With partners" in page
    assert "scripted:honest" in page
    assert "partners" not in json.loads((runs[1] / "summary.json").read_text())
    assert "With partners" not in write_report(runs[1]).read_text()


@pytest.mark.parametrize(
    ("recipe", "setting", "says"),
    [
        ("deal", "eval.partners=['scripted:nobody']", "scripted:nobody"),
        ("deal", "eval.partners=['frozen']", "'start', 'scripted' or 'scripted:NAME'"),
        ("collective-agency", "eval.partners=['start']", "with dilemmas"),
        ("collective-agency", "eval.partner_dialogues=7", "with dilemmas"),
    ],
)
def test_partners_that_are_not_there_are_refused(recipe: str, setting: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"eval\.partner") as error:
        load_config(recipe, [setting])
    assert says in str(error.value)
    load_config(recipe, ["eval.partners=[]"])


def test_scripted_is_every_character_once() -> None:
    every = [f"scripted:{name}" for name in characters("deal")]
    assert in_full(["start", "scripted", "scripted:honest", "start"], DealGame()) == ["start", *every]
