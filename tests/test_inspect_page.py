"""The page of `duologue inspect` in a real Chromium: clicks, filters, keys, colours, names, and that no text
of a run becomes markup. Skipped where there is no Chromium, or no playwright to drive it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from duologue.grpo.commands.inspector import write_page
from duologue.grpo.commands.same_contexts import compare
from duologue.grpo.config import load_config
from duologue.grpo.run_dir import read_lines
from duologue.model.checkpoint import save_model
from duologue.model.tokenizer import Tokenizer
from tiny import TINY_DEAL, decoder

from bench.inspect_page import GROUP, GROUPS, make_run

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("no Chromium here", allow_module_level=True)

PATIENCE_MS = 240_000  # with a machine that does much else
COUNT = 300  # dialogues: three parts, three steps
HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & <b>"
)
ALTERED = 150  # the dialogue of that text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("page") / "run", COUNT)
    records = read_lines(path / "dialogues.jsonl")
    row = records[ALTERED]
    row["turns"][0] |= {"text": HOSTILE, "token_ids": [], "logprobs": None}
    row["scenario"]["private"][0] = HOSTILE
    row["outcome"] |= {"agreed": False, "failure": HOSTILE}
    records[0]["asked"] = [
        {"kind": "agreement", "turns": 2, "answer": {"agreed": True, "note": HOSTILE}, "seconds": 1.25},
        {"kind": "score", "turns": 3, "answer": None, "seconds": 0.5},
    ]
    records[1] |= {"reward": None, "advantage": None, "outcome": None}
    records[2]["players"] = ["policy", "pool"]
    lines = (json.dumps(record) + "\n" for record in records)
    (path / "dialogues.jsonl").write_text("".join(lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def records(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / "dialogues.jsonl")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], timeout=PATIENCE_MS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(run: Path) -> str:
    write_page(run, run / "inspect.html")
    return (run / "inspect.html").resolve().as_uri()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, just opened; whatever it loads or fails at fails the test."""
    tab = browser.new_page(viewport={"width": 1400, "height": 900})
    tab.set_default_timeout(PATIENCE_MS)
    asked: list[str] = []
    faults: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.goto(address)
    tab.wait_for_selector("html[data-ready]")
    yield tab
    assert faults == []
    assert [url for url in asked if not url.startswith(("file:", "blob:"))] == []
    tab.close()


def wait_for(page: Any, dialogue: int) -> None:
    """Until this dialogue is shown, and chosen in the list."""
    page.wait_for_selector(f"#row-{dialogue}[aria-selected=true]")


def count(page: Any, text: str) -> None:
    page.wait_for_selector(f"#count:text-is('{text}')")


def number(page: Any, key: str) -> float:
    """What the token's panel has in full of a measure."""
    return float(page.inner_text(f"#token dd[data-key='{key}'] small"))


def test_keys_go_through_dialogues_groups_and_tokens(page: Any, records: list[dict[str, Any]]) -> None:
    for key, dialogue in (("j", 1), ("ArrowDown", 2), ("k", 1), ("g", GROUP), ("g", 2 * GROUP), ("G", GROUP)):
        page.keyboard.press(key)
        wait_for(page, dialogue)
    page.focus("#list")
    page.keyboard.press("End")
    wait_for(page, COUNT - 1)
    assert page.evaluate("document.activeElement.getAttribute('aria-activedescendant')") == f"row-{COUNT - 1}"
    page.keyboard.press("Home")
    wait_for(page, 0)
    turn = records[0]["turns"][0]
    for i, logprob in enumerate(turn["logprobs"]):
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#token dd[data-key=id]").split("\n")[0] == str(turn["token_ids"][i])
        assert number(page, "log-prob") == logprob
        assert np.float32(number(page, "entropy")) == np.float32(turn["entropies"][i])
        assert number(page, "advantage") == np.float32(records[0]["advantage"][turn["role"]])
        size = turn["support_sizes"][i]
        words = "all tokens" if size == 0 else "1 token" if size == 1 else f"{size} tokens"
        assert page.inner_text("#token dd[data-key=support]") == words
        assert page.inner_text("#token dd[data-key=trained]") == "yes"
        assert page.inner_text("#token dd[data-key='weights version']") == str(records[0]["weights_version"])
    page.keyboard.press("ArrowLeft")
    assert number(page, "log-prob") == turn["logprobs"][-2]
    assert "log-prob" in page.inner_text("#said")  # a screen reader hears it


def test_a_filter_leaves_what_the_records_say(page: Any, records: list[dict[str, Any]]) -> None:
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("HONESTLY")
    said = [
        i for i, r in enumerate(records) if any("honestly" in turn["text"].lower() for turn in r["turns"])
    ]
    assert 0 < len(said) < COUNT
    count(page, f"{len(said)} dialogues of {COUNT}")
    page.select_option("#where", "1")
    second = [
        i
        for i, r in enumerate(records)
        if any("honestly" in turn["text"] for turn in r["turns"] if turn["role"] == 1)
    ]
    assert second != said
    count(page, f"{len(second)} dialogues of {COUNT}")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("Home")
    wait_for(page, second[0])
    page.keyboard.press("j")
    wait_for(page, second[1])
    page.click("button[type=reset]")
    count(page, f"{COUNT} dialogues")


def test_outcome_side_reward_step_and_order(page: Any, records: list[dict[str, Any]]) -> None:
    agreed = [bool((r["outcome"] or {}).get("agreed")) for r in records]
    page.select_option("#outcome", "+")
    count(page, f"{sum(agreed)} dialogues of {COUNT}")
    steps = sorted({r["step"] for r in records})
    page.select_option("#step", label=f"step {steps[1]}")
    there = [i for i, r in enumerate(records) if agreed[i] and r["step"] == steps[1]]
    assert 0 < len(there) <= GROUP * GROUPS
    count(page, f"{len(there)} dialogues of {COUNT}")
    page.fill("#number", "2")
    second = [i for i in there if (i - GROUP * GROUPS) // GROUP == 1]
    count(page, f"{len(second)} dialogues of {COUNT}")
    wait_for(page, second[0])
    page.click("button[type=reset]")
    count(page, f"{COUNT} dialogues")
    page.select_option("#players", "policy and pool")
    count(page, f"1 dialogue of {COUNT}")
    wait_for(page, 2)
    theirs = records[2]["turns"].index(next(turn for turn in records[2]["turns"] if turn["role"] == 1))
    page.click(f"#talk .say >> nth={theirs} >> .t >> nth=0")
    assert page.inner_text("#token dd[data-key=trained]") == "no\nsaid by pool, not by the policy"
    page.click("button[type=reset]")
    count(page, f"{COUNT} dialogues")
    page.select_option("#reward-of", "1")
    page.fill("#least", "0.5")
    rich = [r["reward"][1] for r in records if r["reward"] and r["reward"][1] >= 0.5]
    count(page, f"{len(rich)} dialogues of {COUNT}")
    runs = int(page.get_attribute("#count", "data-run"))
    page.select_option("#sort", "reward-down")
    page.wait_for_selector(f"#count[data-run='{runs + 1}']")
    page.focus("#list")
    page.keyboard.press("Home")
    page.wait_for_selector("#rows [aria-selected=true][aria-posinset='1']")
    assert f"{max(rich):.2f}" in page.inner_text("#facts dd >> nth=0")


def test_text_of_a_run_never_becomes_markup(page: Any) -> None:
    images = page.locator("img").count()
    page.keyboard.press("/")
    page.keyboard.type("document.title")
    count(page, f"1 dialogue of {COUNT}")
    wait_for(page, ALTERED)
    assert images == page.locator("img").count() == 0
    assert page.title() != "taken"
    for where in ("#told", "#talk", "#verdict", f"#row-{ALTERED}"):
        assert "</script><script>" in page.inner_text(where)
    page.keyboard.press("Escape")
    page.keyboard.press("s")
    page.wait_for_selector("#columns article:nth-of-type(8)")
    assert "</script><script>" in page.inner_text("#columns")
    assert page.locator("img").count() == 0


def test_the_group_the_judge_and_the_table(page: Any, records: list[dict[str, Any]]) -> None:
    assert page.locator("#members tbody tr").count() == GROUP
    judge = page.inner_text("#asked")
    assert "agreement, after 2 turns: waited 1.25 s" in judge
    assert '"agreed": true' in judge
    assert "no valid answer" in judge
    page.click("#members button >> nth=1")
    wait_for(page, 1)
    assert "no reward" in page.inner_text("#facts")
    assert page.is_hidden("#judge")
    page.click("#talk .t >> nth=0")
    assert page.inner_text("#token dd[data-key=trained]") == "no\nthe dialogue is unscored"
    page.keyboard.press("t")
    rows = page.locator("#tokens tbody tr")
    tokens = [x for turn in records[1]["turns"] for x in turn["logprobs"]]
    assert rows.count() == len(tokens)
    shown = [
        float(x.replace("\u2212", "-")) for x in page.locator("#tokens td:nth-child(5)").all_inner_texts()
    ]
    assert shown == [round(x, 5) for x in tokens]
    page.keyboard.press("s")
    page.wait_for_selector(f"#columns article:nth-of-type({GROUP})")
    assert page.locator("#columns .t").count() == sum(
        len(turn["token_ids"]) for r in records[:GROUP] for turn in r["turns"]
    )


def test_every_measure_colours_and_has_a_legend(page: Any) -> None:
    seen = {}
    for _ in range(6):
        page.keyboard.press("c")
        measure = page.input_value("#measure")
        colours = page.evaluate(
            "[...document.querySelectorAll('#talk .t')].map(t => getComputedStyle(t).background)"
        )
        seen[measure] = tuple(colours)
        assert page.locator("#legend .t").count() > 0
    assert seen.keys() == {"logprob", "entropy", "advantage", "trained", "support", "version"}
    assert len(set(seen["entropy"])) > 5
    assert seen["entropy"] != seen["logprob"]
    assert len(set(seen["version"])) == 1


def contrast(page: Any, selector: str) -> float:
    """Of the text's colour on the page behind it, by WCAG 2."""
    code = """(selector) => {
      const node = document.querySelector(selector);
      const parse = (text) => text.match(/[\\d.]+/g).map(Number);
      let behind = node;
      const paper = (x) => parse(getComputedStyle(x).backgroundColor);
      const opaque = (x) => paper(x).length < 4 || paper(x)[3] === 1;
      while (behind.parentElement && !opaque(behind)) behind = behind.parentElement;
      return [parse(getComputedStyle(node).color).slice(0, 3), paper(behind).slice(0, 3)];
    }"""

    def luminance(colour: list[float]) -> float:
        linear = [
            (x / 255 / 12.92) if x / 255 <= 0.03928 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in colour
        ]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    one, two = sorted(map(luminance, page.evaluate(code, selector)))
    return (two + 0.05) / (one + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_both_schemes_and_by_a_screen_reader(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(251, 251, 249)") == (scheme == "light")
    for selector in ("h1", "#summary", "#title", ".who", "label", "#facts dt", ".yes", ".no", ".row b", "th"):
        assert contrast(page, selector) >= 4.5, selector
    tree = page.aria_snapshot() if hasattr(page, "aria_snapshot") else page.locator("body").aria_snapshot()
    for line in (
        '- heading "run" [level=1]',
        '- navigation "Dialogues"',
        '- search "Filter the dialogues"',
        '- searchbox "Words"',
        '- combobox "Outcome"',
        '- listbox "Dialogues"',
        "- main",
        '- heading "What each side alone was told" [level=3]',
        '- table "The dialogues of this group"',
        '- columnheader "mean log-prob"',
        '- complementary "Token"',
        "- status",
    ):
        assert line in tree, tree
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, select, [role=listbox]')]"
        ".filter(x => !(x.textContent.trim() || x.ariaLabel || (x.labels && x.labels.length)))"
        ".map(x => x.outerHTML)"
    )
    assert nameless == []
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    assert not page.is_visible("#help")


def test_two_checkpoints_stand_side_by_side_from_where_they_differ(
    browser: Any, run: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_dir(run / "checkpoints" / "warm_start")
    folders = {name: tmp_path / name for name in ("one", "two")}
    for seed, folder in enumerate(folders.values()):
        save_model(
            decoder(seed, vocab_size=tokenizer.vocab_size, max_position_embeddings=640), tokenizer, folder
        )
    rules = ["dialogue.max_rounds=1", "dialogue.max_tokens_per_turn=8", "dialogue.max_tokens_final=6"]
    one, two = compare(load_config("deal", [*TINY_DEAL, *rules]), folders, 2, greedy=False)
    write_page(run, tmp_path / "page.html", (40, 40), [one, two])
    tab = browser.new_page(viewport={"width": 1400, "height": 900})
    tab.set_default_timeout(PATIENCE_MS)
    tab.goto((tmp_path / "page.html").as_uri())
    tab.wait_for_selector("#columns article:nth-of-type(2)")
    assert "Checkpoint one, context 1" in tab.inner_text("#title")
    assert tab.input_value("#measure") == "change"
    said = [[i for turn in each.dialogues[0].turns for i in turn.token_ids] for each in (one, two)]
    agree = next(n for n, (a, b) in enumerate(zip(*said, strict=False)) if a != b)
    before = "[...document.querySelectorAll('#columns .apart')].map((mark) => {"
    before += " const all = [...mark.closest('article').querySelectorAll('.t')];"
    before += " return all.indexOf(mark.nextElementSibling); })"
    assert tab.evaluate(before) == [agree, agree]
    tab.keyboard.press("ArrowRight")
    turn = one.dialogues[0].turns[0]
    assert turn.logprobs is not None
    assert number(tab, "log-prob") == turn.logprobs[0]
    assert float(
        tab.inner_text("#token dd[data-key='log-prob by the other']").split("\n")[0].replace("\u2212", "-")
    ) == round(one.other[0][0], 5)
    tab.close()
