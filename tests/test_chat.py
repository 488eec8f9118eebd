"""Chat fragments against transformers' `apply_chat_template`, and the templates that are refused.

The templates are our own; each re-creates the behaviour of a known kind, named in its comment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from duologue.grpo.imitation import demonstration_rows
from duologue.model.chat import Chat
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.games.scripted import ScriptedDialogue
from tiny import all_text

Make = Callable[..., tuple[Tokenizer, Any]]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]

# Turns between markers, a default system turn, tools: as Qwen2.5.
QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' + (tools | tojson) }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('user', 'system') or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Headers, bos, trimmed contents, a date with a fixed one to fall back on: as Llama 3.
LLAMA3 = """\
{{- bos_token }}
{%- if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}
{%- else %}{% set today = '26 Jul 2024' %}{% endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'system' and DATED %}{{- 'Today: ' + today + '\\n\\n' }}{% endif %}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# An empty thought stands before a reply when thinking is off, and thoughts leave the turns that others
# follow: as Qwen3.
QWEN3 = """\
{%- for message in messages %}
    {%- set thought = '<think>\\n\\n</think>\\n\\n' if message.role == 'assistant' and loop.last else '' %}
    {{- '<|im_start|>' + message.role + '\\n' + thought }}
    {{- message.content.split('</think>')[-1] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# The same switch, but thoughts stay where they were: append-only.
THOUGHTS_STAY = QWEN3.replace("and loop.last else", "and enable_thinking is false else")
# Our own words between tags that other trainers mark, and a text of plain characters as marker.
TAGGED = """\
{% for message in messages %}
{% if message.role == 'assistant' %}
### assistant
{% generation %}{{ message.content }}<|im_end|>
{% endgeneration %}
{% else %}
### {{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
### assistant
{% endif %}
"""
# The end of a turn is the tokenizer's eos, after a space.
SPACED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '\\n' + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
GOOD: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "qwen2.5": (CHATML, QWEN25, {"eos_token": "<|im_end|>"}),
    "llama3": (
        HEADERS,
        LLAMA3.replace("DATED", "false"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "thoughts-stay": (CHATML, THOUGHTS_STAY, {"eos_token": "<|im_end|>"}),
    "tagged": (CHATML, TAGGED, {"eos_token": "<|endoftext|>"}),
    "spaced": (CHATML, SPACED, {"eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"}}),
}
CONTENTS = ["take the 2 hats", "No.", "café, naïve?", "1", "(the books)\nor the hats", "'s a deal"]


def conversations() -> Iterator[list[tuple[str, str]]]:
    """Any order of up to four turns after the system turn, with changing contents."""
    for n in range(5):
        for k, roles in enumerate(product(("user", "assistant"), repeat=n)):
            if ("assistant", "assistant") not in pairwise(roles):
                yield [(role, CONTENTS[(i + k) % len(CONTENTS)]) for i, role in enumerate(("system", *roles))]


def ours(tokenizer: Tokenizer, conversation: list[tuple[str, str]]) -> list[int]:
    chat, (_, system) = tokenizer.chat, conversation[0]
    ids = chat.open(tokenizer.encode(system))
    for role, text in conversation[1:]:
        content = tokenizer.encode(text)
        ids += (
            chat.heard(content)
            if role == "user"
            else chat.reply() + content + chat.close_reply(stopped=False)
        )
    return ids


@pytest.mark.parametrize("name", GOOD)
def test_ids_equal_apply_chat_template(name: str, tokenizer_pair: Make) -> None:
    special, template, settings = GOOD[name]
    tokenizer, theirs = tokenizer_pair(special, template, **settings)
    n = 0
    for conversation in conversations():
        messages = [{"role": role, "content": text} for role, text in conversation]
        for generate in {False, messages[-1]["role"] != "assistant"}:
            expected = theirs.apply_chat_template(
                messages, add_generation_prompt=generate, enable_thinking=False, return_dict=False
            )
            assert ours(tokenizer, conversation) + tokenizer.chat.reply() * generate == expected
            n += 1
    assert n > 25


def real_template(name: str) -> str:
    """The model's own, of which trl has a copy. Imported here: without trl the other tests still run."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


FROM_MODELS = {
    "qwen3": (CHATML, {"eos_token": "<|im_end|>"}),
    "qwen3_instruct_2507": (CHATML, {"eos_token": "<|im_end|>"}),
    "qwen2_5": (CHATML, {"eos_token": "<|im_end|>"}),
    "llama3": (HEADERS, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "llama3_1": (HEADERS, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
}


@pytest.mark.parametrize("name", FROM_MODELS)
def test_contexts_written_anew_equal_apply_chat_template(name: str, tokenizer_pair: Make) -> None:
    """With the templates of real models, thinking off: every context that a turn can be sampled from."""
    special, settings = FROM_MODELS[name]
    tokenizer, theirs = tokenizer_pair([*special, "<think>", "</think>"], real_template(name), **settings)
    chat, n = tokenizer.turn_chat, 0
    for conversation in conversations():
        if conversation[-1][0] == "assistant":
            continue
        ids = chat.open(tokenizer.encode(conversation[0][1]))
        for role, text in conversation[1:]:
            ids += chat.heard(tokenizer.encode(text)) if role == "user" else chat.said(tokenizer.encode(text))
        messages = [{"role": role, "content": text} for role, text in conversation]
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        assert ids + chat.reply() == expected
        n += 1
    assert n > 10
    alone = [{"role": "user", "content": "Good morning."}]  # whose system turn is the template's own
    assert chat.question(tokenizer.encode("Good morning.")) == theirs.apply_chat_template(
        alone, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    if name == "qwen3":
        assert all_text(tokenizer, chat.reply()).endswith("<think>\n\n</think>\n\n")
        with pytest.raises(ValueError, match=r"rewrites turn 2: .*think.*append-only"):
            _ = tokenizer.chat
    else:
        assert tokenizer.chat.reply() == chat.reply()


@pytest.mark.parametrize(
    ("name", "end", "stops", "after"),
    [
        ("qwen2.5", "<|im_end|>", {"<|im_end|>"}, "\n"),
        ("llama3", "<|eot_id|>", {"<|eot_id|>"}, ""),
        ("tagged", "<|im_end|>", {"<|im_end|>", "<|endoftext|>"}, "\n"),
        ("spaced", "<|endoftext|>", {"<|endoftext|>"}, "\n"),
    ],
)
def test_a_sampled_stop_token_is_not_repeated(
    name: str, end: str, stops: set[str], after: str, tokenizer_pair: Make
) -> None:
    special, template, settings = GOOD[name]
    tokenizer, theirs = tokenizer_pair(special, template, **settings)
    chat = tokenizer.chat
    assert chat.stop_token_ids == set(theirs.convert_tokens_to_ids(list(stops)))
    assert chat.end_token_id == theirs.convert_tokens_to_ids(end)
    closing, rest = chat.close_reply(stopped=False), chat.close_reply(stopped=True)
    assert all_text(tokenizer, rest) == after
    assert closing[len(closing) - len(rest) - 1 :] == [chat.end_token_id, *rest]


def test_fragments_are_not_shared(tokenizer_pair: Make) -> None:
    """A caller may append to what it gets."""
    special, template, settings = GOOD["qwen2.5"]
    chat = tokenizer_pair(special, template, **settings)[0].chat
    for get in (
        chat.reply,
        lambda: chat.close_reply(True),
        lambda: chat.close_reply(False),
        lambda: chat.heard([]),
    ):
        before = list(get())
        get().append(0)
        assert get() == before


def test_contents_go_in_as_they_are(tokenizer_pair: Make) -> None:
    """Whitespace around a content and special tokens written in it stay, even where the template trims."""
    special, template, settings = GOOD["llama3"]
    tokenizer, _ = tokenizer_pair(special, template, **settings)
    content = tokenizer.encode("  two <|eot_id|>\n ")
    turn = tokenizer.chat.heard(content)
    at = next(i for i in range(len(turn)) if turn[i : i + len(content)] == content)
    assert tokenizer.chat.heard([]) == turn[:at] + turn[at + len(content) :]
    assert tokenizer.decode(turn) == "user\n\n  two <|eot_id|>\n "


def test_a_date_falls_back_to_the_fixed_one(tokenizer_pair: Make) -> None:
    tokenizer, _ = tokenizer_pair(
        HEADERS, LLAMA3.replace("DATED", "true"), eos_token="<|eot_id|>", bos_token="<|begin_of_text|>"
    )
    assert "Today: 26 Jul 2024" in tokenizer.decode(tokenizer.chat.open([]))


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REFUSED = {
    "history loses its thoughts": (QWEN3, r"rewrites turn 2: .*think"),
    "turns are counted": (
        "{{ messages | length }} turns\n" + LOOP + PROMPT,
        "rewrites turn 0: what stood as '1 turns.* stands as '2 turns",
    ),
    "turns are numbered": (
        LOOP.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}") + PROMPT,
        "rewrites turn 2",
    ),
    "the last turn is marked": (
        LOOP.replace("<|im_end|>", "{{ ' (last)' if loop.last }}<|im_end|>") + PROMPT,
        "rewrites turn 0",
    ),
    "a hint stands before the last user turn": (
        LOOP.replace("{{ m.content }}", "{{ 'Now: ' if loop.last and m.role == 'user' }}{{ m.content }}")
        + PROMPT,
        "rewrites turn 1",
    ),
    "old turns are dropped": (
        "{% set messages = [messages[0]] + messages[1:][-2:] %}" + LOOP + PROMPT,
        "rewrites turn 1: what stood as .*m1zqx.* stands as .*m4zqx",
    ),
    "a reply is closed only at the end": (
        LOOP.replace("<|im_end|>", "{{ '<|im_end|>' if m.role != 'assistant' or loop.last }}") + PROMPT,
        "rewrites turn 2",
    ),
    "the prompt depends on who spoke": (
        LOOP + PROMPT.replace("assistant\n", "assistant\n{{ 'First:' if messages | length == 1 }}"),
        "rewrites turn",
    ),
    "today's date": ("{{ strftime_now('%Y') }}" + LOOP + PROMPT, "it asks for today's date"),
    "no system turn": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + LOOP
        + PROMPT,
        "does not take the turns system: System role not supported. accepted is a template that takes a "
        "system turn",
    ),
    "the system turn is left out": (
        LOOP.replace("in messages", "in messages if m.role != 'system'") + PROMPT,
        "writes the content of the system turn 0 times, not once",
    ),
    "the user must speak first": (
        "{% for m in messages[1:] %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate, user first') }}{% endif %}{% endfor %}" + LOOP + PROMPT,
        "the turns system, assistant: Roles must alternate, user first. accepted is .* either side may speak "
        "first",
    ),
    "no generation prompt": (LOOP, "no generation prompt"),
    "a content twice": (
        LOOP.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}") + PROMPT,
        "system turn 2 times",
    ),
    "a finished reply begins otherwise": (
        LOOP + PROMPT + "{% if add_generation_prompt %}Sure: {% endif %}",
        "rewrites turn 2",
    ),
    "a thought in finished replies only": (
        LOOP.replace("{{ m.content }}", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}")
        + PROMPT,
        "'<think></think>' stands before a finished reply, but not in the generation prompt",
    ),
    "no syntax": ("{% for m in messages %}", "the chat template is not valid"),
    "no such value": (LOOP + PROMPT + "{{ nothing.there }}", "'nothing' is undefined"),
    "an unsafe one": (LOOP + PROMPT + "{{ ''.__class__.__mro__ }}", "unsafe"),
    "no boundary before the content": (
        (LOOP + PROMPT).replace("\n{", " {"),
        "joins the end of '<.im_start.>system ' .* in one token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fragments_cannot_stand_for_is_refused(name: str, tokenizer_pair: Make) -> None:
    template, message = REFUSED[name]
    tokenizer, _ = tokenizer_pair(CHATML, template, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=message):
        _ = tokenizer.chat


def test_a_template_without_an_end_of_turn_is_refused(tokenizer_pair: Make) -> None:
    template = LOOP.replace("<|im_end|>", "") + PROMPT
    without, _ = tokenizer_pair(CHATML, template)
    with pytest.raises(ValueError, match="no token ends a reply"):
        _ = without.chat
    with_eos, _ = tokenizer_pair(CHATML, template, eos_token="<|endoftext|>")
    chat = with_eos.chat
    assert chat.stop_token_ids == {with_eos.eos_token_id}
    assert chat.close_reply(True) == chat.close_reply(False) == with_eos.encode("\n")


def test_ids_that_depend_on_their_place_are_refused() -> None:
    """A tokenizer that gives the same piece other ids in the middle of a conversation."""

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = [*re.finditer(r"m\dzqx|.", text, re.DOTALL)]
        ids = [500 + m.start() // 100 if m.group() == "A" else ord(m.group()[0]) for m in found]
        return ids, [m.span() for m in found]

    template = (
        "{% for m in messages %}{{ m.role[0] | upper }}{{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}"
    )
    Chat(template, {}, encode, [46], [])
    long = template.replace("{{ m.content }}", "{{ m.content }}" + "-" * 60)
    with pytest.raises(
        ValueError, match="the tokenizer gives 'A' of the chat template other ids in other places"
    ):
        Chat(long, {}, encode, [46], [])


def test_an_imitated_turn_ends_as_the_template_ends_it() -> None:
    """Of several ids that may stop a reply, as Qwen2.5 and Llama 3 have them: not the lowest."""
    core = tokenizers.Tokenizer.from_str(train_tokenizer(["say one word or two"] * 4, 300)._core.to_str())
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    template = (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    other, end = core.token_to_id("<|endoftext|>"), core.token_to_id("<|im_end|>")
    assert other < end
    tokenizer = Tokenizer(core, {"eos_token": "<|im_end|>"}, template, eos=[end, other])
    scenario = Scenario(game="x", id="1", split="train", private_text=("say one", "say two"), data=None)
    script = ScriptedDialogue(
        scenario=scenario,
        first_speaker=0,
        temperaments=("", ""),
        turns=[(0, "one", "utterance"), (1, "two", "utterance")],
        outcome=Outcome(agreed=True, scores=(0.0, 0.0)),
        final_prompt="",
    )
    for row, word in zip(demonstration_rows(script, tokenizer, 0), ("one", "two"), strict=True):
        trained = [token for token, is_own in zip(row.token_ids, row.loss_mask, strict=True) if is_own]
        assert trained == [*tokenizer.encode(word), end]
        assert other not in row.token_ids
