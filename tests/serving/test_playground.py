"""The playground as a visitor meets it, in Chromium on a real server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from collm import CoLLM, SamplingParams
from collm.core.types import Completion
from tests.browser import EVERYWHERE, WIDE, chromium, opened, sideways, violations
from tests.serving.conftest import Running, Steps

pytestmark = pytest.mark.slow

PROMPT = "w61 w62 w63"
STATE = "model=pair&mode=prompt&prompt=w61+w62+w63&max=30&temperature=0"
TOKENS = ".panel:first-child .token"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    with opened(browser, f"{server.url}/", viewport=WIDE) as page:
        page.locator("#model option").first.wait_for(state="attached")
        yield page


def ask(page: Page, prompt: str = PROMPT, most: int = 30) -> None:
    page.get_by_label("Maximum tokens").fill(str(most))
    page.locator("#prompt").fill(prompt)
    page.get_by_role("button", name="Run").click()
    done(page)


def done(page: Page) -> None:
    expect(page.locator("#said")).to_contain_text("Done")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def tokens(page: Page, panel: int = 0) -> list[dict[str, Any]]:
    """What the page keeps of each token."""
    return page.evaluate("(i) => state.panels[i].steps", panel)  # type: ignore[no-any-return]


def direct(model: CoLLM, threshold: float, most: int = 30) -> Completion:
    return model.generate(PROMPT, SamplingParams(max_tokens=most), threshold=threshold)[0]


def test_it_writes_each_token_in_the_colour_of_its_author(page: Page, pair: CoLLM) -> None:
    ask(page)
    expected = direct(pair, 0.5)
    assert [one["tokenId"] for one in tokens(page)] == expected.token_ids
    assert [one["author"] for one in tokens(page)] == expected.authors
    assert 0 < sum(expected.authors) < len(expected.authors)  # both write
    shown = page.locator(f"{TOKENS} > span")
    backgrounds = shown.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    underlines = shown.evaluate_all("all => all.map(one => getComputedStyle(one).textDecorationLine)")
    by_author = {author: set() for author in (0, 1)}
    for author, background, underline in zip(expected.authors, backgrounds, underlines, strict=True):
        by_author[author].add((background, underline))
    assert by_author[0] == {("rgba(0, 0, 0, 0)", "none")}
    [(background, underline)] = by_author[1]
    assert background != "rgba(0, 0, 0, 0)"
    assert underline == "underline"  # colour is not the only sign
    deferred = sum(expected.authors)
    said = f"{len(expected.authors)} tokens, {deferred} ({100 * expected.deferral_rate:.1f}%) by assistants"
    assert page.locator(".panel .note").text_content() == said
    assert page.locator("#legend").inner_text().split("\n") == ["base (unmarked)", "assistant"]


def test_moving_the_slider_decodes_again(page: Page, pair: CoLLM) -> None:
    ask(page)
    slider = page.get_by_role("slider")
    expect(slider).to_have_attribute("aria-valuetext", "threshold 0.5")
    for key, threshold, words in (("End", 1.0, "the base alone"), ("Home", -1.0, "assistants alone")):
        slider.press(key)
        expect(slider).to_have_attribute("aria-valuetext", words)
        share = f"({100 * (threshold < 0):.1f}%) by assistants"
        expect(page.locator(".panel .note")).to_contain_text(share)
        done(page)
        assert [one["tokenId"] for one in tokens(page)] == direct(pair, threshold).token_ids
    page.locator("#threshold").fill("0.4")
    page.locator("#threshold").press("Tab")
    rate = direct(pair, 0.4).deferral_rate
    expect(page.locator(".panel .note")).to_contain_text(f"({100 * rate:.1f}%) by assistants")
    expect(page.locator("#promised")).to_contain_text("near the calibrated 0.5: 40.0% deferred")
    page.locator("#threshold").fill("much")
    page.locator("#threshold").press("Tab")
    expect(page.get_by_role("alert")).to_have_text(
        'The threshold is "much"; type a number from -1 to 1 (1: the base alone, below 0: assistants alone).'
    )


def test_each_model_alone_stands_beside_it(page: Page, pair: CoLLM) -> None:
    page.get_by_label("Beside each model alone").check()
    ask(page)
    assert page.locator(".panel h2").all_text_contents() == ["Collaboration", "base alone", "assistant alone"]
    for panel, threshold in enumerate((0.5, 1.0, -1.0)):
        assert [one["tokenId"] for one in tokens(page, panel)] == direct(pair, threshold).token_ids
    page.locator("summary").click()
    page.get_by_label("Price of a million tokens by assistant").fill("1000000")
    expect(page.locator(".panel:last-child .note")).to_have_text("30 tokens, 30 (100.0%) by assistants, cost 30.0")


def test_hover_and_focus_show_what_each_model_thought(page: Page, pair: CoLLM) -> None:
    ask(page)
    expected = direct(pair, 0.5)
    thought = pair.candidates(expected.prompt_token_ids, expected.token_ids)
    tip = page.get_by_role("tooltip")
    expect(tip).to_be_hidden()
    page.locator(TOKENS).nth(3).hover()
    _expect_candidates(tip, thought[3], expected, 3)
    page.locator("h1").hover()
    expect(tip).to_be_hidden()
    page.locator(TOKENS).first.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    _expect_candidates(tip, thought[2], expected, 2)
    expect(page.locator(TOKENS).nth(2)).to_have_attribute("aria-describedby", "tip")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def _expect_candidates(tip: Any, thought: Any, expected: Completion, place: int) -> None:
    author = ["base", "assistant"][expected.authors[place]]
    expect(tip).to_contain_text(f"{author} · defer prob {expected.defer_probs[place]:.3f}")
    for name, likely in zip(("base", "assistant"), thought, strict=True):
        listed = " · ".join(f"{text} {100 * prob:.1f}%" for text, prob in likely)
        expect(tip).to_contain_text(f"{name}: {listed}")


def test_a_stream_is_stopped_in_the_middle(browser: Browser, serve_pair: Any, pair: CoLLM) -> None:
    with serve_pair() as server, opened(browser, f"{server.url}/#{STATE}") as page:
        steps = Steps(server.worker())
        for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
            page.get_by_role("button", name="Run").click()
            steps.allow(3)
            page.locator(TOKENS).first.wait_for()
            stop()
            expect(page.get_by_role("button", name="Stop")).to_be_disabled()
            server.until(lambda: server.worker().outstanding == 0)
            steps.allow(1)  # the one that it is in
            server.until(server.idle)
            assert 0 < page.locator(TOKENS).count() < 20
            expect(page.locator("#error")).to_have_text("")
        steps.allow(1000)
        page.get_by_role("button", name="Run").click()
        done(page)
        written = [one["tokenId"] for one in tokens(page)]
    assert written == direct(pair, 0.5).token_ids


def test_a_chat_goes_on_where_it_was(page: Page, pair: CoLLM) -> None:
    page.get_by_role("button", name="Chat").click()
    ask(page, "w61 w62", most=8)
    params = SamplingParams(max_tokens=8)
    turns = [{"role": "user", "content": "w61 w62"}]
    first = pair.generate(turns, params, threshold=0.5)[0]  # type: ignore[arg-type]
    assert [one["tokenId"] for one in tokens(page)] == first.token_ids
    ask(page, "w63", most=8)
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "w63"}]
    second = pair.generate(turns, params, threshold=0.5)[0]  # type: ignore[arg-type]
    assert [one["tokenId"] for one in tokens(page)] == second.token_ids
    earlier = page.get_by_label("Earlier turns")
    expect(earlier.locator(".token")).to_have_count(8)
    expect(page.locator("#asked")).to_have_text("You: w63")
    page.get_by_role("button", name="New chat").click()
    expect(earlier.locator(".token")).to_have_count(0)


def test_a_shared_address_brings_everything_back(browser: Browser, server: Running) -> None:
    with opened(browser, f"{server.url}/#{STATE}&threshold=0.25&compare=1") as page:
        expect(page.locator("#prompt")).to_have_value(PROMPT)
        expect(page.locator("#threshold")).to_have_value("0.25")
        expect(page.get_by_label("Maximum tokens")).to_have_value("30")
        expect(page.get_by_label("Beside each model alone")).to_be_checked()
        page.get_by_label("Temperature").fill("0.7")
        page.locator("summary").click()
        page.get_by_label("Price of a million tokens by assistant").fill("30")
        page.get_by_role("button", name="Run").click()
        done(page)
        address = page.url
        assert "temperature=0.7" in address
    with opened(browser, address) as page:
        expect(page.get_by_label("Temperature")).to_have_value("0.7")
        expect(page.locator("#price-1")).to_have_value("30")
        expect(page.locator("#price-0")).to_have_value("")


def test_a_shared_chat_goes_on_as_it_would_have(browser: Browser, server: Running, pair: CoLLM) -> None:
    state = STATE.replace("mode=prompt", "mode=chat").replace("max=30", "max=8")
    with opened(browser, f"{server.url}/#{state}") as page:
        for question in ("w61 w62", "w63"):
            ask(page, question, most=8)
        first = page.evaluate("state.turns[0].text")
        second = [one["tokenId"] for one in tokens(page)]
        page.evaluate("keepState()")
        asked_again = page.url
        page.locator("#prompt").fill("w64")
        page.evaluate("keepState()")
        gone_on = page.url
    with opened(browser, asked_again) as page:
        expect(page.get_by_label("Earlier turns").locator(".turn")).to_have_count(1)
        expect(page.get_by_label("Earlier turns")).to_contain_text(first.strip())
        expect(page.locator("#prompt")).to_have_value("w63")
        page.get_by_role("button", name="Run").click()
        done(page)
        assert [one["tokenId"] for one in tokens(page)] == second
        page.goto(gone_on)  # in the same tab
        expect(page.get_by_label("Earlier turns").locator(".turn")).to_have_count(2)
        expect(page.locator("#prompt")).to_have_value("w64")
        expect(page.locator(TOKENS)).to_have_count(0)
        page.goto(f"{server.url}/#{state}&turns=[[")
        expect(page.get_by_role("alert")).to_have_text("The address holds a chat that cannot be read; copy it again.")


def test_answers_are_copied_in_three_forms(browser: Browser, server: Running, pair: CoLLM) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    with opened(browser, f"{server.url}/#{STATE}", permissions=permissions) as page:
        page.locator("summary").click()
        page.get_by_role("button", name="Copy text").click()
        expect(page.get_by_role("alert")).to_have_text("There is no answer to copy yet; run first.")
        page.locator("#prompt").fill(f"{PROMPT} it's")
        page.get_by_role("button", name="Run").click()
        done(page)
        copied = {}
        for kind in ("text", "HTML", "curl", "link"):
            page.get_by_role("button", name=f"Copy {kind}").click()
            expect(page.locator("#copied")).to_have_text("Copied.")
            copied[kind] = page.evaluate("navigator.clipboard.readText()")
        written = tokens(page)
    text = "".join(one["text"] for one in written)
    assert copied["text"] == text
    assert re.sub(r"<[^>]*>", "", copied["HTML"]) == text
    assert copied["HTML"].count("<span") == sum(one["author"] for one in written)
    assert copied["link"].startswith(f"{server.url}/#model=pair")
    answer = json.loads(subprocess.run([*shlex.split(copied["curl"]), "-s"], capture_output=True, check=True).stdout)
    assert answer["choices"][0]["text"] == text


def test_a_key_is_asked_for_and_kept_out_of_the_address(browser: Browser, serve_pair: Any) -> None:
    with serve_pair(api_key="open-sesame") as server:
        server.client.headers["Authorization"] = "Bearer open-sesame"
        with opened(browser, f"{server.url}/#{STATE}", failing="401") as page:
            alert, key, run = page.locator("#error[role=alert]"), page.get_by_label("API key"), page.locator("#run")
            expect(alert).to_have_text("This server needs its API key; type it.")
            expect(key).to_be_focused()
            expect(run).to_be_hidden()
            key.fill("wrong")
            page.get_by_role("button", name="Continue").click()
            expect(alert).to_have_text("This is not the server's API key; type it again.")
            key.fill("open-sesame")
            key.press("Enter")
            expect(alert).to_have_text("")
            expect(key).to_be_hidden()
            run.click()
            done(page)
            assert "sesame" not in page.url
            assert "-H 'Authorization: Bearer '\"$COLLM_API_KEY\"" in page.evaluate("asCurl(state.panels[0])")
            page.reload()
            expect(page.locator("#model option")).to_have_count(1)
            expect(alert).to_have_text("")
            expect(key).to_be_hidden()


def test_a_server_that_was_not_there_is_asked_again(browser: Browser, server: Running) -> None:
    with opened(browser, f"{server.url}/", failing="Failed to load resource") as page:
        page.locator("#model option").first.wait_for(state="attached")
        page.route("**/v1/collm/info", lambda route: route.abort())
        page.goto(f"{server.url}/?")
        expect(page.locator("#error")).to_have_text("The server cannot be reached; is it still running?")
        page.unroute("**/v1/collm/info")
        ask(page)
        expect(page.locator("#error")).to_have_text("")


def test_it_works_under_the_path_of_a_proxy(browser: Browser, serve_pair: Any) -> None:
    with serve_pair(root_path="/collm") as server, opened(browser, f"{server.url}/collm/#{STATE}") as page:
        page.get_by_role("button", name="Run").click()
        done(page)
        assert page.evaluate("asCurl(state.panels[0])").startswith(f"curl {server.url}/collm/v1/completions ")


def test_what_goes_wrong_is_said_in_a_sentence(browser: Browser, server: Running) -> None:
    with opened(browser, f"{server.url}/#{STATE}", failing="Failed to load resource") as page:
        alert = page.locator("#error[role=alert]")
        page.get_by_label("Temperature").fill("9")
        page.locator("#form").evaluate("form => { form.noValidate = true; }")
        page.get_by_role("button", name="Run").click()
        expect(alert).to_have_text(re.compile(r"temperature is 9"))
        page.get_by_label("Temperature").fill("0")
        page.locator("#prompt").fill(" ")
        page.get_by_role("button", name="Run").click()
        expect(alert).to_have_text("The prompt is empty; type one.")
        page.locator("#prompt").fill("w61")
        page.context.set_offline(True)
        page.get_by_role("button", name="Run").click()
        expect(alert).to_have_text("The server cannot be reached; is it still running?")


def test_without_a_chat_template_there_are_no_chats(browser: Browser, serve: Callable[..., Any], pair: CoLLM) -> None:
    pair.template = type(pair.template)()
    with serve({"plain": pair}) as server, opened(browser, f"{server.url}/#mode=chat") as page:
        expect(page.get_by_role("button", name="Chat")).to_be_disabled()
        expect(page.get_by_role("button", name="Prompt", exact=True)).to_have_attribute("aria-pressed", "true")


def test_three_authors_look_different(browser: Browser, server: Running) -> None:
    with opened(browser, f"{server.url}/#{STATE.replace('pair', 'three')}&threshold=0.5") as page:
        marks = page.locator("#legend span")
        expect(marks).to_have_text(["base", "assistant", "assistant-2"])
        styles = marks.evaluate_all(
            "all => all.map(one => { const s = getComputedStyle(one);"
            " return [s.backgroundColor, s.textDecorationLine + s.textDecorationStyle].join() })"
        )
        assert len(set(styles)) == 3


@EVERYWHERE
def test_it_is_readable_everywhere(browser: Browser, server: Running, scheme: Any, window: Any) -> None:
    with opened(browser, f"{server.url}/#{STATE}&compare=1", viewport=window, color_scheme=scheme) as page:
        page.locator("summary").click()
        page.get_by_role("button", name="Run").click()
        done(page)
        page.locator(TOKENS).nth(4).focus()
        expect(page.get_by_role("tooltip")).to_contain_text("%")
        assert sideways(page) == 0
        assert violations(page) == []
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    ask(page)
    page.locator("#model").focus()
    reached = ["model"]
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        if reached[-1] == "token":
            break
    wanted = ["model", "as-prompt", "as-chat", "prompt", "slider", "threshold", "max-tokens", "temperature", "compare",
              "run"]  # fmt: skip
    assert [one for one in reached if one in wanted] == wanted
    assert reached[-1] == "token"  # one stop for all tokens; arrow keys move among them
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    done(page)


def test_it_runs_nothing_but_its_own_script(browser: Browser, server: Running) -> None:
    headers = httpx.get(f"{server.url}/").headers
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert httpx.head(f"{server.url}/").status_code == 200
    refused = "Content Security Policy"
    with opened(browser, f"{server.url}/#{STATE}", bypass_csp=False, failing=refused) as page:
        page.get_by_role("button", name="Run").click()
        done(page)
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
        )
        assert page.evaluate("window.ran") is None


def test_a_wheel_holds_the_page(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    [wheel] = WheelBuilder(str(Path(__file__).parents[2])).build(directory=str(tmp_path), versions=["standard"])
    assert {"collm/serving/playground.html", "collm/evaluation/report.html"} <= set(zipfile.ZipFile(wheel).namelist())
