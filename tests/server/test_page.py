"""The chat page in a real browser: it talks, measures, stops, and shows whatever a model says as text."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser import browser as browser
from tests.browser import playwright_api
from tests.server.live import Live, until
from tests.server.test_lifecycle import resting

SIZES = {"laptop": (1280, 900), "phone": (390, 844)}
CODE = "```html\n<b>bold</b> and a long line that fits no phone and has to be moved to be read\n```\n"
REPLY = f"So:\n{CODE}and\n~~~\n``` is text here\n"
HOSTILE = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script><b>b</b>&amp;'
KEY = "the-key-of-the-page-test"


class Visit:
    """The page opened from a server, with all that it complained about or asked of anybody else."""

    def __init__(self, browser: Any, live: Live, size: str = "laptop", **options: Any) -> None:
        width, height = SIZES[size]
        self.complaints: list[str] = []
        phone = {"is_mobile": True, "has_touch": True} if size == "phone" else {}
        self.context = browser.new_context(viewport={"width": width, "height": height}, **phone, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", lambda asked: self._asked(asked.url, live.url))
        self.page.goto(live.url)

    def _asked(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:")):
            self.complaints.append(f"request: {url}")

    def say(self, text: str, most: int = 30) -> None:
        self.page.wait_for_selector("#go:not([disabled])")
        self.page.evaluate("document.getElementById('panel').open = true")
        self.page.fill("#most", str(most))
        self.page.fill("#say", text)
        self.page.press("#say", "Enter")

    def wait(self, question: str) -> None:
        """Until an expression holds; the page's own policy forbids playwright's way of waiting for one."""
        until(lambda: bool(self.page.evaluate(question)), 60)

    def rested(self) -> None:
        self.wait("document.getElementById('go').textContent === 'Send'")

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).last.text_content())


STOPS = """() => {
  const sees = new MutationObserver(() => {
    if (!(document.querySelector('.turn.live .text')?.textContent.length > 5)) return;
    sees.disconnect();
    document.getElementById('go').click();
  });
  sees.observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
"""A click as soon as there are some letters: one from here may come when a quick reply has ended."""


@pytest.mark.parametrize(("size", "scheme"), [("laptop", "light"), ("phone", "dark")])
def test_a_conversation_with_its_measurements(browser: Any, live: Live, size: str, scheme: str) -> None:
    visit = Visit(browser, live, size, color_scheme=scheme)
    visit.page.evaluate("document.getElementById('temperature').value = '0'")  # drawn, a reply may be one token long
    for turn in ("hello there, this is me", "and again"):
        visit.say(turn)
        visit.page.wait_for_selector(".turn.live")
        visit.rested()
    page = visit.page
    assert page.locator(".turn.user .text").all_text_contents() == ["hello there, this is me", "and again"]
    assert page.locator(".turn.assistant").count() == 2 and page.locator(".turn.error").count() == 0
    assert visit.text("#ttft").endswith("s") and float(visit.text("#rate")) > 0
    assert visit.text("#middle").endswith("s") and visit.text("#most-gap").endswith("s")
    assert int(visit.text("#reused")) > 0 and int(visit.text("#prompt")) > int(visit.text("#reused"))
    assert visit.text("#bytes").endswith("KiB") and "of 2,048" in visit.text("#context")
    assert int(visit.text("#pages")) > 0 and " of " in visit.text("#used")
    assert visit.text("#spark path") == "" and page.locator("#spark path").get_attribute("d").count("L") > 3
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    page.click("#anew")
    assert page.locator(".turn").count() == 0 and visit.text("#ttft") == "–"
    assert visit.complaints == []
    visit.context.close()


def test_stop_ends_the_reply_and_frees_its_pages(browser: Any) -> None:
    with Live() as live:
        live.force("ab" * 900)  # drawn, a reply may end before it is stopped
        visit = Visit(browser, live)
        visit.page.evaluate(STOPS)
        visit.say("go on", most=1900)
        visit.page.wait_for_selector(".turn .end")
        visit.rested()
        until(lambda: resting(live))
        assert visit.text(".turn .end") == "stopped"
        visit.say("hello", most=5)
        visit.rested()
        assert visit.text(".turn .end") == "cut at the limit of tokens"
        assert visit.page.locator(".turn.error").count() == 0 and visit.complaints == []
        visit.context.close()


def test_what_a_model_says_is_text(browser: Any) -> None:
    """Without the content policy, so that the page alone is on trial; and where a long word does not fit."""
    with Live() as live:
        live.force(HOSTILE)
        visit = Visit(browser, live, "phone", bypass_csp=True)
        visit.say(HOSTILE, most=200)
        visit.rested()
        page = visit.page
        assert page.locator(".turn .text").all_text_contents() == [HOSTILE, HOSTILE]
        assert page.evaluate("window.pwned") is None and page.locator("img, main script, main b").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES["phone"][0]
        assert visit.complaints == []
        visit.context.close()


def test_code_is_text_in_letters_of_one_width(browser: Any) -> None:
    with Live() as live:
        live.force(REPLY)
        visit = Visit(browser, live, "phone", bypass_csp=True)
        visit.say("code", most=300)
        visit.rested()
        page = visit.page
        assert visit.text(".turn.assistant .text") == REPLY
        assert page.locator(".code").all_text_contents() == [CODE, "~~~\n``` is text here\n"]
        widths = page.evaluate("""() => [...document.querySelectorAll('.turn.assistant .text > span')].map(
            (span) => getComputedStyle(span).fontFamily.includes('monospace'))""")
        assert widths == [False, True, False, True] and page.locator("main b").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES["phone"][0]
        assert visit.complaints == []
        visit.context.close()


def test_the_policy_stops_a_script_that_got_in(browser: Any, live: Live) -> None:
    visit = Visit(browser, live)
    visit.page.wait_for_selector("#go:not([disabled])")
    for way in (
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.pwned=1>')",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned=1'}))",
        "document.createElement('p').setAttribute('onclick', 'window.pwned=1')",
    ):
        with pytest.raises(playwright_api.Error, match="Trusted"):
            visit.page.evaluate(way)
    assert visit.page.evaluate("window.pwned") is None
    visit.context.close()


@pytest.mark.parametrize("keys", [(KEY,), (KEY, "another-key-of-the-page-test")])
def test_a_server_with_keys_asks_for_one(browser: Any, keys: tuple[str, ...]) -> None:
    """And who is not the only one is told of nobody's pages but the conversation's."""
    with Live(keys=keys) as live:
        visit = Visit(browser, live, "phone")
        visit.page.wait_for_selector("#locked:not([hidden])")
        visit.page.fill("#key", KEY)
        visit.page.press("#key", "Tab")
        visit.say("hello")
        visit.rested()
        assert visit.page.locator(".turn.assistant").count() == 1 and visit.page.locator(".turn.error").count() == 0
        assert int(visit.text("#pages")) > 0
        assert visit.page.locator("#used").get_attribute("hidden") == (None if len(keys) == 1 else "")
        watched = live.client.get("/metrics", headers={"authorization": f"Bearer {KEY}"})
        assert watched.status_code == (200 if len(keys) == 1 else 403)
        visit.context.close()


def test_a_mistake_is_told_in_words(browser: Any, live: Live) -> None:
    visit = Visit(browser, live)
    visit.say("x" * 2100)
    visit.page.wait_for_selector(".turn.error")
    assert "fills the context of 2048" in visit.text(".turn.error .text")
    visit.context.close()
