"""The checkers of instructions agree with an independent implementation of IFEval's, PyPI's if-verifiable."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from duologue.grpo.ability.instructions import (
    OF_LANGUAGE,
    _detectors,
    check_for,
    loose_variants,
    sentences,
    verdict,
)

TEXTS = 500
# Pieces of answers, in which everything that is counted occurs, whole, twice, broken or in odd places
PIECES = r"""<<A quiet river>>|<< >>|<<two\nlines>>|* a bullet|- another bullet|  * an indented one|** none|*
***|*** |******|\n\n|\n\n\n\n|*marked*|**strongly marked**|***both***|* *|*broken|[name]|[address] and [city]
[]|[open|P.S. one more thing|P. S. and this|p.p.s. the last|P.P.S. really|PS no points|My answer is yes
My answer is no.|Section 1|SECTION 2:|Section three|Section  3|Section4|{"a": [1, 2]}|```json\n{"a": 1}\n```
```\n[]\n```|{broken|The garden was quiet, and nobody came.|nothing here needs a comma|ALL THIS IS LOUD
NATO and the U.S. met|I DON'T KNOW|It's a self-made LOUD-SPEAKER.|River, river; RIVER! rivers
"Quoted from the start|to the end"|"|'single'|yes|No!|12345 !!|what a zebra|Zebra crossing #1 #2|% & $
Der Fluss ist heute sehr ruhig und niemand kommt vorbei.|el río está muy tranquilo y nadie viene
Is there anything else?|is there anything else? |"Is there anything else?"|café naïve|a\tb|x
the first word is not here. Is it? Maybe... yes|Mr. Smith came at 5 p.m. and left.|River beds are wide.
River|river, they say"""
GIVEN: list[tuple[str, dict[str, Any]]] = [
    ("keywords:existence", {"keywords": ["river", "quiet"]}),
    ("keywords:frequency", {"relation": "at least", "keyword": "river", "frequency": 2}),
    ("keywords:frequency", {"relation": "less than", "keyword": "the", "frequency": 3}),
    ("keywords:forbidden_words", {"forbidden_words": ["rivers", "nobody"]}),
    ("keywords:letter_frequency", {"let_relation": "at least", "letter": "Z", "let_frequency": 1}),
    ("keywords:letter_frequency", {"let_relation": "less than", "letter": "e", "let_frequency": 9}),
    ("language:response_language", {"language": "de"}),
    ("language:response_language", {"language": "en"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 15}),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 20}),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "river"},
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "my"},
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 1}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "The garden was quiet"}),
    ("startend:end_checker", {"end_phrase": "Is there anything else?"}),
    ("startend:quotation", {}),
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 4}),
    ("change_case:capital_word_frequency", {"capital_relation": "less than", "capital_frequency": 3}),
    ("change_case:english_capital", {}),
    ("change_case:english_lowercase", {}),
    ("punctuation:no_comma", {}),
]


def answers() -> list[str]:
    """Single pieces, and random ones put together."""
    rng = random.Random(0)
    pieces = [piece.replace("\\n", "\n") for line in PIECES.split("\n") for piece in line.split("|")]
    texts = [*pieces, "", "  \n "]
    while len(texts) < TEXTS:
        joint = rng.choice([" ", "\n", "\n", "\n\n", "\n\n", ""])
        words = joint.join(rng.choices(pieces, k=rng.randint(1, 5)))
        texts.append(rng.choice([str, str, str, str.lower, str.upper])(words))
    return texts


def spoken() -> list[str]:
    """Few, for a language takes long to detect: sentences as they are, in capitals and in small letters."""
    long = [piece for piece in PIECES.replace("\n", "|").split("|") if len(piece) > 28]
    return [variant for piece in long for variant in (piece, piece.upper(), piece.lower())]


@pytest.fixture(scope="module")
def oracle() -> Iterator[dict[str, Any]]:
    """Its checkers by kind. nltk's models cannot be had everywhere: words are cut by its rules alone."""
    registry = pytest.importorskip("if_verifiable.ifeval.instructions_registry")
    from if_verifiable.ifeval import instructions_util
    from langdetect import detector_factory
    from nltk.tokenize import NLTKWordTokenizer

    patch = pytest.MonkeyPatch()
    patch.setattr(detector_factory, "_factory", _detectors())  # with its seed, read once
    patch.setattr(instructions_util.nltk, "word_tokenize", NLTKWordTokenizer().tokenize)
    logging.getLogger().disabled = True  # it reports every text without a language
    yield registry.INSTRUCTION_DICT
    logging.getLogger().disabled = False
    patch.undo()


@pytest.mark.parametrize(("kind", "given"), GIVEN, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(GIVEN)])
def test_an_independent_implementation_agrees(
    kind: str, given: dict[str, Any], oracle: dict[str, Any]
) -> None:
    theirs = oracle[kind](kind)
    theirs.build_description(**given)
    check, held = check_for(kind, given), set()
    for text in spoken() if kind in OF_LANGUAGE else answers():
        strict = bool(text.strip()) and bool(theirs.check_following(text))
        loose = any(theirs.check_following(v) for v in set(loose_variants(text)) if v.strip())
        assert verdict([check], text) == ([strict], [loose]), repr(text)
        held.add(strict)
    assert held == {True, False}


def test_the_loose_variants_are_the_oracles() -> None:
    common = pytest.importorskip("if_verifiable.common")
    for text in answers():
        assert sorted(loose_variants(text)) == sorted(common.get_loose_transformations(text))


@pytest.mark.parametrize("letter", ["#", "!"])
def test_a_letter_that_is_none_is_counted_as_it_is(letter: str) -> None:
    """Where other implementations draw a random one in its place."""
    check = check_for(
        "keywords:letter_frequency", {"let_relation": "at least", "letter": letter, "let_frequency": 2}
    )
    assert check(f"a {letter} b {letter}")
    assert not check(f"a {letter} b")


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("One. Two! Three? Four", 4),
        ("Mr. Smith met Dr. Jones at 5 p.m. and left. He was late.", 2),
        ("The U.S. team won 3.5 points... then it lost.", 1),
        ('"Is it over?" she asked. "Yes." (It was.) Nobody spoke', 5),
        ("First line\nsecond line. Third\n\n* A bullet. Another.", 3),
        ("", 0),
        ("   \n ", 0),
    ],
)
def test_sentences_end_where_a_mark_and_a_gap_stand(text: str, n: int) -> None:
    assert len(sentences(text)) == n
    for relation, held in (("at least", True), ("less than", False)):
        given = {"relation": relation, "num_sentences": n}
        assert check_for("length_constraints:number_sentences", given)(text) is held


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("keywords:rhyme", {}, "keywords:rhyme"),
        ("keywords:existence", {"keywords": None}, "accepted is keywords"),
        ("keywords:existence", {"keywords": "river"}, "a list"),
        ("punctuation:no_comma", {"n": 3}, "accepted is none"),
        ("startend:end_checker", {"end_phrase": 7}, "end_phrase = 7: accepted is a text"),
        ("language:response_language", {"language": 5}, "language = 5: accepted is a text"),
        ("keywords:forbidden_words", {"forbidden_words": {"a": 1}}, "a list"),
        *(
            (
                "detectable_format:number_bullet_lists",
                {"num_bullets": n},
                f"num_bullets = {n!r}: accepted is",
            )
            for n in ("3", 2.5, float("inf"), True, -1)
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 0, "first_word": "a"},
            "nth_paragraph = 0: accepted is a whole number from 1 on",
        ),
        ("length_constraints:number_words", {"relation": "about", "num_words": 3}, "'about'"),
        (
            "keywords:letter_frequency",
            {"let_relation": "at least", "letter": "ab", "let_frequency": 1},
            "'ab'",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused_by_name(kind: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_for(kind, given)


def test_a_whole_number_may_be_written_as_a_fraction() -> None:
    given = {"num_paragraphs": 2.0, "nth_paragraph": 1.0, "first_word": "one"}
    assert check_for("length_constraints:nth_paragraph_first_word", given)("One.\n\nTwo.")


def test_words_in_capitals_end_at_typographic_marks() -> None:
    holds = check_for(
        "change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 5}
    )
    assert holds("DON’T STOP, HELLO—WORLD")
    assert not holds("DON’T STOP, HELLO-WORLD")


def test_every_variant_is_asked_the_same_check() -> None:
    """Strict is among the loose variants, so that loose never falls below it."""
    checks = [check_for(kind, given) for kind, given in GIVEN if kind not in OF_LANGUAGE]
    for text in answers():
        strict, loose = verdict(checks, text)
        assert all(not s or l for s, l in zip(strict, loose, strict=True)), repr(text)
