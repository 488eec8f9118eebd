"""Prompts whose instructions can be checked: read from a file in IFEval's format, or our own from templates.

A line of such a file is an object with `key`, `prompt`, `instruction_id_list` and `kwargs`, the arguments of
each instruction. Our own prompts have the same 25 kinds, each as often; every third has two instructions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duologue.grpo.ability.instructions import KINDS, Check, can_check, check_for
from duologue.rollout.games.texts import read_text

OWN = 150
Arguments = Mapping[str, Any]
Template = Callable[[random.Random, str], tuple[str, Arguments]]  # of a task: an instruction in words


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What is asked, and one check for each of its instructions."""

    key: int
    text: str
    kinds: tuple[str, ...]
    given: tuple[Arguments, ...]
    checks: tuple[Check, ...] = ()  # none where one of them needs what is not installed

    @classmethod
    def of(cls, key: int, text: str, kinds: list[str], given: list[Arguments]) -> Prompt:
        checks = tuple(check_for(kind, arguments) for kind, arguments in zip(kinds, given, strict=True))
        kept = checks if all(can_check(kind) for kind in kinds) else ()
        return cls(key=key, text=text, kinds=(*kinds,), given=(*given,), checks=kept)


def read_prompts(path: Path) -> list[Prompt]:
    """All of a file. ValueError names the line that is not in the format."""
    if not path.is_file():
        raise ValueError(f"eval.ifeval = {str(path)!r}: accepted is a .jsonl file in IFEval's format")
    prompts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key, text, kinds = row["key"], row["prompt"], row["instruction_id_list"]
            if not isinstance(text, str) or not isinstance(kinds, list) or not kinds:
                raise ValueError("its prompt is no text, or its instruction_id_list no list with one or more")
            prompts.append(Prompt.of(int(key), text, kinds, row["kwargs"]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            accepted = "an object with key, prompt, instruction_id_list and kwargs, as IFEval has them"
            raise ValueError(f"{path}, line {number}: {what}; accepted is {accepted}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def own_prompts(n: int = OWN) -> list[Prompt]:
    """The first `n` of ours: the kinds in turn; tasks, words and numbers follow from the place."""
    prompts = []
    kinds = [*KINDS]
    for key in range(n):
        rng = random.Random(key)
        kind = kinds[key % len(kinds)]
        chosen = [kind]
        if key % 3 == 0 and kind in FREE:
            chosen.append(rng.choice([other for other in FREE if other != kind]))
        tasks = QUESTIONS if kind == "detectable_format:constrained_response" else TASKS
        task = tasks[(key % len(kinds) + 5 * (key // len(kinds))) % len(tasks)]
        said = [TEMPLATES[one](rng, task) for one in chosen]
        text = " ".join([task, *(words for words, _ in said)])
        prompts.append(Prompt.of(key, text, chosen, [arguments for _, arguments in said]))
    return prompts


# ---- what is asked -----------------------------------------------------------------------------------------

TASKS = (
    "Describe a lighthouse in winter.",
    "Write a short note to a neighbour about a borrowed ladder.",
    "Explain why bread rises.",
    "Tell a short story about a dog that is afraid of the sea.",
    "Give advice to somebody who starts a vegetable garden.",
    "Describe how to mend a bicycle tyre.",
    "Write an invitation to a small concert in a barn.",
    "Explain to a child why leaves fall in autumn.",
    "Recommend a way to spend a rainy Sunday.",
    "Write a speech of thanks for a retiring postman.",
    "Describe the market of a small town on a Saturday morning.",
    "Explain how a seesaw balances.",
    "Write a complaint about a train that came two hours late.",
    "Tell how a clock maker might spend her day.",
    "Compare living by a river with living on a hill.",
    "Write a diary entry of a sailor whose ship is becalmed.",
    "Explain how to keep a houseplant alive in a dark flat.",
    "Describe a meal that somebody cooked for the first time.",
    "Write an advertisement for an old piano.",
    "Explain why the moon seems to change its shape.",
    "Tell about a quarrel over a fence and how it ended.",
    "Describe what one hears in a forest at night.",
)
QUESTIONS = (
    "Is a whale a fish?",
    "Can a loaf of bread be baked without yeast?",
    "Is the sea colder in spring than in autumn?",
    "Does a heavier stone fall faster than a light one?",
    "Will it be sunny on the first of May?",
    "Do bees sleep?",
)
WORDS = ("window", "copper", "patience", "harbour", "seven", "garden", "quiet", "bridge", "letter", "morning")
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese"}
CLOSINGS = ("That is all I know.", "Now it is your turn.", "Thank you for listening.", "Sleep well!")
FREE = (  # kinds that leave room for each other in one answer
    "keywords:existence",
    "keywords:frequency",
    "detectable_content:number_placeholders",
    "detectable_format:number_highlighted_sections",
    "detectable_format:title",
    "punctuation:no_comma",
)


def _existence(rng: random.Random, task: str) -> tuple[str, Arguments]:
    words = rng.sample(WORDS, 2)
    return f"Use the words {words[0]} and {words[1]}.", {"keywords": words}


def _frequency(rng: random.Random, task: str) -> tuple[str, Arguments]:
    word, n = rng.choice(WORDS), rng.randint(2, 4)
    given = {"relation": "at least", "keyword": word, "frequency": n}
    return f"The word {word} should occur {n} times or more.", given


def _forbidden_words(rng: random.Random, task: str) -> tuple[str, Arguments]:
    words = rng.sample(("the", "very", "is", "and", "it", "you"), 2)
    return f"Do without the words {words[0]} and {words[1]}.", {"forbidden_words": words}


def _letter_frequency(rng: random.Random, task: str) -> tuple[str, Arguments]:
    letter, n = rng.choice("bkvwz"), rng.randint(4, 9)
    given = {"let_relation": "less than", "letter": letter, "let_frequency": n}
    return f"The letter {letter} should occur fewer than {n} times.", given


def _language(rng: random.Random, task: str) -> tuple[str, Arguments]:
    code = rng.choice([*LANGUAGES])
    return f"Answer in {LANGUAGES[code]} and in no other language.", {"language": code}


def _sentences(rng: random.Random, task: str) -> tuple[str, Arguments]:
    n = rng.randint(3, 6)
    return f"Write fewer than {n} sentences.", {"relation": "less than", "num_sentences": n}


def _paragraphs(rng: random.Random, task: str) -> tuple[str, Arguments]:
    n = rng.randint(2, 4)
    words = f"Write {n} paragraphs, with a line of three asterisks (***) between one and the next."
    return words, {"num_paragraphs": n}


def _words(rng: random.Random, task: str) -> tuple[str, Arguments]:
    if rng.random() < 0.5:
        n = rng.randrange(30, 80, 10)
        return f"Write fewer than {n} words.", {"relation": "less than", "num_words": n}
    n = rng.randrange(60, 120, 10)
    return f"Write {n} words or more.", {"relation": "at least", "num_words": n}


def _first_word(rng: random.Random, task: str) -> tuple[str, Arguments]:
    n, word = rng.randint(2, 3), rng.choice(WORDS)
    nth = rng.randint(1, n)
    words = f"Write {n} paragraphs with an empty line between them; number {nth} begins with the word {word}."
    return words, {"num_paragraphs": n, "nth_paragraph": nth, "first_word": word}


def _placeholders(rng: random.Random, task: str) -> tuple[str, Arguments]:
    n = rng.randint(2, 4)
    words = f"Leave {n} or more gaps to be filled in later, each in square brackets, such as [name]."
    return words, {"num_placeholders": n}


def _postscript(rng: random.Random, task: str) -> tuple[str, Arguments]:
    marker = rng.choice(("P.S.", "P.P.S"))
    return f"Add a postscript at the end that begins with {marker}", {"postscript_marker": marker}


def _bullets(rng: random.Random, task: str) -> tuple[str, Arguments]:
    n = rng.randint(2, 5)
    words = f"Make it {n} points exactly, each on a line of its own that begins with an asterisk and a space."
    return words, {"num_bullets": n}


def _constrained(rng: random.Random, task: str) -> tuple[str, Arguments]:
    return 'Say "My answer is yes.", "My answer is no." or "My answer is maybe."', {}


def _highlighted(rng: random.Random, task: str) -> tuple[str, Arguments]:
    n = rng.randint(1, 3)
    return f"Put asterisks around {n} or more passages, *such as this one*.", {"num_highlights": n}


def _sections(rng: random.Random, task: str) -> tuple[str, Arguments]:
    n, name = rng.randint(2, 3), rng.choice(("Section", "PART"))
    words = f"Divide it into {n} parts and head them {name} 1, {name} 2 and so on."
    return words, {"section_spliter": name, "num_sections": n}


def _repeat(rng: random.Random, task: str) -> tuple[str, Arguments]:
    words = "But first repeat the sentence before this one word for word, without a word ahead of it."
    return words, {"prompt_to_repeat": task}


def _end(rng: random.Random, task: str) -> tuple[str, Arguments]:
    phrase = rng.choice(CLOSINGS)
    return f"The last words should be: {phrase} Nothing comes after them.", {"end_phrase": phrase}


def _capital_words(rng: random.Random, task: str) -> tuple[str, Arguments]:
    n = rng.randint(2, 5)
    words = f"Write {n} words or more in capital letters only."
    return words, {"capital_relation": "at least", "capital_frequency": n}


def _always(words: str) -> Template:
    """An instruction without arguments."""
    return lambda rng, task: (words, {})


TEMPLATES: dict[str, Template] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlighted,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _always("The whole answer has to be valid JSON and nothing else."),
    "detectable_format:title": _always("Give it a title in double angle brackets, <<such as this>>."),
    "combination:two_responses": _always(
        "Give two different answers, with six asterisks (******) and nothing else between them."
    ),
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _always("Put the whole answer between double quotation marks."),
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _always("Write in English and use nothing but capital letters."),
    "change_case:english_lowercase": _always("Write in English and use nothing but small letters."),
    "punctuation:no_comma": _always("Use no comma at all."),
}
