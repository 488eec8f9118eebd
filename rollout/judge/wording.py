"""What a judge's words hold: the JSON object inside its wrapping, and whether a quote is what was said."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

_DECODER = json.JSONDecoder(strict=False)  # models leave line breaks inside of strings
_END_OF_THOUGHT = re.compile(r"</think(?:ing)?>|</reasoning>|\[/THINK\]|<\|channel\|>final<\|message\|>")
_THOUGHT = re.compile(r"\s*<think(?:ing)?>|\s*\[THINK\]")
_ALIKE = str.maketrans(
    {
        **dict.fromkeys('‘’‚‛′‵ʼʹˈ`´"“”„‟″‶«»‹›〝〞「」『』', "'"),  # '"yes"' is quoted as "'yes'"
        **dict.fromkeys("‐‑‒–—―−⁃﹘", "-"),
    }
)
_APOSTROPHE = re.compile(r"'(?:s|t|d|m|re|ve|ll)\b", re.IGNORECASE)
# Thai to Khmer, kana, Chinese characters: scripts that put no spaces between words.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
)


def find_object(content: str) -> dict[str, Any]:
    """The JSON object in `content`, whatever stands around it; of several that differ, none is the answer.
    ValueError: there is none.
    """
    text = content.strip("\ufeff \t\r\n")
    try:
        whole = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        fault = error
    else:
        if isinstance(whole, dict):
            return whole
        raise ValueError("the answer is no JSON object")
    objects = _objects(spoken(text))
    if not objects:
        raise ValueError(f"the answer is not JSON: {fault}")
    if any(other != objects[0] for other in objects):
        raise ValueError(f"the answer has {len(objects)} JSON objects that differ: accepted is one")
    return objects[0]


def _objects(text: str) -> list[dict[str, Any]]:
    objects = []
    at = text.find("{")
    while at >= 0:
        try:
            value, end = _DECODER.raw_decode(text, at)
            objects.append(value)
        except RecursionError:
            return []
        except ValueError:  # a brace of the prose, or an object that was cut
            end = at + 1
        at = text.find("{", end)
    return objects


def spoken(content: str) -> str:
    """`content` without the thinking before it. ValueError: it is thinking without an end."""
    ends = [match.end() for match in _END_OF_THOUGHT.finditer(content)]
    if ends:
        return content[ends[-1] :]
    if _THOUGHT.match(content):
        raise ValueError("the answer is thinking without an end")
    return content


def occurs(quote: str, text: str) -> bool:
    """Whether somebody who reads `text` finds `quote` in it: typography, white space and the marks at the
    ends do not count, words and case do, and words are whole.
    """
    wanted, said = _fold(quote), _fold(text)
    start, end = 0, len(wanted)
    while start < end and _is_mark(wanted[start]):
        start += 1
    while start < end and _is_mark(wanted[end - 1]):
        end -= 1
    wanted = wanted[start:end].strip() or wanted
    return bool(wanted) and any(
        not _joined(said, match.start()) and not _joined(said, match.start() + len(wanted))
        for match in re.finditer(f"(?={re.escape(wanted)})", said)
    )


def _joined(text: str, at: int) -> bool:
    """Whether a word goes on across `at`, as "agree" in "disagree" and "can" in "can't"."""
    before, after = text[:at], text[at:]
    inside = before[-1:].isalnum() and (after[:1].isalnum() or _APOSTROPHE.match(after))
    return bool(inside) and not _UNSPACED.search(before[-1:] + after[:1])


def _fold(text: str) -> str:
    """Variants of one character are one: NFKC, then quotes, dashes and ellipses of one kind."""
    text = unicodedata.normalize("NFKC", text.translate(_ALIKE)).translate(_ALIKE)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    for several, one in ((r"'+", "'"), (r"\.{2,}", "..."), (r"\s*-[\s-]*", "-")):
        text = re.sub(several, one, text)
    return " ".join(text.split())


def _is_mark(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")


def writable(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair, which no file takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
