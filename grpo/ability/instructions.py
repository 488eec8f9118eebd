"""Instructions that a program can check: the 25 kinds of IFEval (Zhou et al. 2023, arXiv 2311.07911).

    checks = [check_for(kind, given) for kind, given in zip(kinds, arguments)]   # once per prompt
    verdict(checks, answer)                        # which hold strictly, and which loosely

A check takes an answer's text. The loose verdict asks the same check about eight variants of it: with and
without the first line, the last line and asterisks. The kinds and the names of their arguments are IFEval's,
and so is what they count, odd as it may be, so that figures can be compared. Two kinds are counted by nltk's
models there and by rules here (sentences, words in capitals), and a letter that is no letter is taken as it
is instead of being replaced by a random one.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Check = Callable[[str], bool]
LESS, LEAST = "less than", "at least"
ENGLISH = "en"
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
DIVIDER, BETWEEN_ANSWERS = r"\s?\*\*\*\s?", "******"
# Kinds that depend on the language of an answer: langdetect, IFEval's own, is an extra
OF_LANGUAGE = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")


class Verdict(NamedTuple):
    """Of one answer: whether it follows each instruction of its prompt."""

    strict: list[bool]
    loose: list[bool]


def verdict(checks: Sequence[Check], answer: str) -> Verdict:
    variants = [text for text in dict.fromkeys(loose_variants(answer)) if text.strip()]
    return Verdict(
        strict=[bool(answer.strip()) and check(answer) for check in checks],
        loose=[any(check(text) for text in variants) for check in checks],
    )


def loose_variants(answer: str) -> Iterator[str]:
    """The answer, without its first line, without its last, without both; then each without asterisks."""
    lines = answer.split("\n")
    shorter = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    for text in (answer, *shorter):
        yield text
        yield text.replace("*", "")


def check_for(kind: str, given: Mapping[str, Any]) -> Check:
    """The check of an instruction with its arguments, of which None is as good as absent.

    ValueError for an unknown kind, and for arguments that are missing, unknown or out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"the instruction {kind!r}: accepted are {', '.join(KINDS)}")
    known = {key: value for key, value in given.items() if value is not None}
    needed = {name: str(p.annotation) for name, p in inspect.signature(KINDS[kind]).parameters.items()}
    if sorted(known) != sorted(needed):
        accepted = ", ".join(needed) or "none"
        raise ValueError(f"{kind} with the arguments {', '.join(known) or 'none'}: accepted is {accepted}")
    return KINDS[kind](**{name: _of_type(type_, kind, name, known[name]) for name, type_ in needed.items()})


def _of_type(type_: str, kind: str, name: str, value: Any) -> Any:
    """An argument as the check's signature has it; a whole number may be written as 3.0."""
    if type_ == "int":
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        least = int(name.startswith("nth"))
        if isinstance(value, bool) or not whole or value < least:
            raise ValueError(f"{kind} with {name} = {value!r}: accepted is a whole number from {least} on")
        return int(value)
    if type_ == "str" and not isinstance(value, str):
        raise ValueError(f"{kind} with {name} = {value!r}: accepted is a text")
    return value


def can_check(kind: str) -> bool:
    """Whether what it needs is installed."""
    return kind not in OF_LANGUAGE or importlib.util.find_spec("langdetect") is not None


def _compare(relation: str, limit: int) -> Callable[[int], bool]:
    if relation not in (LESS, LEAST):
        raise ValueError(f"the relation {relation!r}: accepted is {LESS!r} or {LEAST!r}")
    return lambda count: count < limit if relation == LESS else count >= limit


# ---- keywords ----------------------------------------------------------------------------------------------


def _existence(keywords: Sequence[str]) -> Check:
    patterns = [re.compile(re.escape(word), re.IGNORECASE) for word in _texts(keywords)]
    return lambda text: all(pattern.search(text) for pattern in patterns)


def _frequency(relation: str, keyword: str, frequency: int) -> Check:
    pattern, holds = re.compile(re.escape(keyword.strip()), re.IGNORECASE), _compare(relation, frequency)
    return lambda text: holds(len(pattern.findall(text)))


def _forbidden_words(forbidden_words: Sequence[str]) -> Check:
    words = "|".join(re.escape(word) for word in _texts(forbidden_words))
    pattern = re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
    return lambda text: not pattern.search(text)


def _letter_frequency(let_relation: str, letter: str, let_frequency: int) -> Check:
    holds, wanted = _compare(let_relation, let_frequency), letter.strip().lower()
    if len(wanted) != 1:
        raise ValueError(f"keywords:letter_frequency with the letter {letter!r}: accepted is one character")
    return lambda text: holds(text.lower().count(wanted))


def _texts(words: Sequence[str]) -> list[str]:
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words) or not words:
        raise ValueError(f"the words {words!r}: accepted is a list of at least one text")
    return [*words]


# ---- language and case -------------------------------------------------------------------------------------


@functools.cache
def _detectors() -> Any:
    """langdetect's profiles, with a fixed seed: by default each of its answers is drawn anew."""
    from langdetect import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = 0
    return factory


def is_in(text: str, language: str) -> bool:
    """Whether langdetect takes a text for this language; what has no features passes, as it does there."""
    from langdetect.lang_detect_exception import LangDetectException

    detector = _detectors().create()
    detector.append(text)
    try:
        return bool(detector.detect() == language)
    except LangDetectException:
        return True


def _response_language(language: str) -> Check:
    return lambda text: is_in(text, language)


def _english_capital() -> Check:
    return lambda text: text.isupper() and is_in(text, ENGLISH)


def _english_lowercase() -> Check:
    return lambda text: text.islower() and is_in(text, ENGLISH)


# What stands between gaps and marks, short of an ending such as n't, which is a word of its own
ENDING = r"n't\b|'(?:s|m|d|ll|re|ve)\b"
CAPITAL_WORD = re.compile(
    rf"{ENDING}|(?:(?!{ENDING}|--|\.\.\.)[^\s,:;@#$%&?!*“”‘’—«»\"()\[\]{{}}<>])+", re.IGNORECASE
)


def _capital_word_frequency(capital_relation: str, capital_frequency: int) -> Check:
    holds = _compare(capital_relation, capital_frequency)
    return lambda text: holds(sum(word.isupper() for word in CAPITAL_WORD.findall(text)))


# ---- lengths -----------------------------------------------------------------------------------------------

# A sentence ends with a mark, closing quotes and brackets after it, and a gap
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]*_]*\s+(?=\S)")
INITIAL = re.compile(r"(?:^|[\s(\"“])[A-Z]\.$")
ABBREVIATION = re.compile(
    r"(?:^|[\s(\"“])(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|inc|ltd|co|fig|vol"
    r"|jan|feb|mar|apr|aug|sept?|oct|nov|dec)\.$",
    re.IGNORECASE,
)


def sentences(text: str) -> list[str]:
    """Cut after a full stop, question or exclamation mark that a gap follows; after a stop not before a small
    letter, nor where it ends an initial or a common abbreviation, after dots only before a capital.
    """
    parts = []
    start = 0
    for gap in SENTENCE_END.finditer(text):
        before, after = text[start : gap.start()], text[gap.end()]
        if before.endswith(".") and (after.islower() or _is_short(before, after)):
            continue
        parts.append(text[start : gap.end()].strip())
        start = gap.end()
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def _is_short(before: str, after: str) -> bool:
    """Whether the stop at the end of `before` belongs to a shortened word, or to dots that go on."""
    if before.endswith(".."):
        return not after.isupper()
    return INITIAL.search(before) is not None or ABBREVIATION.search(before) is not None


def _number_sentences(relation: str, num_sentences: int) -> Check:
    holds = _compare(relation, num_sentences)
    return lambda text: holds(len(sentences(text)))


def _number_words(relation: str, num_words: int) -> Check:
    holds = _compare(relation, num_words)
    return lambda text: holds(len(re.findall(r"\w+", text)))


def _number_paragraphs(num_paragraphs: int) -> Check:
    """Paragraphs are what stands between dividers of three asterisks."""

    def check(text: str) -> bool:
        parts = [bool(part.strip()) for part in re.split(DIVIDER, text)]
        return all(parts[1:-1]) and sum(parts) == num_paragraphs

    return check


def _nth_paragraph_first_word(num_paragraphs: int, nth_paragraph: int, first_word: str) -> Check:
    """Paragraphs are what stands between empty lines; an empty one counts for the place, not for the sum."""
    wanted = first_word.lower()

    def check(text: str) -> bool:
        paragraphs = text.split("\n\n")
        filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
        if filled != num_paragraphs or nth_paragraph > filled:
            return False
        words = paragraphs[nth_paragraph - 1].split()
        if not words:
            return False
        return re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"').lower())[0] == wanted

    return check


# ---- content and format ------------------------------------------------------------------------------------


def _number_placeholders(num_placeholders: int) -> Check:
    return lambda text: len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(postscript_marker: str) -> Check:
    """A marker such as P.P.S may be written with gaps."""
    marker = postscript_marker.strip().lower()
    spelled = re.fullmatch(r"(\w\.)+\w?", marker)
    parts = re.findall(r"\w\.?", marker) if spelled else [marker]
    pattern = re.compile(r"\s?".join(re.escape(part) for part in parts))
    return lambda text: pattern.search(text.lower()) is not None


def _constrained_response() -> Check:
    return lambda text: any(answer in text for answer in ANSWERS)


def _json_format() -> Check:
    def check(text: str) -> bool:
        bare = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```")
        try:
            json.loads(bare.strip())
        except (ValueError, RecursionError):
            return False
        return True

    return check


def _multiple_sections(section_spliter: str, num_sections: int) -> Check:
    heading = re.compile(rf"{re.escape(section_spliter.strip())}\s?\d+")
    return lambda text: len(heading.findall(text)) >= num_sections


def _number_bullet_lists(num_bullets: int) -> Check:
    bullet = re.compile(r"^\s*(?:\*[^*]|-).*$", re.MULTILINE)
    return lambda text: len(bullet.findall(text)) == num_bullets


def _number_highlighted_sections(num_highlights: int) -> Check:
    """Of *one* and **two** asterisks."""

    def check(text: str) -> bool:
        marked = re.findall(r"\*([^\n*]*)\*", text) + re.findall(r"\*\*([^\n*]*)\*\*", text)
        return sum(bool(words.strip()) for words in marked) >= num_highlights

    return check


def _title() -> Check:
    return lambda text: any(title.strip("<> \t") for title in re.findall(r"<<[^\n]+>>", text))


# ---- the answer as a whole ---------------------------------------------------------------------------------


def _repeat_prompt(prompt_to_repeat: str) -> Check:
    wanted = prompt_to_repeat.strip().lower()
    return lambda text: text.strip().lower().startswith(wanted)


def _two_responses() -> Check:
    def check(text: str) -> bool:
        parts = [part.strip() for part in text.split(BETWEEN_ANSWERS)]
        answers = [part for part in parts if part]
        return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]

    return check


def _end_checker(end_phrase: str) -> Check:
    wanted = end_phrase.strip().lower()
    return lambda text: text.strip().strip('"').lower().endswith(wanted)


def _quotation() -> Check:
    return lambda text: re.fullmatch(r'\s*".*"\s*', text, re.DOTALL) is not None


def _no_comma() -> Check:
    return lambda text: "," not in text


KINDS: dict[str, Callable[..., Check]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
