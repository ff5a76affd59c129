"""The page of `rkv-vllm inspect` in Chromium: it shows what its data say, and stays quick to use."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import made_up
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from rkv_vllm.inspection.page import page
from rkv_vllm.inspection.report import Inspection, Run

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

ROOT = Path(__file__).parents[2]
#: A browser of one's own, which asks nobody for anything; in a container it has no sandbox.
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)

OpenPage = Callable[[Inspection], AbstractContextManager[Page]]
LAYERS, HEADS, TOKENS, BUDGETS, BUFFER, PROMPT = 3, 2, 150, (48, 32), 16, 20
NEXT_FRAME = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for longer: playwright keeps an event loop running, and other tests run their own."""
    install = [sys.executable, str(ROOT / "scripts" / "install_browser.py")]
    chromium = subprocess.run(install, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> OpenPage:
    """Opens a report's page, and at the end demands that it had no error and asked for no other file."""

    @contextmanager
    def opened(found: Inspection) -> Iterator[Page]:
        file = tmp_path / "report.html"
        file.write_text(page(found), encoding="utf-8")
        wrong: list[str] = []
        asked: list[str] = []
        with browser.new_context(viewport={"width": 1440, "height": 1000}) as context:
            tab = context.new_page()
            tab.on("console", lambda message: wrong.append(message.text))
            tab.on("pageerror", lambda error: wrong.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(file.as_uri())
            tab.wait_for_selector("body[data-ready]")
            yield tab
        assert wrong == []
        assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]

    return opened


@pytest.fixture(scope="module")
def found() -> Inspection:
    return made_up.report(
        tokens=TOKENS, layers=LAYERS, heads=HEADS, budgets=BUDGETS, buffer=BUFFER, prompt=PROMPT
    )


def go(tab: Page, *keys: str) -> int:
    """Presses keys on the slider, and gives the number of tokens that it then stands at."""
    tab.focus("#time")
    for key in keys:
        tab.keyboard.press(key)
    tab.evaluate(NEXT_FRAME)
    said = re.match(r"after ([\d,]+) tokens", tab.inner_text("#now"))
    assert said is not None
    return int(said[1].replace(",", ""))


def held(run: Run, time: int) -> np.ndarray:
    """bool [layers, heads, tokens]."""
    assert run.forgotten is not None
    left = run.forgotten.left.unpack()
    return (left == 0) | (left > np.searchsorted(run.forgotten.rounds, time, side="right"))


def expected_classes(run: Run, time: int, rows: slice = slice(None)) -> list[str]:
    shares = held(run, time).reshape(-1, len(run.tokens) - 1)[rows].mean(axis=0)
    names = [f"t s{level}" for level in np.ceil(10 * shares - 1e-9).astype(int)]
    names.append("t")  # the last token was never read
    classes = [name if index < time else "t later" for index, name in enumerate(names)]
    assert run.first_difference is not None
    classes[run.first_difference] += " differs"
    return classes


def classes(tab: Page, panel: int) -> list[str]:
    found: list[str] = (
        tab.locator(".text")
        .nth(panel)
        .evaluate("text => [...text.querySelectorAll('span')].map(span => span.className)")
    )
    return found


def told(tab: Page, words: str) -> str:
    """What is said of a token, once these words are among it."""
    tip = tab.locator("#tip", has_text=words)
    tip.wait_for()
    return tip.inner_text()


def choose(tab: Page, layer: str, head: str) -> None:
    tab.select_option("#layer", layer)
    tab.select_option("#head", head)
    tab.evaluate(NEXT_FRAME)


def test_every_round_colours_every_token_by_who_holds_it(open_page: OpenPage, found: Inspection) -> None:
    """The slider, by its keys, stops before the first round, at each round of either setting and at the end;
    at each stop every token has the colour of the share that its data have."""
    rounds = {length for run in found.runs[1:] if run.forgotten for length in run.forgotten.rounds}
    stops = [min(rounds) - 1, *sorted(rounds), TOKENS]
    with open_page(found) as tab:
        assert go(tab) == TOKENS, "it begins at the end"
        visited = [go(tab, "Home")]
        seen = []
        while True:
            for panel, run in enumerate(found.runs[1:]):
                assert classes(tab, panel) == expected_classes(run, visited[-1])
            seen.append(tuple(classes(tab, 0)))
            if visited[-1] == TOKENS:
                break
            visited.append(go(tab, "ArrowRight"))
        assert visited == stops
        assert len(set(seen)) == len(seen), "every stop looks different"


def test_one_layer_and_head_can_be_seen_alone(open_page: OpenPage, found: Inspection) -> None:
    """The text is then coloured by that head, which a click on its row of the map chooses, or lets go."""
    run = found.runs[1]
    with open_page(found) as tab:
        time = go(tab, "Home", "ArrowRight", "ArrowRight")
        choose(tab, "1", "0")
        assert classes(tab, 0) == expected_classes(run, time, slice(2, 3))
        choose(tab, "2", "all")
        assert classes(tab, 0) == expected_classes(run, time, slice(4, 6))
        box = tab.locator(".map").first.bounding_box()
        assert box is not None
        row = {"x": 30, "y": box["height"] * (3 + 0.5) / (LAYERS * HEADS)}
        tab.locator(".map").first.click(position=row)
        tab.evaluate(NEXT_FRAME)
        assert (tab.input_value("#layer"), tab.input_value("#head")) == ("1", "1")
        assert classes(tab, 0) == expected_classes(run, time, slice(3, 4))
        tab.locator(".map").first.click(position=row)
        tab.evaluate(NEXT_FRAME)
        assert classes(tab, 0) == expected_classes(run, time)


def test_the_map_has_a_colour_for_every_position_layer_and_head(
    open_page: OpenPage, found: Inspection
) -> None:
    """Its pixels are dark where a head holds a token, light where it forgot it, and grey behind the text."""
    run = found.runs[2]
    with open_page(found) as tab:
        time = go(tab, "Home", *["ArrowRight"] * 5)
        pixels = np.array(
            tab.locator(".map")
            .nth(1)
            .evaluate(
                """(map, [columns, rows]) => {
                  const { width, height } = map;
                  const all = map.getContext("2d").getImageData(0, 0, width, height).data;
                  const at = (x, y) => [...all.slice(4 * (y * width + x), 4 * (y * width + x) + 3)];
                  return Array.from({length: rows}, (_, row) => Array.from({length: columns}, (_, column) =>
                    at(Math.floor((column + 0.7) * width / columns),
                      Math.floor((row + 0.5) * height / rows))));
                }""",
                [TOKENS, LAYERS * HEADS],
            )
        )
        dark, light, grey = [8, 48, 107], [247, 251, 255], [241, 241, 241]
    expected = np.where(held(run, time).reshape(-1, TOKENS - 1)[..., None], dark, light)
    expected[:, time:] = grey
    assert np.array_equal(pixels[:, : TOKENS - 1], expected)
    assert {tuple(colour) for colour in expected.reshape(-1, 3)} == {tuple(dark), tuple(light), tuple(grey)}


def test_a_token_is_told_of_by_mouse_and_by_keys(open_page: OpenPage, found: Inspection) -> None:
    """When it left, how important and redundant it was, the newest similar one, which is marked, its KL."""
    run = found.runs[1]
    assert run.forgotten is not None and run.kl is not None
    parts = (run.forgotten.importance, run.forgotten.redundancy, run.forgotten.match)
    importance, redundancy, match = (part.unpack() for part in parts if part is not None)
    left = run.forgotten.left.unpack()
    layer, head, token = next(
        (layer, head, token)
        for layer, head, token in zip(*np.nonzero(left), strict=True)
        if token > PROMPT and match[layer, head, token] < TOKENS
    )
    with open_page(found) as tab:
        choose(tab, str(layer), str(head))
        span = tab.locator(".text").first.locator("span.t").nth(int(token))
        span.hover()
        said = told(tab, f"token {token}, answer")
        round_ = left[layer, head, token]
        like = int(match[layer, head, token])
        assert f"layer {layer}, KV head {head}\nforgotten" in said
        assert f"left in round {round_}, at {run.forgotten.rounds[round_ - 1]} tokens" in said
        assert f"more important than {importance[layer, head, token]} %" in said
        assert f"more redundant than {redundancy[layer, head, token]} % of them" in said
        assert f"token {like}" in said.splitlines()[-1]
        assert f"a KL of {run.kl[token - PROMPT]:g} nats" in said
        marked = tab.locator(".text").first.locator("span.like")
        assert marked.evaluate_all("spans => spans.map(span => span.index)") == [like]

        choose(tab, "all", "all")
        tab.locator(".text").first.focus()
        for _ in range(3):
            tab.keyboard.press("ArrowRight")
        said = told(tab, "token 2, prompt")  # although the mouse rests on another token, which is drawn anew
        count = int(held(run, TOKENS)[..., 2].sum())
        assert f"held by {count} of {LAYERS * HEADS} layers and heads" in said
        most, times = Counter(match[..., 2][match[..., 2] < TOKENS].tolist()).most_common(1)[0]
        if times > 1:
            assert f"token {most}" in said.splitlines()[-1]
        tab.locator(".text").first.locator("span.t").nth(1).hover()
        told(tab, "token 1, prompt")


def test_the_full_caches_answer_stands_beside(open_page: OpenPage, found: Inspection) -> None:
    """Where answers part is marked in all of them, with what the other says; no text is taken for markup."""
    with open_page(found) as tab:
        names = tab.locator("article select").evaluate_all(
            "all => all.map(one => one.selectedOptions[0].text)"
        )
        assert names == [
            *(f"rkv, budget {budget}, buffer {BUFFER}" for budget in BUDGETS),
            "full cache",
        ]
        texts = tab.locator(".text").evaluate_all("all => all.map(one => one.textContent)")
        shown = [[*found.runs[1:], found.runs[0]][index].tokens for index in range(3)]
        assert texts == ["".join(tokens).replace("\n", "↵\n") for tokens in shown]
        assert any("<b>&" in text for text in texts)
        marked = [index for index, name in enumerate(classes(tab, 2)) if "differs" in name]
        assert marked == sorted(run.first_difference or 0 for run in found.runs[1:])
        tab.locator(".text").nth(2).locator("span.differs").first.hover()
        told(tab, 'here rkv, budget 32, buffer 16 goes on with " other"')
        facts = tab.locator(".facts").all_inner_texts()
        assert f"the answer leaves the full cache's at token {PROMPT + BUDGETS[0]}" in facts[0]
        assert "holds all 149 tokens" in facts[2]
        assert f"holds {BUDGETS[0] + 5} of 149 tokens" in facts[0]

        tab.locator("article select").first.select_option("full cache")
        tab.evaluate(NEXT_FRAME)
        assert tab.locator("figure").first.is_hidden()
        assert set(classes(tab, 0)) == {"t", "t differs"}


def test_a_policy_without_scores_has_a_page_too(open_page: OpenPage, found: Inspection) -> None:
    """One setting alone, of a policy that weighs nothing, in a narrow window."""
    run = found.runs[1]
    assert run.forgotten is not None
    bare = run.forgotten.model_copy(update={"importance": None, "redundancy": None, "match": None})
    runs = [found.runs[0], run.model_copy(update={"forgotten": bare, "kl": None})]
    with open_page(found.model_copy(update={"runs": runs})) as tab:
        tab.set_viewport_size({"width": 420, "height": 900})
        assert tab.locator("article").count() == 2
        assert tab.evaluate("document.documentElement.scrollWidth") <= 420
        tab.locator(".text").first.locator("span.t").nth(30).hover()
        said = told(tab, "token 30, answer")
        assert "layers and heads" in said and "important" not in said and "similar" not in said


def test_a_setting_that_never_forgot_has_a_page_too(open_page: OpenPage) -> None:
    """A budget above the text: there is one stop, and all is held."""
    found = made_up.report(tokens=60, layers=2, heads=1, budgets=(100,), prompt=20)
    [_, run] = found.runs
    found = found.model_copy(
        update={"runs": [found.runs[0], run.model_copy(update={"first_difference": None})]}
    )
    with open_page(found) as tab:
        assert go(tab, "Home") == 60
        assert set(classes(tab, 0)) == {"t s10", "t"}
        facts = tab.locator(".facts").first.inner_text()
        assert "round 0 of 0" in facts and "the answer is the full cache's" in facts


def test_a_long_answer_stays_usable(open_page: OpenPage) -> None:
    """16,384 tokens, 36 layers, 8 heads and two settings: each key and each look is answered at once, which
    is to say within the patience of a test, and with the right colours."""
    found = made_up.report(tokens=16384, layers=36, heads=8, budgets=(1024, 512))
    with open_page(found) as tab:
        for keys in (["ArrowLeft"], ["ArrowLeft"] * 20, ["Home"], ["PageUp"], ["End"]):
            time = go(tab, *keys)
            for panel, run in enumerate(found.runs[1:]):
                assert classes(tab, panel) == expected_classes(run, time)
        choose(tab, "35", "7")
        assert classes(tab, 0) == expected_classes(found.runs[1], time, slice(287, 288))
        tab.locator(".map").first.hover(position={"x": 200, "y": 100})
        told(tab, "layer 16, KV head")
        tab.locator(".text").first.locator("span.t").nth(16_000).hover()
        told(tab, "token 16,000, answer")
