"""The review in a real browser (Debian's Chromium) against a real server, on both stores."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cxrbatch.store import Store
from cxrbatch.store.connection import connect
from cxrbatch.store.review_schema import reads, review_status, reviews
from cxrbatch.store.rounds import NewRound, create_round
from cxrbatch.store.work_list import Filters
from review_server import PASSWORD, Server, fill, make_users, serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'cxrbatch[test]'")

CHROMIUM = os.environ.get("CXRBATCH_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium"),
    pytest.mark.timeout(300),
]
WAIT_MS = 40_000
NOT_POSSIBLE = "It is not possible now."
#: What the page has said and done, for a test to wait for and a failure to tell: a note is gone after four seconds.
LOG = """{
  window.said = []; window.log = [];
  const wrote = (...what) => log.push([Math.round(performance.now()), ...what].join(" ")), send = fetch;
  addEventListener("keydown", (event) => wrote("key", event.key), true);
  window.fetch = async (url, options) => {
    const what = `${url} ${options?.body?.slice(50, 110) ?? ""}`;
    try { const answer = await send(url, options); wrote(answer.status, what); return answer; }
    catch (error) { wrote("no answer", what); throw error; } };
  const watch = (id, seen) => {
    const place = document.getElementById(id), saw = () => { said.push(seen(place)); wrote(id, seen(place)); };
    if (place) new MutationObserver(saw).observe(place, { childList: true, attributeFilter: ["data-shown"] }); };
  addEventListener("DOMContentLoaded", () => {
    for (const id of ["message", "banner"]) watch(id, (place) => place.textContent);
    watch("workplace", (place) => place.dataset.shown);
  }); }"""


#: Names of fields that stick out of their box.
FIELDS_OUTSIDE = """[...document.querySelectorAll("fieldset input, fieldset select")].filter(
  (field) => field.getBoundingClientRect().right > field.closest("fieldset").getBoundingClientRect().right)
  .map((field) => field.name)"""

#: The first request of a page gets an answer that ends early; waits are a tenth.
ONE_ANSWER_BREAKS_OFF = """{
  const later = setTimeout, send = fetch, broken = { ok: true, text: () => Promise.reject(new TypeError("cut")) };
  window.setTimeout = (f, ms) => later(f, ms / 10);
  window.fetch = (...request) => { window.fetch = send; return Promise.resolve(broken); }; }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(autouse=True)
def close_tabs(browser: Any) -> Iterator[None]:
    yield
    for context in browser.contexts:
        context.close()


@pytest.fixture
def store(store_url: str, tmp_path: Path) -> Iterator[Store]:
    with Store.open(store_url) as opened:
        fill(opened, tmp_path / "incoming")
        make_users(opened)
        yield opened


@pytest.fixture
def server(store: Store, store_url: str, tmp_path: Path) -> Iterator[Server]:
    with serving(store_url, tmp_path) as started:
        yield started


class Tab:
    """A page of the review, and everything that goes wrong in it."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.add_init_script(LOG)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.server, self.problems = server, list[str]()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        self.answer_acts(None)
        # From the start: Chromium lets a request by that follows at once on a new route or on one that was taken away.
        self.page.route("**/api/acts", lambda route: self.answer(route))
        self.refused: list[str] = []  # what the server refused, and requests that got no answer
        self.page.on(
            "response", lambda answer: answer.status >= 400 and self.refused.append(f"{answer.status} {answer.url}")
        )
        self.page.on(  # not the page's icon, which the next page breaks off
            "requestfailed",
            lambda request: "/api/" in request.url and self.refused.append(f"{request.failure} {request.url}"),
        )

    def log_in(self, name: str) -> Tab:
        self.page.goto(self.server.address + "/login")
        self.page.fill("input[name=name]", name)
        self.page.fill("input[name=password]", PASSWORD)
        self.page.click("button.primary")
        self.page.wait_for_url("**/images*")
        return self

    def goto(self, path: str) -> None:
        self.page.goto(self.server.address + path)

    def shown(self, key: int | str) -> None:
        try:
            self.page.wait_for_selector(f'#workplace[data-shown="{key}"]')
        except playwright.TimeoutError:
            raise AssertionError(f"Image {key} was not shown. {self.told()}") from None

    def told(self) -> str:
        """For the message of a failure: keys, requests and what was shown, in the order that the page had them."""
        return "\n".join([*self.refused, *self.problems, *self.page.evaluate("window.log")])

    def says(self, text: str) -> None:
        """Wait until the page has said this over the image or in the panel."""
        self.until(f"said.some((each) => each?.includes({text!r}))")

    def at_first_image(self) -> Tab:
        self.goto("/images/1?decision=needs_review")
        self.shown(1)
        return self

    def answer_acts(self, answer: Callable[[Any], Any] | None) -> None:
        """Who answers acts from now on; None: the server."""
        self.answer = answer or (lambda route: route.continue_())

    def refuses_acts(self) -> None:
        self.answer_acts(lambda route: refuse(route))

    def holds_saves(self) -> list[Any]:
        """The routes of acts from now on, which nobody answers but the test."""
        held: list[Any] = []
        self.answer_acts(held.append)
        return held

    def holds(self, saves: list[Any], count: int) -> None:
        """Wait until the list is so long: the page shows the next image before its request is here."""
        for _ in range(WAIT_MS // 100):
            if len(saves) >= count:
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"There are {len(saves)} of these, not {count}. {self.told()}")

    def press(self, key: str, then: int | str) -> None:
        """A key, then the image that it leads to."""
        self.page.keyboard.press(key)
        self.shown(then)

    def until(self, expression: str) -> None:
        """Playwright's own waiting evaluates text inside the page, which its CSP forbids."""
        for _ in range(WAIT_MS // 100):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"it never came true: {expression}")

    def saved(self) -> None:
        self.until("JSON.parse(sessionStorage.getItem('pending') ?? '[]').length === 0")

    def canvas(self) -> list[int]:
        """The grey levels in the middle row of the canvas."""
        found: list[int] = self.page.evaluate(
            """() => { const c = document.getElementById('canvas');
            const row = c.getContext('2d').getImageData(0, c.height / 2, c.width, 1).data;
            return [...row].filter((_, i) => i % 4 === 0); }"""
        )
        return found

    def canvas_once(self, holds: Callable[[list[int]], bool]) -> list[int]:
        """The canvas when it is so: a busy machine draws late."""
        for _ in range(WAIT_MS // 100):
            if holds(found := self.canvas()):
                return found
            self.page.wait_for_timeout(100)
        raise AssertionError("the canvas never became so")


def refuse(route: Any) -> None:
    route.fulfill(status=409, json={"detail": NOT_POSSIBLE})


def as_if_reduced(route: Any) -> None:
    """A small image says that it shows a ninth of its pixels a side."""
    answer = route.fetch()
    route.fulfill(response=answer, body=answer.body().replace(b'"step": 1,', b'"step": 9,', 1))


def rows(store: Store, table: sa.Table, *columns: str) -> list[tuple[Any, ...]]:
    with connect(store.engine) as connection:
        found = connection.execute(sa.select(*(table.c[name] for name in columns)).order_by(*table.primary_key.columns))
        return [tuple(row) for row in found]


def test_g_goes_round_the_images_of_a_study_and_keeps_the_list(browser: Any, server: Server) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    assert tab.page.locator("#related a").inner_text().startswith("image_1.png · ")
    for then in (2, 1):
        tab.press("g", then)
        tab.page.wait_for_url(f"**/images/{then}?decision=needs_review")


def test_a_reader_works_through_the_list(browser: Any, server: Server, store: Store) -> None:
    tab = Tab(browser, server).log_in("dr_a")
    page = tab.page
    tab.goto("/images?decision=needs_review")
    assert page.locator("tr[data-id]").count() == 6
    page.select_option("select[name=label]", "NORMAL")
    page.click("button:has-text('Filter')")
    page.wait_for_url("**/images?decision=needs_review&label=NORMAL")
    assert page.locator("tr[data-id]").count() == 2
    tab.goto("/images?decision=needs_review")
    assert page.locator("h1").inner_text() == "6 images"
    for key in ("n", "n", "p", "Enter"):
        page.keyboard.press(key)
    tab.shown(1)
    assert page.locator("#answer .says strong").inner_text() == "NORMAL"
    assert "NaN" not in page.locator("#readout").inner_text()
    before = tab.canvas()
    assert max(before) > 100
    page.keyboard.press("i")
    tab.canvas_once(lambda inverted: inverted != before)
    page.keyboard.press("i")
    tab.canvas_once(lambda again: again == before)
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 300)
    page.mouse.down()
    page.mouse.move(box["x"] + 420, box["y"] + 380, steps=4)
    page.mouse.up()
    windowed = tab.canvas_once(lambda now: now != before)
    page.keyboard.press("ArrowUp")
    brighter = tab.canvas_once(lambda now: now != windowed)
    page.keyboard.press("Shift+ArrowRight")
    tab.canvas_once(lambda moved: moved[20:] == brighter[:-20] and moved != brighter)
    tab.press("a", 2)  # accept
    tab.press("3", 3)  # override
    tab.press("o", 4)
    tab.press("f", 5)
    tab.press("s", 6)
    tab.press("p", 5)
    page.fill("#comment", "a 2 in a comment is no key")
    page.keyboard.press("2")
    assert page.url.split("/")[-1].startswith("5")
    page.locator("#comment").blur()
    tab.press("u", 6)
    tab.saved()
    tab.press("z", 5)  # undo
    assert page.locator(".history li").count() == 3
    made = rows(store, reviews, "image_id", "action", "label", "shown_label", "comment")
    # Acts on different images are sent side by side and may be saved in any order.
    assert sorted(made, key=lambda row: row[0]) == [
        (1, "accept", "NORMAL", "NORMAL", ""),
        (2, "override", "PNEUMONIA", "COVID19", ""),
        (3, "override", "OTHER_ABNORMAL", "PNEUMONIA", ""),
        (4, "flag", None, "TUBERCULOSIS", ""),
        (5, "skip", None, "NORMAL", ""),
        (5, "override", "UNREADABLE", "NORMAL", "a 2 in a comment is no key2"),
        (5, "withdraw", None, "NORMAL", ""),
    ]
    assert rows(store, review_status, "image_id", "status") == [
        (1, "agreed"),
        (2, "agreed"),
        (3, "agreed"),
        (4, "flagged"),
    ]
    with connect(store.engine) as connection:
        timed = connection.execute(sa.select(reviews.c.active_ms, reviews.c.opened_at)).all()
    assert all(row.active_ms is not None and row.opened_at is not None for row in timed)
    page.go_back()  # the back key shows an image again and does nothing to it
    page.wait_for_timeout(300)
    assert len(rows(store, reviews, "id")) == 7
    tab.goto("/images?reviewed=mine")
    assert page.locator("tr[data-id]").count() == 4
    page.click("text=Log out")
    page.wait_for_url("**/login")
    tab.goto("/images")
    page.wait_for_url("**/login")
    assert tab.problems == []


def test_two_readers_read_blinded_and_a_third_decides(browser: Any, server: Server, store: Store) -> None:
    chief = Tab(browser, server).log_in("chief")
    chief.goto("/rounds")
    chief.page.set_viewport_size({"width": 768, "height": 1024})
    assert chief.page.evaluate(FIELDS_OUTSIDE) == []
    chief.page.fill("input[name=name]", "November")
    chief.page.fill("input[name=repeat_percent]", "0")
    for name in ("dr_a", "dr_b"):
        chief.page.check(f"input[name=readers][value={name}]")
    chief.page.fill("input[name=size]", "2")
    chief.page.click("text=Make the round")
    chief.page.wait_for_url("**/rounds/1")
    for name, keys in (("dr_a", "11"), ("dr_b", "21")):
        tab = Tab(browser, server).log_in(name)
        tab.goto("/rounds/1/read")
        tab.shown(1)
        assert "Blinded" in tab.page.locator("#answer").inner_text()
        assert tab.page.locator(".accept").count() == 0
        tab.press(keys[0], 2)
        tab.page.keyboard.press(keys[1])
        tab.page.wait_for_selector("#answer .final:has-text('You')")
        tab.saved()
        assert tab.problems == []
        tab.context.close()
    assert len(rows(store, reads, "label")) == 4
    chief.goto("/rounds/1")
    chief.page.click("a:has-text('Decide')")
    chief.page.wait_for_selector("#workplace[data-shown]")
    assert chief.page.locator(".history li").count() == 2
    chief.page.keyboard.press("2")
    chief.saved()
    chief.goto("/rounds/1")
    if chief.page.locator("a:has-text('Decide')").count():  # the orders of the two differ: they may disagree on both
        chief.page.click("a:has-text('Decide')")
        chief.page.wait_for_selector("#workplace[data-shown]")
        chief.page.keyboard.press("1")
        chief.saved()
    assert "adjudicated" in {row[0] for row in rows(store, review_status, "status")}
    chief.goto("/rounds/1")
    chief.page.click("summary:has-text('Close the round')")  # it cannot be opened again, so one click is not enough
    chief.page.click("button:has-text('Close the round')")
    chief.page.click("#main a:has-text('Report')")
    chief.page.wait_for_url("**/reports?round=1")
    assert chief.page.locator("text=Cohen's kappa").count() == 1
    assert chief.problems == []


def test_a_reading_that_is_slow_to_be_saved_is_not_unread_again(browser: Any, server: Server, store: Store) -> None:
    create_round(store, NewRound("Slow", ("dr_a",), Filters(), "{}", 2, reads_per_image=1), "chief")
    tab = Tab(browser, server).log_in("dr_a")
    tab.goto("/rounds/1/read")
    tab.shown(1)
    saves = tab.holds_saves()
    tab.press("1", 2)
    tab.page.keyboard.press("2")
    for save in (1, 0):  # the second is saved first
        while len(saves) < 2:
            tab.page.wait_for_timeout(50)
        saves[save].continue_()
        tab.page.wait_for_timeout(500)
    tab.page.wait_for_selector("#answer .final:has-text('You')")
    tab.shown(2)
    assert sorted(row[0] for row in rows(store, reads, "label")) == ["COVID19", "NORMAL"]
    assert tab.problems == []


def test_undo_in_a_round_takes_back_nothing_of_the_list(browser: Any, server: Server, store: Store) -> None:
    create_round(store, NewRound("Undo", ("dr_a",), Filters(), "{}", 2, reads_per_image=1), "chief")
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    tab.press("a", 2)
    tab.saved()
    tab.goto("/rounds/1/read")
    tab.shown(1)
    tab.page.keyboard.press("z")
    tab.says("There is nothing to undo.")
    assert rows(store, reviews, "action") == [("accept",)]


def test_a_failed_save_comes_back_to_its_image(browser: Any, server: Server, store: Store) -> None:
    tab, other = (Tab(browser, server).log_in(name) for name in ("dr_a", "dr_b"))
    tab.page.route("**/api/images/1/pixels?size=reduced", as_if_reduced)
    for each in (tab, other):  # who opens it last is who the other one is told of
        with each.page.expect_response("**/api/images/1/opened"):
            each.goto("/images/1?decision=needs_review")
    tab.shown(1)
    tab.page.bring_to_front()
    whole = "!document.getElementById('readout').textContent.includes('reduced')"
    tab.until(whole)
    tab.refuses_acts()
    tab.page.fill("#comment", "hilum")
    tab.page.locator("#comment").blur()
    tab.page.keyboard.press("a")
    tab.page.wait_for_selector("#banner:has-text('Not saved: It is not possible now.')")
    tab.page.wait_for_selector("#open-by:has-text('dr_b has this image open too.')")
    assert tab.page.locator("#banner").inner_text() == "Not saved: It is not possible now."
    assert "/images/1" in tab.page.url
    assert rows(store, reviews, "id") == []
    tab.shown(1)
    tab.until(whole)
    tab.answer_acts(None)
    tab.press("a", 2)
    tab.saved()
    assert rows(store, reviews, "image_id", "comment") == [(1, "hilum")]


def test_a_failed_save_takes_no_other_act_off_the_undo_list(browser: Any, server: Server, store: Store) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    saves = tab.holds_saves()
    tab.press("a", 2)
    tab.press("a", 3)
    tab.holds(saves, 2)
    saves[1].continue_()
    tab.holds(saves, 1)
    refuse(saves[0])
    tab.page.wait_for_selector("#banner:has-text('Not saved: It is not possible now.')")
    tab.shown(1)
    tab.saved()
    tab.answer_acts(None)
    tab.press("z", 2)
    tab.saved()
    assert rows(store, reviews, "image_id", "action") == [(2, "accept"), (2, "withdraw")]


def test_of_several_failed_saves_none_is_forgotten(browser: Any, server: Server, store: Store) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    saves = tab.holds_saves()
    tab.press("a", 2)
    tab.press("a", 3)
    tab.holds(saves, 2)
    for save in saves:
        refuse(save)
    tab.page.wait_for_selector("#banner:has-text('It is not possible now. Not saved either: image_0.dcm.')")
    tab.shown(2)
    tab.answer_acts(None)
    tab.press("a", 3)
    assert tab.page.locator("#banner").inner_text() == "Not saved either: image_0.dcm."
    tab.press("p", 2)
    tab.press("p", 1)
    tab.press("a", 2)
    tab.saved()
    tab.press("n", 3)
    assert tab.page.locator("#banner").inner_text() == ""
    assert rows(store, reads, "image_id") == [(1,), (2,)]


def test_a_failed_save_is_forgotten_when_a_later_act_on_the_image_is_saved(
    browser: Any, server: Server, store: Store
) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    saves: list[Any] = []
    tab.answer_acts(lambda route: route.continue_() if saves else saves.append(route))
    tab.press("a", 2)
    tab.press("p", 1)
    tab.press("2", 2)  # waits for the first
    tab.holds(saves, 1)
    refuse(saves[0])
    tab.page.wait_for_selector("#banner:has-text('Not saved: It is not possible now.')")
    tab.shown(1)
    tab.saved()
    assert tab.refused == [f"409 {server.address}/api/acts"], tab.told()
    assert tab.page.locator("#banner").inner_text() == f"Not saved: {NOT_POSSIBLE}", tab.told()
    tab.answer_acts(None)
    tab.press("n", 2)
    assert tab.page.locator("#banner").inner_text() == "", tab.told()
    assert rows(store, reads, "image_id", "label") == [(1, "COVID19")]


def test_a_key_before_its_image_does_nothing_and_says_so(browser: Any, server: Server, store: Store) -> None:
    tab = Tab(browser, server).log_in("dr_a")
    asked: list[Any] = []
    tab.page.route("**/api/images/2?*", lambda route: asked.append(route))
    tab.at_first_image()
    tab.page.keyboard.press("1")
    tab.page.keyboard.press("2")  # for the second image, while the first one is still there
    tab.says("Nothing was done")
    tab.page.keyboard.press("n")
    tab.holds(asked, 1)
    asked[0].continue_()
    tab.shown(3)
    tab.saved()
    assert rows(store, reviews, "image_id", "label") == [(1, "NORMAL")]


def test_a_double_click_acts_on_one_image(browser: Any, server: Server, store: Store) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    tab.page.dblclick(".accept", delay=100)
    tab.says("A double click counts once.")
    tab.shown(2)
    tab.saved()
    assert rows(store, reviews, "image_id") == [(1,)]


def test_a_failed_save_waits_for_a_comment_and_for_the_reader(browser: Any, server: Server, store: Store) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    tab.page.evaluate(
        "window.held = []; const later = setTimeout;"
        "window.setTimeout = (f, ms) => (ms === 700 ? held.push(f) : later(f, ms))"
    )
    saves = tab.holds_saves()
    tab.press("a", 2)
    tab.holds(saves, 1)
    tab.page.locator("#comment").press_sequentially("effu")
    refuse(saves[0])
    tab.says(f"image_0.dcm is not saved: {NOT_POSSIBLE}")
    tab.page.locator("#comment").press_sequentially("sion")
    assert tab.page.input_value("#comment") == "effusion"
    assert "/images/2" in tab.page.url
    tab.page.locator("#comment").blur()
    tab.until("held.length === 1")
    tab.page.keyboard.press("3")  # for the second image, from which the page has just gone
    tab.says("Nothing was done")
    tab.page.evaluate("held[0]()")
    tab.shown(1)
    tab.answer_acts(None)
    tab.press("a", 2)
    tab.saved()
    assert tab.page.input_value("#comment") == "effusion"
    assert rows(store, reviews, "image_id", "action", "comment") == [(1, "accept", "")]


def test_a_click_that_ends_a_comment_counts_before_the_page_goes_back(
    browser: Any, server: Server, store: Store
) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    saves = tab.holds_saves()
    tab.press("a", 2)
    tab.holds(saves, 1)
    tab.page.locator("#comment").press_sequentially("effusion")
    refuse(saves[0])
    tab.says(f"image_0.dcm is not saved: {NOT_POSSIBLE}")
    tab.answer_acts(None)
    tab.page.click(".accept", delay=100)
    tab.shown(1)
    tab.saved()
    assert rows(store, reviews, "image_id", "comment") == [(2, "effusion")]


def test_a_tab_asks_before_it_closes_on_an_act_that_is_not_saved(browser: Any, server: Server, store: Store) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    asked: list[str] = []
    tab.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    saves = tab.holds_saves()
    tab.press("a", 2)
    tab.holds(saves, 1)
    saves[0].fulfill(status=503, json={"detail": "Nothing was kept."})
    tab.holds(saves, 2)
    tab.page.close(run_before_unload=True)
    tab.holds(asked, 1)
    tab.answer_acts(None)
    saves[1].continue_()
    tab.saved()
    assert asked == ["beforeunload"]
    assert rows(store, reviews, "image_id") == [(1,)]


def busy_for(tab: Tab, label: str, tries: int) -> None:
    """The server keeps nothing of acts with this label so many times; the page tries again after 0.3, 1 and 3 s."""
    left = [tries]

    def answer(route: Any) -> None:
        left[0] -= route.request.post_data_json["label"] == label
        if left[0] >= 0 and route.request.post_data_json["label"] == label:
            route.fulfill(status=503, json={"detail": "Nothing was kept: try again."})
        else:
            route.continue_()

    tab.answer_acts(answer)


def test_a_later_act_on_an_image_is_not_replaced_by_one_that_is_tried_again(
    browser: Any, server: Server, store: Store
) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    busy_for(tab, "COVID19", 3)
    tab.press("2", 2)
    tab.press("p", 1)
    tab.press("3", 2)
    tab.saved()
    assert rows(store, reads, "image_id", "label") == [(1, "PNEUMONIA")]


def test_an_undo_waits_for_the_act_that_it_takes_back(browser: Any, server: Server, store: Store) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    busy_for(tab, "COVID19", 3)
    tab.press("2", 2)
    tab.press("z", 1)
    tab.saved()
    assert rows(store, reviews, "image_id", "action") == [(1, "override"), (1, "withdraw")]
    assert rows(store, reads, "image_id") == []


def test_an_undo_that_is_not_saved_can_be_made_again(browser: Any, server: Server, store: Store) -> None:
    tab = Tab(browser, server).log_in("dr_a").at_first_image()
    tab.press("a", 2)
    tab.press("a", 3)
    tab.saved()
    tab.page.evaluate("const later = setTimeout; window.setTimeout = (f, ms) => later(f, ms / 20)")  # it tries for 12 s
    tab.answer_acts(lambda route: route.fulfill(status=503, json={"detail": "Nothing was kept."}))
    tab.page.keyboard.press("z")
    tab.page.wait_for_selector("#banner:has-text('Not undone: Nothing was kept.')")
    tab.answer_acts(None)
    tab.press("z", 2)
    tab.saved()
    assert rows(store, reads, "image_id", "label") == [(1, "NORMAL")]
    saves = tab.holds_saves()
    tab.page.keyboard.press("z")
    tab.holds(saves, 1)
    tab.page.locator("#comment").press_sequentially("effu")
    saves[0].continue_()
    tab.says("image_0.dcm: your reading is withdrawn.")
    tab.page.locator("#comment").press_sequentially("sion")  # does not end on the image that the undo is of
    assert "/images/2" in tab.page.url
    assert tab.page.input_value("#comment") == "effusion"


@pytest.mark.parametrize("point", ["review.written", "review.before_commit", "review.committed"])
def test_killed_between_key_and_answer_the_act_is_there_once(
    browser: Any, store: Store, store_url: str, tmp_path: Path, point: str
) -> None:
    with serving(store_url, tmp_path, CXRBATCH_FAILPOINT=point) as server:
        tab = Tab(browser, server).log_in("dr_a")
        tab.goto("/images/1?decision=needs_review")
        tab.shown(1)
        tab.page.keyboard.press("2")
        assert server.process is not None
        while server.process.poll() is None:
            tab.page.wait_for_timeout(100)  # acts reach the server through `answer`, while Playwright runs
        assert server.process.returncode == -signal.SIGKILL
        assert len(rows(store, reviews, "id")) == (1 if point == "review.committed" else 0)
        server.environment = {}
        server.start()  # on the same port: the tab sends the act again by itself, under its id
        tab.saved()
        if not rows(store, reviews, "id"):  # it gave up before the server was back, and says so
            tab.page.wait_for_selector("#banner:has-text('Not saved')")
            tab.shown(1)
            tab.page.keyboard.press("2")
            tab.page.wait_for_timeout(500)
            tab.saved()
        assert rows(store, reviews, "image_id", "label") == [(1, "COVID19")]


def test_new_rows_appear_by_themselves(browser: Any, server: Server, store: Store, tmp_path: Path) -> None:
    from cxrbatch.types import Decision
    from review_server import scored, write_image
    from store_images import begin

    tab = Tab(browser, server).log_in("dr_a")
    tab.page.add_init_script(ONE_ANSWER_BREAKS_OFF)
    asked: list[Any] = []
    tab.page.route(
        "**/images?*",
        lambda route: route.continue_() if asked or "x-fragment" not in route.request.headers else asked.append(route),
    )
    tab.goto("/images?decision=needs_review")
    assert tab.page.locator("tr[data-id]").count() == 6
    tab.holds(asked, 1)  # a row that is chosen while its page asks for new ones stays under the hand
    tab.page.focus("tr[data-id='3'] a")
    with tab.page.expect_response("**/images?*"):
        asked[0].continue_()
    tab.until("log.some((each) => each.includes('200 http'))")
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("document.activeElement.closest('tr').dataset.id") == "3"
    tab.page.locator("tr[data-id='3'] a").blur()
    run = begin(store)
    outcome = scored(write_image(tmp_path / "incoming", 77), "NORMAL", 0.2, Decision.NEEDS_REVIEW)
    store.record(run.run_id, run.cascade_id, [outcome])
    tab.page.wait_for_selector("text=image_77.png")
    assert tab.page.locator("#live").inner_text() == "1 new"


@pytest.mark.parametrize("where", ["list", "image", "rejected", "rounds", "reports", "login"])
def test_pages_have_no_serious_fault_for_assistive_tools(browser: Any, server: Server, where: str) -> None:
    """axe-core is MPL-2.0: it is not in this repository. CXRBATCH_TEST_AXE names its axe.min.js."""
    script = os.environ.get("CXRBATCH_TEST_AXE", "")
    if not os.path.isfile(script):
        pytest.skip("needs axe-core: npm pack axe-core, and CXRBATCH_TEST_AXE=…/axe.min.js")
    tab = Tab(browser, server, bypass_csp=True).log_in("chief")
    paths = {"list": "/images", "image": "/images/1", "rejected": "/rejected", "rounds": "/rounds"}
    tab.goto(paths.get(where, f"/{where}"))
    if where == "image":
        tab.shown(1)
    tab.page.add_script_tag(path=script)
    found = tab.page.evaluate("axe.run().then((r) => r.violations.map((v) => [v.impact, v.id, v.nodes[0].html]))")
    assert [each for each in found if each[0] in ("serious", "critical")] == []
