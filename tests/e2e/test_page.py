"""The pages in Chromium, before a real service: what people do, what goes wrong, and that no other host is asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests.builders import measured_gains, tiny_bundle
from tests.e2e.conftest import ServiceProcess, StartService
from tests.tools import require_program
from tests.waiting import DEADLINE


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = require_program("the pages are", "install Chromium; Debian's package chromium has it", *names)
    expect.set_options(timeout=1000 * DEADLINE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


KEY = "sesame"


@pytest.fixture(scope="module")
def service(start_service: StartService, tmp_path_factory: pytest.TempPathFactory) -> ServiceProcess:
    """Everybody may ask; who has the key may change what is served, to the bundle `next` too."""
    models = tmp_path_factory.mktemp("models")
    tiny_bundle(models / "next", seed=1)
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    return start_service(variables={"STREAMREC_ADMIN_KEYS": digest, "STREAMREC_MODELS_DIR": str(models)})


class Visit:
    """A page of its own, which keeps what it asked for and what went wrong in it."""

    def __init__(self, browser: Browser, address: str, **options: object) -> None:
        self.context = browser.new_context(base_url=address, **options)  # type: ignore[arg-type]
        self.context.set_default_timeout(1000 * DEADLINE)
        self.page: Page = self.context.new_page()
        self.address, self.asked, self.faults = address, list[str](), list[str]()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        # What the browser itself says of an answer of 4xx or 5xx is expected where a test provokes one.
        self.page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and "Failed to load resource" not in message.text
                and self.faults.append(message.text)
            ),
        )

    def open(self, path: str = "/") -> Page:
        self.page.goto(path)
        return self.page

    def close(self) -> None:
        self.context.close()
        assert self.faults == []
        foreign = [url for url in self.asked if not url.startswith((self.address + "/", "data:"))]
        assert foreign == [], "the page asked another host"


@pytest.fixture
def visit(browser: Browser, service: ServiceProcess) -> Iterator[Visit]:
    visit = Visit(browser, service.address)
    yield visit
    visit.close()


def columns(page: Page) -> list[str]:
    """The headings of the answers, once no request is running."""
    expect(page.locator("#columns[aria-busy=false]")).to_be_visible()
    return page.locator("#columns h3").all_inner_texts()


def history(page: Page) -> list[str]:
    return page.locator("#history li:not(.empty) > span").all_inner_texts()


def set_steps(page: Page, steps: int) -> None:
    page.locator("#steps").evaluate(
        "(slider, steps) => { slider.value = steps; slider.dispatchEvent(new Event('input')); }", str(steps)
    )


def test_a_history_by_clicking_and_answers_side_by_side(visit: Visit) -> None:
    page = visit.open()
    assert columns(page) == ["Without reasoning", "After 2 steps"]
    assert len(history(page)) == 3  # an example to start from
    page.get_by_role("button", name="Clear").click()
    assert columns(page) == ["Popular now"] and history(page) == []
    expect(page.locator("#reasoning")).to_be_hidden()

    page.get_by_role("searchbox").fill("number 17")
    page.locator("#suggestions").get_by_role("button", name="Thing number 17").click()
    assert columns(page) == ["Without reasoning", "After 2 steps"] and history(page) == ["Thing number 17"]
    first = page.locator("#columns article").nth(1).locator(".results button").first
    named = first.locator(".title").inner_text()
    first.click()  # an answer is taken into the history
    assert columns(page) and history(page) == ["Thing number 17", named]
    page.get_by_role("button", name="Remove Thing number 17").click()
    assert columns(page) and history(page) == [named]


def test_the_slider_changes_what_is_compared(visit: Visit, service: ServiceProcess) -> None:
    page = visit.open()
    columns(page)
    expect(page.locator("#steps-value")).to_have_text("2 steps")  # the model's default
    set_steps(page, 3)
    expect(page.locator("#columns h3").nth(1)).to_have_text("After 3 steps")
    expect(page.locator("#steps-value")).to_have_text("3 steps")
    shown = page.locator("#columns article").nth(1).locator(".title").all_inner_texts()
    items = service.http.get("/items", params={"limit": 3}).json()["items"]
    answer = service.recommend(3, history=[item["item_id"] for item in items], k=8)
    assert shown == [item["title"] for item in answer["items"]]
    # the same user and history: the states are in the cache by now
    assert "cache memory" in page.locator("#columns article").nth(1).inner_text()
    expect(page.locator("#compared")).to_have_text("compared with no reasoning")
    set_steps(page, 0)
    expect(page.locator("#columns h3")).to_have_text(["Without reasoning"])
    expect(page.locator("#compared")).to_be_hidden()
    page.get_by_role("button", name="Keep these settings to compare with").click()
    expect(page.locator("#compared")).to_contain_text("compared with 0 steps")


def test_what_steps_gain_and_cost_stands_beside_the_slider(
    browser: Browser, start_service: StartService, tmp_path: Path
) -> None:
    gains = [(0.003, -0.001, 0.007), (0.02, 0.015, 0.025), (0.021, 0.016, 0.026), (-0.005, -0.009, -0.001)]
    service = start_service(of=tiny_bundle(tmp_path / "measured", accuracy=measured_gains(gains)))
    visit = Visit(browser, service.address, viewport={"width": 360, "height": 740})
    page = visit.open()
    columns(page)
    medians = [f"{row['median_ms']:.1f}" for row in service.http.get("/models").json()["models"][0]["by_steps"]]
    table, worth = page.locator("#by-steps-rows"), page.locator("#worth")
    expect(table).to_be_hidden()
    page.locator("#by-steps summary").press("Enter")
    expect(page.get_by_text("worth their time only where the table shows a gain")).to_be_visible()
    expect(table.locator("tr").nth(0)).to_have_text(re.compile(r"^00\.4000–\d+\.\d$"))
    expect(table.locator("tr").nth(2).locator("td")).to_have_text(
        ["2", "0.4200", "+0.0200 (+0.0150 to +0.0250)", re.compile(r"^\d+\.\d$")]
    )
    assert table.locator("td:last-child").count() == len(medians) == 5
    expect(page.locator("#by-steps-source")).to_have_text(
        "Accuracy is that of 2,000 of 20,000 validation users at export, who would show a gain of 0.0071 or more. "
        "reasoning_steps=auto takes 2 or none, as the time budget permits."
    )
    assert page.locator("#by-steps .scrolling").evaluate("(box) => box.scrollWidth <= box.clientWidth")
    said = {
        4: "Less accurate than without reasoning: NDCG@10 −0.0050, 95% interval −0.0090 to −0.0010. A search takes ",
        2: "More accurate than without reasoning: NDCG@10 +0.0200, 95% interval +0.0150 to +0.0250. A search takes ",
        1: "No gain distinguishable from chance: NDCG@10 +0.0030, 95% interval −0.0010 to +0.0070. A search takes ",
        0: "The model names items at once; move the slider to compare with more steps. A search takes ",
    }
    for steps, words in said.items():
        set_steps(page, steps)
        expect(worth).to_contain_text(words)
    visit.close()


def test_a_model_of_which_nothing_was_measured_says_so(visit: Visit) -> None:
    page = visit.open()
    columns(page)
    set_steps(page, 4)
    expect(page.locator("#worth")).to_contain_text("What steps gain was not measured for this model. A search takes ")
    page.locator("#by-steps summary").click()
    expect(page.locator("#by-steps-rows tr").last.locator("td")).to_have_text(["4", "–", "–", re.compile(r"\d\.\d")])
    expect(page.locator("#by-steps-source")).to_have_text(
        "Accuracy was not measured for this model. Gains were not measured, so reasoning_steps=auto takes as many "
        "steps as the time budget permits."
    )


def test_settings_can_be_kept_to_compare_others_with(visit: Visit) -> None:
    page = visit.open()
    columns(page)
    kept, changed = page.locator("#columns article").first, page.locator("#columns article").last
    before = changed.locator(".title").all_inner_texts()
    page.get_by_role("button", name="Keep these settings to compare with").click()
    expect(page.locator("#columns h3").first).to_have_text("Kept settings")
    page.get_by_text("Rules and settings").click()
    page.get_by_label("Most of a category").fill("1")
    expect(changed.locator(".title")).to_have_count(2)  # there are two categories
    set_steps(page, 1)
    expect(page.locator("#columns h3")).to_have_text(["Kept settings", "After 1 step"])
    assert kept.locator(".title").all_inner_texts() == before
    expect(page.locator("#compared")).to_have_text("compared with 2 steps · k 8 · beam width 50")
    page.get_by_role("button", name="Compare with no reasoning").click()
    expect(page.locator("#columns h3")).to_have_text(["Without reasoning", "After 1 step"])


def test_a_filter_limits_the_answer_and_a_wrong_one_is_reported(visit: Visit) -> None:
    page = visit.open()
    columns(page)
    page.get_by_text("Rules and settings").click()
    page.get_by_label("Filter").fill('categories has "odd"')
    tags = page.locator("#columns article").last.locator(".tags")
    expect(tags).to_have_text(["odd"] * 8)
    page.get_by_label("Filter").fill("price <")
    expect(page.get_by_role("alert")).to_contain_text("Invalid request")
    page.get_by_label("Filter").fill("")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_list_goes_on_page_by_page_until_its_end_and_repeats_nothing(visit: Visit, service: ServiceProcess) -> None:
    page = visit.open()
    columns(page)
    page.get_by_text("Rules and settings").click()
    page.locator("#category").select_option("odd")
    page.locator("#k").fill("12")
    lists = page.locator("#columns article")
    expect(lists.last.locator(".title")).to_have_count(12)
    more = page.get_by_role("button", name="Show more")
    more.press("Enter")
    expect(lists.first.locator(".title")).to_have_count(24)
    expect(lists.last.locator(".title")).to_have_count(24)
    expect(more).to_be_focused()
    more.press("Enter")
    expect(more).to_be_hidden()  # 30 items are odd
    for side, steps in (("first", 0), ("last", 2)):
        shown = getattr(lists, side).locator("[data-item]").evaluate_all("(all) => all.map((one) => one.dataset.item)")
        clicked = [f"i{title.split()[-1]}" for title in history(page)]
        rules = {"history": clicked, "categories": ["odd"], "k": 50, "beam_width": 50}
        assert shown == [item["item_id"] for item in service.recommend(steps, **rules)["items"]]
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#columns h3")).to_have_text(["Popular now"])
    expect(lists.last.locator(".title")).to_have_count(12)
    more.click()
    expect(lists.last.locator(".title")).to_have_count(24)  # popular ones go on as well


def test_boosts_and_slots_for_new_items_change_the_answer(visit: Visit, service: ServiceProcess) -> None:
    page = visit.open()
    columns(page)
    page.get_by_text("Rules and settings").click()
    page.get_by_label("Boost what passes").fill('categories has "odd"')
    page.get_by_label("Times").fill("1000")
    tags = page.locator("#columns article").last.locator(".tags")
    expect(tags).to_have_text(["odd"] * 8)
    page.get_by_label("Times").fill("0.001")
    expect(tags).to_have_text(["even"] * 8)
    page.get_by_role("button", name="Keep these settings to compare with").click()
    expect(page.locator("#compared")).to_contain_text('boost categories has "odd" ×0.001')
    page.get_by_label("Boost what passes").fill("categories has")
    expect(page.get_by_role("alert")).to_contain_text("Invalid request")
    page.get_by_label("Boost what passes").fill("")
    expect(page.get_by_role("alert")).to_be_hidden()
    with page.expect_request(lambda request: '"explore":2' in (request.post_data or "")):
        page.get_by_label("Slots for new items").fill("2")
    columns(page)
    shown = page.locator("#columns article").last.locator("[data-item]")
    new = min(service.http.get("/items?limit=60").json()["items"], key=lambda item: item["popularity"])
    expect(shown).to_have_count(8)
    assert new["item_id"] in shown.evaluate_all("(all) => all.map((one) => one.dataset.item)")


def test_a_scenario_presets_what_is_not_set_on_the_page(visit: Visit, service: ServiceProcess) -> None:
    page = visit.open()
    columns(page)
    page.get_by_text("Rules and settings").click()
    expect(page.locator("#scenario")).to_be_hidden()  # there is none so far
    preset = {"k": 3, "categories": ["even"], "reasoning_steps": 1}
    service.http.put("/scenarios/cart", json=preset, headers={"X-API-Key": KEY}).raise_for_status()
    page.reload()
    columns(page)
    page.get_by_text("Rules and settings").click()
    page.locator("#scenario").select_option("cart")
    expect(page.locator("#presets")).to_have_text("It presets k 3 · categories even. What is set here wins.")
    expect(page.locator("#k")).to_have_attribute("placeholder", "3")
    expect(page.locator("#columns h3")).to_have_text(["Without reasoning", "After 1 step"])
    tags = page.locator("#columns article").last.locator(".tags")
    expect(tags).to_have_text(["even"] * 3)
    page.get_by_role("button", name="Show more").click()
    expect(tags).to_have_text(["even"] * 6)
    page.locator("#category").select_option("odd")
    page.locator("#k").fill("4")
    expect(tags).to_have_text(["odd"] * 4)
    page.locator("#scenario").select_option("none")
    expect(page.locator("#presets")).to_be_hidden()
    page.locator("#k").fill("")
    expect(page.locator("#columns article").last.locator(".title")).to_have_count(8)
    service.http.delete("/scenarios/cart", headers={"X-API-Key": KEY}).raise_for_status()


def test_similar_items_stand_beside_the_newest_of_the_history(visit: Visit, service: ServiceProcess) -> None:
    page = visit.open()
    columns(page)
    newest = history(page)[-1]
    expect(page.get_by_role("heading", name=f"Similar to {newest}")).to_be_visible()
    expect(page.locator("#together")).to_be_hidden()  # this model has no item graph
    found = service.http.get(f"/items/i{newest.split()[-1]}/similar", params={"k": 5}).json()["items"]
    expect(page.locator("#alike button > span")).to_have_text([item["title"] for item in found])
    page.locator("#alike button").first.click()
    expect(page.get_by_role("heading", name=f"Similar to {found[0]['title']}")).to_be_visible()
    assert history(page)[-1] == found[0]["title"]
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#similar")).to_be_hidden()


def test_the_reasoning_the_time_and_the_service_are_shown(visit: Visit) -> None:
    page = visit.open()
    columns(page)
    set_steps(page, 4)
    expect(page.locator("#columns h3").nth(1)).to_have_text("After 4 steps")
    picture = page.locator("#map svg")
    assert re.search(
        r"from \S+ to \S+;.* after 4 steps|after 4 steps: .*from", picture.get_attribute("aria-label") or ""
    )
    assert picture.locator("g.line").count() == 8 and page.locator("#trace button").count() == 5
    assert picture.locator("g.line").first.locator("circle").count() == 5
    expect(page.locator("#trace button").nth(1)).to_contain_text(re.compile(r"token probability \d+%"))
    page.locator("#trace button").nth(1).click()
    assert page.locator("#trace button[aria-pressed=true]").inner_text().startswith("Step 1")
    expect(picture.locator("text.chosen")).to_have_text("1")
    assert [text.split()[0] for text in page.locator("#bars .legend").last.locator("li").all_inner_texts()]
    assert page.locator("#bars .timing").count() == 2
    expect(page.locator("#live")).to_contain_text("Requests per second")
    expect(page.locator("#spark svg")).to_be_visible()
    page.get_by_text("The same request from a terminal").click()
    assert "/recommend?reasoning_steps=4" in page.locator("#curl").inner_text()


def test_what_people_did_is_shown_once_somebody_did_something(visit: Visit, service: ServiceProcess) -> None:
    page = visit.open()
    columns(page)
    expect(page.locator("#feedback")).to_be_hidden()
    answer = service.recommend(1, history=["i1"])
    for event in ("impression", "click"):
        body = {"recommendation_id": answer["recommendation_id"], "item_id": answer["items"][0]["item_id"]}
        service.http.post("/feedback", json=body | {"event": event}).raise_for_status()
    page.reload()
    row = page.locator("#feedback-rows tr", has=page.locator("td:nth-child(2)", has_text=re.compile("^1$")))
    expect(row.locator("td").first).to_have_text(answer["model_version"])
    expect(row.locator("td").last).to_have_text("100.0% (20.7–100.0)")


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit.open()
    columns(page)
    page.get_by_role("button", name="Clear").press("Enter")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("number 4")
    expect(page.locator("#suggestions button").first).to_contain_text("number 4")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    chosen = page.evaluate("document.activeElement.firstChild.textContent")
    page.keyboard.press("Enter")
    assert columns(page) and history(page) == [chosen]
    page.keyboard.press("Escape")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.locator("#steps").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#columns h3").nth(1)).to_have_text("After 1 step")
    page.get_by_role("button", name=f"Remove {chosen}").press("Enter")
    expect(page.locator("#columns h3")).to_have_text(["Popular now"])


# What goes wrong


def test_an_unknown_item_is_reported_and_a_known_id_is_found(visit: Visit) -> None:
    page = visit.open()
    columns(page)
    page.get_by_role("searchbox").fill("nonesuch")
    expect(page.locator("#suggestions .empty")).to_contain_text("No title contains")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("no item with the id “nonesuch”")
    page.get_by_role("searchbox").fill("i23")
    expect(page.locator("#suggestions .empty")).to_be_visible()
    page.keyboard.press("Enter")
    assert columns(page)
    expect(page.locator("#history")).to_contain_text("Thing number 23")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_rules_that_permit_nothing_say_so(visit: Visit) -> None:
    page = visit.open()
    columns(page)
    page.get_by_role("searchbox").fill("nothing like it")
    for item in ("i0", "i1", "i2", "i3", "i4"):  # all there is in the catalogue `small`
        page.get_by_role("searchbox").fill(item)
        expect(page.locator("#suggestions .empty")).to_be_visible()
        page.keyboard.press("Enter")
        expect(page.get_by_role("searchbox")).to_have_value("")
    page.get_by_text("Rules and settings").click()
    page.locator("#catalogue").select_option("small")
    expect(page.locator("#columns .empty").first).to_contain_text("permit no item")
    page.locator("#seen").uncheck()
    expect(page.locator("#columns article").first.locator(".results button")).to_have_count(5)


def test_a_full_service_is_reported_and_retried(visit: Visit) -> None:
    page, refusals = visit.page, 2

    def refuse(route: Route) -> None:
        nonlocal refusals
        refusals -= 1
        if refusals < 0:
            return route.continue_()
        problem = {"title": "Overloaded", "status": 503, "detail": "The queue is full; try again shortly."}
        headers = {"Content-Type": "application/problem+json", "Retry-After": "1"}
        route.fulfill(status=503, headers=headers, body=json.dumps(problem))

    page.route("**/recommend?*", refuse)
    visit.open()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("Overloaded The queue is full")
    expect(alert).to_contain_text("Trying again in")
    expect(page.locator("#columns article")).to_have_count(2)  # by itself
    expect(alert).to_be_hidden()


def test_too_small_a_time_budget_is_reported(visit: Visit) -> None:
    page = visit.open()
    columns(page)
    page.get_by_text("Rules and settings").click()
    page.locator("#timeout").fill("0.01")
    expect(page.get_by_role("alert")).to_contain_text("Deadline exceeded")
    page.locator("#timeout").fill("")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_missing_key_and_a_service_that_goes_away_are_reported(browser: Browser, start_service: StartService) -> None:
    service = start_service(variables={"STREAMREC_API_KEYS": hashlib.sha256(b"sesame").hexdigest()})
    visit = Visit(browser, service.address)
    page = visit.open()
    expect(page.get_by_role("alert")).to_contain_text("A key is required")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("sesame")
    page.keyboard.press("Tab")
    expect(page.locator("#columns h3")).to_have_text(["Without reasoning", "After 2 steps"])
    expect(page.get_by_role("alert")).to_be_hidden()
    assert service.stop() == 0
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.get_by_role("alert")).to_contain_text("Trying again in")
    visit.close()


# How it looks


@pytest.mark.parametrize("path", ["/", "/docs", "/operator"])
def test_a_phone_shows_everything_without_scrolling_sideways(
    browser: Browser, service: ServiceProcess, path: str
) -> None:
    visit = Visit(browser, service.address, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = visit.open(path)
    expect(page.locator("#columns article, .opblock, #catalogue dd").nth(1)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = (
        "[...document.querySelectorAll('input, select')].filter((e) => parseFloat(getComputedStyle(e).fontSize) < 16)"
    )
    assert page.evaluate(small + ".length") == 0, "phones zoom into smaller fields"
    visit.close()


@pytest.mark.parametrize(("width", "columns_abreast"), [(320, 1), (360, 1), (390, 2), (1280, 2)])
def test_lists_stand_side_by_side_only_where_their_headings_fit(
    browser: Browser, service: ServiceProcess, width: int, columns_abreast: int
) -> None:
    visit = Visit(browser, service.address, viewport={"width": width, "height": 740})
    page = visit.open()
    columns(page)
    lists = [box.bounding_box() for box in page.locator("#columns article").all()]
    assert len({round(box["x"]) for box in lists if box}) == columns_abreast
    overflowing = "(all) => all.filter((one) => one.scrollWidth > one.clientWidth).length"
    assert page.locator("#columns h3").evaluate_all(overflowing) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    visit.close()


def test_dark_is_dark_and_both_can_be_read(browser: Browser, service: ServiceProcess) -> None:
    """Contrast of text and ground as WCAG 2 measures it: 4.5 at least."""
    lightness = []
    for scheme in ("light", "dark"):
        visit = Visit(browser, service.address, color_scheme=scheme)
        page = visit.open()
        columns(page)
        colours = page.evaluate(
            """() => { const style = getComputedStyle(document.documentElement);
            const draw = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            return ["ground", "paper", "ink", "muted", "accent", "bad"].map((name) => {
              draw.fillStyle = style.getPropertyValue("--" + name); draw.fillRect(0, 0, 1, 1);
              return [...draw.getImageData(0, 0, 1, 1).data].slice(0, 3); }); }"""
        )
        ground, paper, *inks = (luminance(colour) for colour in colours)
        lightness.append(ground)
        for ink in inks:
            for under in (ground, paper):
                assert (max(ink, under) + 0.05) / (min(ink, under) + 0.05) >= 4.5
        visit.close()
    assert lightness[0] > 0.8 and lightness[1] < 0.05


def luminance(colour: list[int]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# The operator's page


def test_an_operator_needs_a_key_to_change_anything_and_none_to_look(visit: Visit) -> None:
    page = visit.open("/operator")
    expect(page.locator("#versions tr")).to_have_count(1)
    page.get_by_label("Find an item to hide").fill("number 4")
    page.get_by_role("button", name="Hide Thing number 4", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("X-API-Key")
    expect(page.get_by_label("Admin key")).to_be_focused()
    expect(page.locator("#changes")).to_have_text("An admin key shows them.")
    page.get_by_label("Admin key").fill("wrong")
    page.get_by_label("Admin key").press("Tab")
    expect(page.locator("#model")).to_contain_text("tiny")
    expect(page.locator("#changes")).to_have_text("An admin key shows them.")


def test_an_operator_adds_and_hides_items(visit: Visit, service: ServiceProcess) -> None:
    page = visit.open("/operator")
    page.get_by_label("Admin key").fill(KEY)
    page.get_by_role("textbox", name="Id", exact=True).fill("i17")
    page.get_by_role("textbox", name="Title", exact=True).fill("A kettle")
    page.get_by_role("textbox", name="Categories").fill("even, kitchen")
    page.get_by_role("textbox", name="Title", exact=True).press("Enter")
    expect(page.get_by_role("status")).to_have_text("“A kettle” can be recommended from now on.")
    assert service.http.get("/items/i17").json()["categories"] == ["even", "kitchen"]
    page.get_by_label("Find an item to hide").fill("kettle")
    page.get_by_role("button", name="Hide A kettle").click()
    expect(page.locator("#changes li").first).to_have_text(re.compile("^Hidden *A kettle"))
    expect(page.locator("#found")).to_have_text("No title contains all these words.")
    expect(page.locator("#catalogue")).to_contain_text("59")
    assert service.http.get("/items/i17").status_code == 404


def test_an_operator_sees_what_others_have_changed_page_by_page_and_after_a_reload(
    visit: Visit, service: ServiceProcess
) -> None:
    page, changes = visit.open("/operator"), visit.page.locator("#changes li")
    page.get_by_label("Admin key").fill(KEY)
    page.get_by_label("Admin key").press("Tab")
    expect(changes.first).not_to_have_text("An admin key shows them.")
    ids = [f"i{row}" for row in range(20, 45)]
    items = [{"item_id": item, "title": f"Offer {item}"} for item in ids]
    service.http.post("/items", json={"items": items}, headers={"X-API-Key": KEY}).raise_for_status()
    service.http.delete("/items/i20", headers={"X-API-Key": KEY}).raise_for_status()
    expect(changes.first).to_have_text(re.compile("^Hidden *Offer i20"))  # by itself
    expect(changes).to_have_count(20)
    page.get_by_role("button", name="Show more").press("Enter")
    expect(changes.nth(24)).to_have_text(re.compile("^Changed *Offer i21"))
    page.reload()
    page.get_by_label("Admin key").fill(KEY)
    page.get_by_label("Admin key").press("Tab")
    expect(changes.first).to_have_text(re.compile("^Hidden *Offer i20"))
    page.get_by_label("Which changes are listed").select_option("hidden")
    expect(changes.first).to_have_text(re.compile("^Hidden *Offer i20"))
    expect(page.locator("#changes .changed")).to_have_count(0)


def test_an_operator_splits_users_and_swaps_models(visit: Visit, service: ServiceProcess) -> None:
    page = visit.open("/operator")
    (first,) = service.http.get("/models").json()["models"]
    page.get_by_label("Admin key").fill(KEY)
    page.get_by_label("Folder of another bundle").fill("next")
    page.get_by_role("button", name="Load without activating").click()
    expect(page.get_by_role("status")).to_contain_text("answers nobody yet")
    expect(page.locator("#versions tr")).to_have_count(2)
    (second,) = (each for each in service.http.get("/models").json()["models"] if not each["active"])
    page.get_by_role("button", name="Add an arm").press("Enter")
    expect(page.locator("#arms select")).to_be_focused()
    page.get_by_role("spinbutton", name="Percent").fill("30")
    page.get_by_role("spinbutton", name="Steps").fill("1")
    page.get_by_role("button", name="Split users like this").click()
    expect(page.locator("#versions tr").first).to_contain_text("30% with 1 step, everybody else")
    assert service.http.get("/traffic").json()["arms"] == [
        {"version": first["version"], "percent": 30, "reasoning_steps": 1}
    ]
    page.get_by_role("button", name="Remove this arm").click()
    page.get_by_role("button", name="Split users like this").click()
    expect(page.get_by_role("status")).to_have_text("The active version answers everybody.")
    page.get_by_role("button", name=f"Activate {second['version']}").click()
    expect(page.locator("#model")).to_have_text(second["version"])
    page.get_by_role("button", name=f"Activate {first['version']}").click()
    expect(page.locator("#model")).to_have_text(first["version"])
    page.get_by_role("button", name=f"Unload {second['version']}").click()
    expect(page.locator("#versions tr")).to_have_count(1)


# The API's page


def test_the_api_can_be_read_and_tried(visit: Visit, service: ServiceProcess) -> None:
    page = visit.open("/docs")
    paths = service.http.get("/openapi.json").json()["paths"]
    expect(page.locator(".opblock")).to_have_count(sum(len(methods) for methods in paths.values()))
    section = page.locator("#operations-recommend-recommend")
    section.locator(".opblock-summary").click()
    section.get_by_role("button", name="Try it out").click()
    section.get_by_placeholder("reasoning_steps").fill("1")
    section.get_by_role("button", name="Execute").click()
    answer = section.locator(".live-responses-table .response").first
    expect(answer).to_contain_text('"popularity"')
    section.locator("textarea").first.fill('{"k": 0}')
    section.get_by_role("button", name="Execute").click()
    expect(answer).to_contain_text("422")
