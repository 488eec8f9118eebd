"""The judge in this process: every checkpoint answers every question, by the probabilities that transformers
gives, and alike in every batch.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from duologue.grpo.cli import main
from duologue.grpo.config import load_config
from duologue.grpo.run_dir import read_lines
from duologue.model.checkpoint import load_model
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, score
from duologue.model.tokenizer import TEMPLATE, Tokenizer, train_tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams
from duologue.rollout.games.game import Persona
from duologue.rollout.judge import form
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.model import ModelJudge
from duologue.rollout.judge.questions import (
    AGREEMENT,
    PREFERENCE,
    REQUIRED,
    SCORE,
    WINNERS,
    Case,
    load_prompt,
)
from judge_server import ASPECTS

PERSONAS = (Persona("Ada", "Spend as little as you can."), Persona("Bo", "Make it last."))
CASE = Case(
    dilemma="Who pays?",
    personas=PERSONAS,
    turns=((0, "I offer half."), (1, "Half is fine with me."), (0, "Then half it is."), (1, "Yes.")),
    completion="Both pay half.",
    answers=("Both pay half.", "Nobody pays."),
)
SHORT = {  # prompts of a few tokens, for tokenizers that know no words
    AGREEMENT: "{dilemma}{transcript}agreed?",
    SCORE: 'How good?\nknowledge: a\nbenevolence: b\npower: c\nvitality: d\n{"knowledge": 0-5, "benevolence"'
    ': 0-5, "power": 0-5, "vitality": 0-5}\n{dilemma}{completion}',
    PREFERENCE: "{answers}which?",
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("prompts")
    for kind, text in SHORT.items():
        (folder / f"{kind}.txt").write_text(text)
    return str(folder)


def byte_fallback() -> Tokenizer:
    """As SentencePiece's: a space is a character of its own kind, and what has no token is bytes; there is
    none for a digit.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    special = ["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    listed = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abdefhlrstu", "▁t", "ru", "al"]
    merges = [("▁", "t"), ("r", "u"), ("a", "l")]
    vocabulary = {token: i for i, token in enumerate(listed)}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(special)
    return Tokenizer(core, {"bos_token": "<|bos|>", "eos_token": "<|end|>"}, TEMPLATE)


def words() -> Tokenizer:
    return train_tokenizer(['{"agreed": true, "false": half and half, "winner": "tie"}'] * 4, 330)


TOKENIZERS = {"words": words, "byte fallback": byte_fallback}


def decoder(tokenizer: Tokenizer, model_type: str = "qwen3", seed: int = 0, scale: float = 8.0) -> Decoder:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    shape = {**sizes, "head_dim": 16, "max_position_embeddings": 4000}
    bias = model_type == "qwen2"
    vocab_size = tokenizer.vocab_size
    model = Decoder(ModelConfig(model_type=model_type, vocab_size=vocab_size, qkv_bias=bias, **shape))
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


Make = Callable[..., FeedbackJudge]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """make(model, tokenizer, ...) -> a judge with a ledger of its own, or the one that `ledger` names."""
    made: list[FeedbackJudge] = []

    def build(
        model: Decoder,
        tokenizer: Tokenizer,
        folder: str = "",
        ledger: str = "",
        offline: bool = False,
        engine: dict[str, int] | None = None,
        **settings: Any,
    ) -> FeedbackJudge:
        sizes = {"cache_tokens": 16384, **(engine or {})}
        backend = ModelJudge(lambda: (Engine(model, **sizes), tokenizer), **settings)
        prompts = {kind: load_prompt(kind, folder, held=True) for kind in REQUIRED}
        path = tmp_path / f"{ledger or len(made)}.sqlite"
        made.append(FeedbackJudge(backend, Ledger(path), prompts, offline=offline, held=True))
        return made[-1]

    yield build
    for judge in made:
        judge.close()


Ask = tuple[str, Case]


def ask(judge: FeedbackJudge, questions: Sequence[Ask]) -> list[Any]:
    for i, (kind, case) in enumerate(questions):
        judge.submit(kind, case, i)
    found: dict[int, Any] = {}
    while len(found) < len(questions):
        found |= dict(judge.answered(wait=True))
    return [found[i] for i in range(len(questions))]


def kept(judge: FeedbackJudge) -> dict[str, Any]:
    """What the ledger holds, by key."""
    with sqlite3.connect(judge.ledger.path) as database:
        return {key: json.loads(text) for key, text in database.execute("SELECT key, answer FROM answers")}


def of(judge: FeedbackJudge, kind: str, case: Case) -> Any:
    """The whole answer to one question."""
    before = kept(judge)
    assert ask(judge, [(kind, case)]) != [None], judge.last_fault
    (key,) = kept(judge).keys() - before.keys()
    return kept(judge)[key]


# ---- every question is answered ----------------------------------------------------------------------------

PARTS = [
    "yes",
    "I agree",
    "half",
    "A",
    "true",
    "0",
    " ",
    "\n",
    '"',
    '""',
    '", "2": "',
    "}",
    "{",
    "..",
    "-",
    "'",
]
PARTS += ["e\u0301", "é", "\u0301", "한", "👩\u200d👧", "🙂", "\u200b", "ﬁ", "\ufffd", "\u2028", "\x00", "\\"]
PARTS += ["&lt;", "<turn>"]


def talk(rng: random.Random) -> Case:
    """Turns of odd texts, some of them empty."""

    def text() -> str:
        return "".join(rng.choice(PARTS) for _ in range(rng.randrange(9)))

    turns = tuple((i % 2, text()) for i in range(rng.randrange(1, 7)))
    return Case(dilemma=text(), turns=turns, completion=text(), answers=(text(), text()))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_any_checkpoint_answers_any_question(make: Make, short: str, name: str, model_type: str) -> None:
    rng = random.Random(f"{name} {model_type}")
    tokenizer = TOKENIZERS[name]()
    agreements = quotes = 0
    for seed, scale in ((0, 1.0), (1, 30.0)):
        model = decoder(tokenizer, model_type, seed, scale)
        judge = make(model, tokenizer, short, threshold=0.0, readings=3)
        cases = [talk(rng) for _ in range(14)]
        for case in cases:
            answer = of(judge, AGREEMENT, case)
            said = [[text for who, text in case.turns if who == role] for role in (0, 1)]
            silent = any(not "".join(texts).replace('"', "").strip() for texts in said)
            assert answer["agreed"] or silent or any('"' in "".join(texts) for texts in said)
            for role, texts in enumerate(said):
                quote = answer["assent"][str(role + 1)]
                assert bool(quote.strip()) == answer["agreed"]
                assert any(quote in text for text in texts) or not quote
                quotes += len(quote) > 3
            agreements += answer["agreed"]
        for answer in ask(judge, [(SCORE, case) for case in cases]):
            assert all(0 <= answer[aspect] <= 5 for aspect in ASPECTS)
            assert sum(answer[aspect] % 1 > 0 for aspect in ASPECTS) > 0
        for answer in ask(judge, [(PREFERENCE, case) for case in cases]):
            assert answer["winner"] == max(WINNERS, key=answer["probabilities"].__getitem__)
        assert judge.failed == 0
    assert agreements > 7
    assert quotes > 2


def test_what_the_context_does_not_hold_is_named(make: Make, short: str) -> None:
    tokenizer = words()
    judge = make(decoder(tokenizer), tokenizer, short, readings=4)
    long = Case(dilemma="", turns=((0, "half " * 4000),), completion="half " * 4000)
    questions = [(AGREEMENT, long), (SCORE, long), (SCORE, CASE)]
    assert [answer is None for answer in ask(judge, questions)] == [True, True, False]
    assert "max_position_embeddings" in judge.last_fault


# ---- the probabilities are those of transformers -----------------------------------------------------------


class Peer:
    """The same answers by transformers alone: its template, its tokenizer, its forward in fp32."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def question(self, text: str) -> list[int]:
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": text}]
        shown = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, tokenize=False
        )
        return self.ids(shown)

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[T, V]"""
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)

    def choose(self, context: list[int], texts: Sequence[str]) -> list[float]:
        sums = []
        for text in texts:
            ids = self.ids(text)
            rows = self.logprobs(context + ids)[len(context) - 1 : -1]
            sums.append(sum(float(row[token]) for row, token in zip(rows, ids, strict=True)))
        return torch.softmax(torch.tensor(sums, dtype=torch.float64), 0).tolist()


@pytest.fixture(scope="module")
def peer(chat_checkpoint: Path) -> tuple[Peer, Decoder, Tokenizer]:
    return Peer(chat_checkpoint), *load_model(chat_checkpoint, "cpu", torch.float32)


def prompt(kind: str, show: bool = True) -> str:
    return load_prompt(kind, held=True).fill(CASE, show)


def test_an_agreement_is_as_probable_as_transformers_says_and_its_quotes_the_likeliest_spans(
    make: Make, peer: tuple[Peer, Decoder, Tokenizer]
) -> None:
    other, model, tokenizer = peer
    context = other.question(prompt(AGREEMENT)) + other.ids('{"agreed":')
    expected = other.choose(context, [" true", " false"])[0]
    answer = of(make(model, tokenizer, threshold=0.0), AGREEMENT, CASE)
    assert answer["probabilities"]["true"] == pytest.approx(expected, abs=1e-4)
    context += other.ids(' true, "assent": {"1": "')
    for role, closing in ((0, '", "2": "'), (1, '"}}')):
        turns = [other.ids(text) for who, text in CASE.turns if who == role]
        spans = [ids[a:b] for ids in turns for a in range(len(ids)) for b in range(a + 1, len(ids) + 1)]
        drawn: list[int] = []
        end = other.ids(closing)[0]
        while not drawn or drawn[-1] != end:
            follow = {
                span[len(drawn)] for span in spans if len(span) > len(drawn) and span[: len(drawn)] == drawn
            }
            allowed = sorted(follow | ({end} if len(drawn) >= 3 or not follow else set()))
            row = other.logprobs(context + drawn)[-1]
            drawn.append(max(allowed, key=lambda token, row=row: float(row[token])))  # type: ignore[misc]
        assert answer["assent"][str(role + 1)] == other.tokenizer.decode(drawn[:-1]).lstrip()
        context += drawn[:-1] + other.ids(closing)


def test_scores_are_as_probable_in_every_order(make: Make, peer: tuple[Peer, Decoder, Tokenizer]) -> None:
    other, model, tokenizer = peer
    text = prompt(SCORE, show=False)
    lines = {line.split(":")[0]: line for line in text.splitlines() if line.split(":")[0] in ASPECTS}
    asked = of(make(model, tokenizer, readings=3), SCORE, CASE)
    expected: dict[str, list[Any]] = {aspect: [] for aspect in ASPECTS}
    for order in form.ORDERS[:3]:
        block = "\n".join(lines[aspect] for aspect in order)
        numbers = ", ".join(f'"{aspect}": 0-5' for aspect in order)
        shown = text.replace("\n".join(lines.values()), block)
        shown = shown.replace(", ".join(f'"{aspect}": 0-5' for aspect in ASPECTS), numbers)
        assert (shown == text) == (order == ASPECTS)
        context = other.question(shown)
        for i, aspect in enumerate(order):
            context += other.ids(f'{", " if i else "{"}"{aspect}":')
            digits = other.choose(context, [f" {n}" for n in range(6)])
            expected[aspect].append(digits)
            context += other.ids(f" {np.argmax(digits)}")
    for aspect in ASPECTS:
        np.testing.assert_allclose(asked["probabilities"][aspect], expected[aspect], atol=1e-4)
        assert asked[aspect] == pytest.approx(
            float((np.array(expected[aspect]) @ np.arange(6)).mean()), abs=1e-3
        )


def test_a_preference_is_as_probable(make: Make, peer: tuple[Peer, Decoder, Tokenizer]) -> None:
    other, model, tokenizer = peer
    context = other.question(prompt(PREFERENCE)) + other.ids('{"winner": "')
    answer = of(make(model, tokenizer), PREFERENCE, CASE)
    np.testing.assert_allclose(
        list(answer["probabilities"].values()), other.choose(context, WINNERS), atol=1e-4
    )
    assert list(answer["probabilities"]) == list(WINNERS)


def test_candidates_have_the_log_probs_of_training_whatever_is_drawn_beside() -> None:
    tokenizer = words()
    model = decoder(tokenizer)
    ids, candidates = tokenizer.encode("half and half"), (7, 280, 7, 12)
    with torch.no_grad():
        expected = [float(score(model, [[*ids, token]])[0][-1]) for token in candidates]
    for steps in (1, 8):
        engine = Engine(model, cache_tokens=2048, decode_steps=steps)
        free = SamplingParams(max_new_tokens=12, top_k=3)
        held = SamplingParams(max_new_tokens=4, allow=lambda drawn: [5, 9], candidates=candidates)
        asking = SamplingParams(max_new_tokens=5, temperature=0, candidates=candidates)
        found = engine.generate([ids * 9, ids, [3], ids], [free, held, free, asking])
        assert [c.candidate_logprobs for c in found] == [[], expected, [], expected]
        plain = engine.generate([ids], SamplingParams(max_new_tokens=5, temperature=0))[0]
        assert found[3].token_ids == plain.token_ids
    with pytest.raises(ValueError, match=f"token id {tokenizer.vocab_size} is outside the vocabulary"):
        engine.generate([ids], SamplingParams(candidates=(tokenizer.vocab_size,)))


# ---- the same whatever else is asked -----------------------------------------------------------------------


def test_an_answer_does_not_depend_on_the_batch_to_the_bit(make: Make, short: str) -> None:
    tokenizer = words()
    model = decoder(tokenizer)
    rng = random.Random(5)
    cases = [talk(rng) for _ in range(8)]
    cases += [Case(**{**vars(CASE), "turns": CASE.turns[:n]}) for n in range(2, 5)]
    questions = [(kind, case) for case in cases for kind in (AGREEMENT, SCORE, PREFERENCE)]
    settings = {"threshold": 0.0, "readings": 4}
    alone = make(model, tokenizer, short, **settings)
    for question in questions:
        ask(alone, [question])
    expected = kept(alone)
    assert len(expected) == len(set(expected)) > 25
    small = {"cache_tokens": 1024, "max_batch": 3, "max_step_tokens": 64}
    for engine in ({}, small, {"page_size": 32}):
        rng.shuffle(questions)
        together = make(model, tokenizer, short, engine=engine, **settings)
        ask(together, questions)
        assert kept(together) == expected
    assert together.costs()["judge_shared_tokens"] > 0


def test_what_the_questions_of_a_scenario_share_is_computed_once(make: Make) -> None:
    tokenizer = words()
    judge = make(decoder(tokenizer), tokenizer, engine={"max_step_tokens": 256}, threshold=1.0)
    prompt = load_prompt(AGREEMENT, held=True).template.split("{dilemma}")[0]
    common = len(tokenizer.encode(prompt)) // 16 * 16
    of(judge, AGREEMENT, CASE)
    first = judge.costs()
    assert first["judge_prefill_tokens"] > common
    assert first["judge_shared_tokens"] == 0
    others = [Case(dilemma=CASE.dilemma, turns=((0, f"No {i}."), (1, "Why?"))) for i in range(8)]
    ask(judge, [(AGREEMENT, case) for case in others])
    then = judge.costs()
    assert then["judge_asked"] == 8
    assert then["judge_shared_tokens"] >= common
    assert then["judge_prefill_tokens"] < first["judge_prefill_tokens"] - common
    of(judge, AGREEMENT, Case(dilemma=CASE.dilemma, turns=(*others[0].turns, (0, "So."))))
    assert judge.costs()["judge_shared_tokens"] > then["judge_shared_tokens"]  # the turns before too
    assert set(judge.costs().values()) == {0.0}


# ---- what an answer is made of -----------------------------------------------------------------------------


def test_scores_average_what_the_readings_say(make: Make, short: str) -> None:
    tokenizer = words()
    model = decoder(tokenizer, scale=12.0)
    for readings in (1, 3, 24):
        expected = of(make(model, tokenizer, short, readings=readings), SCORE, CASE)
        likeliest = of(make(model, tokenizer, short, readings=readings, score="likeliest"), SCORE, CASE)
        assert expected["probabilities"] == likeliest["probabilities"]
        for aspect in ASPECTS:
            found = np.array(expected["probabilities"][aspect])
            assert found.shape == (readings, 6)
            np.testing.assert_allclose(found.sum(1), 1)
            assert expected[aspect] == pytest.approx((found @ np.arange(6)).mean())
            assert likeliest[aspect] == found.argmax(1).mean()


def test_orders_are_all_there_are_and_the_first_four_are_balanced() -> None:
    assert sorted(form.ORDERS) == sorted(itertools.permutations(ASPECTS))
    assert form.ORDERS[0] == ASPECTS
    for place in range(4):
        assert {order[place] for order in form.ORDERS[:4]} == set(ASPECTS)


def test_a_prompt_without_the_lines_of_the_aspects_keeps_its_text(tmp_path: Path) -> None:
    (tmp_path / "score.txt").write_text("power: yes\npower: again\nknowledge: no\n{completion}")
    mine = load_prompt(SCORE, str(tmp_path), held=True)
    assert mine.reordered(form.ORDERS[3]) == mine


def test_the_threshold_decides(make: Make, short: str) -> None:
    tokenizer = words()
    model = decoder(tokenizer)
    yes = of(make(model, tokenizer, short), AGREEMENT, CASE)["probabilities"]["true"]
    assert 0 < yes < 1
    for threshold, agreed in ((0.0, True), (yes, True), (np.nextafter(yes, 1), False), (1.0, False)):
        answer = of(make(model, tokenizer, short, threshold=float(threshold)), AGREEMENT, CASE)
        assert answer["agreed"] == agreed
        assert answer["assent"] != {"1": "", "2": ""} or not agreed


def test_the_ledger_knows_an_answer_by_all_that_it_depends_on(make: Make, short: str, tmp_path: Path) -> None:
    tokenizer = words()
    model = decoder(tokenizer)
    questions = [(AGREEMENT, CASE), (SCORE, CASE), (PREFERENCE, CASE)]
    first = make(model, tokenizer, short, ledger="one", threshold=0.0)
    answers = ask(first, questions)
    again = make(model, tokenizer, short, ledger="one", threshold=0.0, offline=True)
    assert ask(again, questions) == answers
    assert again.costs()["judge_prefill_tokens"] == 0
    (tmp_path / "agreement.txt").write_text("{dilemma}{transcript}?")
    other = train_tokenizer(["other words"] * 4, tokenizer.vocab_size)
    for changed in (
        {"threshold": 0.1},
        {"threshold": 0.0, "readings": 2},
        {"threshold": 0.0, "score": "likeliest"},
        {"threshold": 0.0, "model": decoder(tokenizer, seed=1)},
        {"threshold": 0.0, "tokenizer": other},
        {"threshold": 0.0, "folder": str(tmp_path)},
    ):
        words_ = {"model": model, "tokenizer": tokenizer, "folder": short, **changed}
        assert ask(make(**words_, ledger="one", offline=True), questions[:1]) == [None], changed


def test_settings_without_an_effect_are_refused(short: str) -> None:
    server = ["judge.url=http://127.0.0.1:1/v1"]
    here = ["judge.backend=policy", "model.path=x"]
    for settings, says in (
        ([*server, "judge.threshold=0.4"], "judge.threshold = 0.4: accepted is its default"),
        ([*server, 'judge.score="likeliest"'], "judge.score"),
        ([*server, "judge.readings=2"], "judge.readings = 2"),
        ([*here, "judge.temperature=0.5"], "judge.temperature = 0.5: accepted is its default"),
        ([*here, "judge.max_tokens=9"], "judge.max_tokens = 9"),
        ([*here, "judge.readings=25"], "judge.readings = 25: accepted is 1 to 24"),
        ([*here, "judge.threshold=1.5"], "judge.threshold = 1.5: accepted is 0 to 1"),
        ([*here, 'judge.score="mean"'], "judge.score = 'mean': accepted is one of 'expected', 'likeliest'"),
    ):
        with pytest.raises(ValueError, match=says):
            load_config("collective-agency", settings)
    second = ["eval.judge_url=http://127.0.0.1:1/v1", "judge.temperature=0.5", "judge.readings=2"]
    assert load_config("collective-agency", [*here, *second]).judge.readings == 2


# ---- in a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def words_of_a_run(chat_checkpoint: Path, tmp_path: Path) -> list[str]:
    """A command without its run directory, on tiny texts."""
    pair = {
        "first": {"name": "Ada", "instructions": "Spend."},
        "second": {"name": "Bo", "instructions": "Save."},
    }
    rows = {
        "dilemmas": [{"id": "d1", "text": "Who pays?"}, {"id": "d2", "text": "Is it right?"}],
        "personas": [{"id": "cost", **pair}],
        "tasks": [{"id": "t1", "text": "Buy or not?", **pair}],
    }
    for key, found in rows.items():
        (tmp_path / f"{key}.jsonl").write_text("\n".join(map(json.dumps, found)))
    sizes = [
        "grpo.group_size=3",
        "grpo.groups_per_step=2",
        "dialogue.max_tokens_per_turn=6",
        "eval.dialogues=2",
    ]
    sizes += [
        "eval.ability=false",
        "dialogue.max_rounds=2",
        "dialogue.max_tokens_final=6",
        "rollout.cache_tokens=32768",
    ]
    here = ["judge.readings=2", "judge.threshold=0.3", "train.save_every=1", "judge.max_unscored_share=0"]
    texts = [f"game.{key}={tmp_path / key}.jsonl" for key in rows]
    return ["train", "collective-agency", "--model", str(chat_checkpoint), *sizes, *here, *texts]


def selfplay(run: Path) -> list[dict[str, Any]]:
    return [d for d in read_lines(run / "dialogues.jsonl") if d["stage"] == "selfplay"]


def test_a_run_judged_by_a_model_scores_every_dialogue_and_resumes(
    words_of_a_run: list[str], chat_checkpoint: Path, tmp_path: Path
) -> None:
    by_model = [*words_of_a_run, "judge.backend=model", f"judge.model={chat_checkpoint}"]
    assert main([*by_model, "--run-dir", str(tmp_path / "whole"), "train.steps=2"]) == 0
    rows = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert [row["judge_failed"] for row in rows] == [0, 0]
    assert all(row["judge_prefill_tokens"] > 0 and row["judge_shared_tokens"] > 0 for row in rows)
    found = selfplay(tmp_path / "whole")
    rewards = [d["reward"] for d in found]
    assert len(rewards) == 12
    assert None not in rewards
    assert any(d["outcome"]["agreed"] for d in found)
    # The start's own weights are the same judge; stopped after a step, it goes on as if it had not been.
    by_start = [*words_of_a_run, "judge.backend=policy", "--run-dir", str(tmp_path / "parts")]
    assert main([*by_start, "train.steps=1"]) == 0
    assert main([*by_start, "train.steps=2", "--resume"]) == 0
    assert selfplay(tmp_path / "parts") == found


def test_preferences_of_a_model_have_their_probability_in_both_orders(
    words_of_a_run: list[str], chat_checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(chat_checkpoint, tmp_path / "other"))
    out = tmp_path / "result.json"
    command = ["eval", str(chat_checkpoint), "--recipe", "collective-agency", "--against", str(other)]
    settings = [word for word in words_of_a_run[4:] if not word.startswith(("grpo", "train"))]
    settings += ["judge.backend=model", f"judge.model={chat_checkpoint}", f"model.path={chat_checkpoint}"]
    assert main([*command, "--json", str(out), *settings]) == 0
    for mode in ("greedy", "sampled"):
        row = json.loads(out.read_text())[mode]["conflicts"]
        assert row[str(chat_checkpoint)]["unscored"] == row["preference"]["unscored"] == 0
        assert row["preference"]["probability"]["value"] == pytest.approx(
            0.5
        )  # the same answers on both sides
