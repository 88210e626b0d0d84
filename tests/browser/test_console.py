"""The console as people use it: seen, by keyboard, by a screen reader, and while things go wrong."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest
from connito.v1 import run_pb2
from connito.wire.identity import Identity

from tests.browser.chromium import Chromium, Page
from tests.browser.conftest import Bench, Site, serving, until_read
from tests.support.run import enrolment

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

SHOTS = os.environ.get("CONNITO_SCREENSHOTS")
EVENTS_A_MINUTE = 10_000


def created(run: str) -> run_pb2.RunCreated:
    return run_pb2.RunCreated(
        spec=run_pb2.RunSpec(run=run, domain="medical", cycles=2, base=run_pb2.BaseRef(name="tiny"))
    )


WIDTHS = (375, 768, 1280)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_page_has_barriers_or_errors(browser: Chromium, site: Site, axe: Path, dark: bool, width: int) -> None:
    found: dict[str, list[str]] = {}
    for name, path in site.pages().items():
        with browser.page(site.address + path, dark=dark, width=width) as page:
            page.until("document.querySelector('main h1')", "a heading")
            page.until("!document.body.innerText.includes('being read')", "what is in the store")
            if SHOTS:
                page.screenshot(Path(SHOTS) / f"{name}-{width}-{'dark' if dark else 'light'}.png")
            barriers = page.barriers(axe)
            # The one thing that a browser reports about a page that is rightly not there.
            errors = [text for text in page.problems() if not (name == "problem" and "404" in text)]
            if barriers or errors:
                found[name] = [*barriers, *errors]
    assert found == {}


def test_pages_fit_a_narrow_screen(browser: Chromium, site: Site) -> None:
    """Nothing scrolls sideways, tables neither: each of their cells says what it is."""
    for name, path in site.pages().items():
        with browser.page(site.address + path, width=375) as page:
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} scrolls sideways"
            wide = "[...document.querySelectorAll('.scroll:has(thead)')].filter((one) => one.scrollWidth > one.clientWidth)"
            assert page.evaluate(f"{wide}.length") == 0, f"a table of {name} scrolls sideways"
            nameless = "[...document.querySelectorAll('table.rows td')].filter((one) => one.dataset.name === undefined)"
            assert page.evaluate(f"{nameless}.length") == 0, f"a cell of {name} does not say what it is"


def test_a_table_stays_labelled_while_the_page_is_replaced(browser: Chromium, site: Site) -> None:
    with browser.page(f"{site.address}/runs/{site.run}", width=375) as page:
        named = "[...document.querySelectorAll('#main td')].map((one) => one.dataset.name)"
        before = page.evaluate(named)
        assert "utility, nats per token" in before
        html = page.evaluate("fetch(location.href).then((answer) => answer.text())")
        page.evaluate(
            f"replace(new DOMParser().parseFromString({json.dumps(html)}, 'text/html').getElementById('main').innerHTML)"
        )
        assert page.evaluate(named) == before


def test_a_cycle_is_chosen_by_keyboard(browser: Chromium, site: Site) -> None:
    with browser.page(f"{site.address}/runs/{site.run}") as page:
        text = "document.getElementById('main').innerText"
        assert page.evaluate("document.getElementById('cycle-at').value") == "2"
        page.evaluate("document.getElementById('cycle-at').focus()")
        page.press("ArrowLeft")
        page.until("location.search === '?cycle=1'", "the first cycle")
        assert page.evaluate("document.activeElement.id") == "cycle-at"
        shown = page.evaluate(text)
        for part in ("Merge and gate of cycle 1", "up to cycle 1", "Version 1 from version 0", "validator-1"):
            assert part in shown, part
        # The page stays at that cycle when it is sent again.
        page.until("main.dataset.live.endsWith('?cycle=1')", "the cycle to be followed")
        page.press("End")
        page.until("location.search === '?cycle=2'", "the last cycle")
        assert "Merge and gate of cycle 2" in page.evaluate(text)
        assert page.problems() == []


def test_curves_of_one_run_have_one_scale(browser: Chromium, site: Site) -> None:
    with browser.page(f"{site.address}/runs/{site.run}") as page:
        heights = "[...one.querySelectorAll('line.grid')].map((line) => +line.getAttribute('y1'))"
        ticks = f"[...document.querySelectorAll('figure svg')].map((one) => {heights})"
        # A course may leave room for one round value only.
        steps = {round(abs(lines[0] - lines[1]), 1) for lines in page.evaluate(ticks) if len(lines) > 1}
        assert len(steps) == 1, "equal distances are unequal losses"


ANSWERS = "['base', 'expert'].map((one) => document.querySelector(`[data-side=${one}]`).innerText)"


def try_it(page: Page, text: str, answered: str) -> list[str]:
    page.evaluate("document.getElementById('text').focus()")
    page.call("Input.insertText", text=text)
    page.evaluate("document.querySelector('[data-try] button').focus()")
    page.press("Enter")
    page.until(answered, "both answers")
    found: list[str] = page.evaluate(ANSWERS)
    return found


def test_an_expert_is_tried_beside_its_base(browser: Chromium, site: Site, axe: Path) -> None:
    with browser.page(f"{site.address}/library/{site.expert}") as page:
        base, expert = try_it(page, "turnip with leek: ", "announce.textContent.includes('Both')")
        assert base.startswith("turnip with leek:")
        assert expert.startswith("turnip with leek:")
        assert base != expert
        assert page.barriers(axe) == []
        # The same without a script, in whole.
        page.evaluate("document.querySelector('[data-try]').removeAttribute('data-try')")
        page.evaluate("document.querySelector('.try button').click()")
        page.until("location.pathname.endsWith('/try') && document.querySelector('.answer')", "the answers' page")
        assert page.evaluate(ANSWERS) == [base, expert]
        assert page.barriers(axe) == []
        assert page.problems() == []


def test_experts_are_found_by_an_example(browser: Chromium, site: Site, axe: Path) -> None:
    with browser.page(f"{site.address}/library") as page:
        page.evaluate("[...document.querySelectorAll('a')].find((one) => one.innerText === 'By example').click()")
        page.until("location.pathname === '/library/example' && document.getElementById('text')", "the form")
        page.evaluate("document.getElementById('text').focus()")
        page.call("Input.insertText", text="turnip with leek:\nChop the turnip and boil the leek.")
        page.evaluate("document.querySelector('form.try button').click()")
        page.until("document.querySelectorAll('#savings tbody tr').length > 0", "the savings")
        row = page.evaluate("document.querySelector('#savings tbody tr').innerText")
        assert site.expert in row
        assert "→" in row
        assert page.barriers(axe) == []
        assert page.problems() == []


def test_without_a_server_the_page_says_so(browser: Chromium, site: Site, axe: Path) -> None:
    with serving("console", data=site.data, CONNITO_CONSOLE_SERVE_URL="http://127.0.0.1:9/v1") as address:
        until_read(address, site.run)
        with browser.page(f"{address}library/{site.expert}") as page:
            page.until("document.querySelector('[aria-labelledby=try]')", "the section")
            said = page.evaluate("document.querySelector('[aria-labelledby=try]').innerText")
            assert "No server answers at http://127.0.0.1:9/v1" in said
            assert "connito serve" in said
            assert page.barriers(axe) == []


def test_a_barrier_would_be_found(browser: Chromium, site: Site, axe: Path) -> None:
    with browser.page(site.address) as page:
        page.evaluate("document.querySelector('header').insertAdjacentHTML('beforeend', '<img src=/static/icon.svg>')")
        assert any(barrier.startswith("image-alt") for barrier in page.barriers(axe))


def test_everything_is_reached_by_keyboard(browser: Chromium, site: Site) -> None:
    with browser.page(f"{site.address}/runs/{site.run}") as page:
        page.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.press("Enter")
        page.until("document.activeElement.id === 'main'", "the content to be focused")
        reached = []
        for _ in range(60):
            page.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                break
            reached.append(page.evaluate("document.activeElement.innerText || document.activeElement.id"))
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"{reached[-1]} has no visible focus"
        assert {"Lineage", "Replay", "why this score", "The numbers"} <= set(reached)


def test_what_has_the_focus_keeps_it_while_the_page_is_replaced(browser: Chromium, site: Site) -> None:
    with browser.page(f"{site.address}/runs/{site.run}") as page:
        for held in ("#loss-table summary", "#main [id^=why-]", "#main a[href]:not([id])"):
            # In one go: what the console sends comes in between.
            focus, active = f"document.querySelector('{held}').focus()", "document.activeElement.outerHTML"
            steps = f"{focus}; const before = {active}; replace(main.innerHTML); return [before, {active}]"
            before, after = page.evaluate(f"(() => {{ {steps}; }})()")
            assert after == before, held


def test_the_scrubber_replays_the_finished_run(browser: Chromium, site: Site) -> None:
    with browser.page(f"{site.address}/runs/{site.run}?at=1") as page:
        length = page.evaluate("Number(document.getElementById('at').max)")
        assert length > 40
        assert "selecting the experts" in page.evaluate("document.body.innerText").lower()
        page.evaluate("document.getElementById('at').focus()")
        page.press("ArrowRight")
        page.until("location.search === '?at=2' && document.getElementById('at').value === '2'", "the second fact")
        assert page.evaluate("document.activeElement.id") == "at"
        page.press("End")
        page.until(f"location.search === '?at={length}'", "the last fact")
        assert "Run completed" in page.evaluate("document.body.innerText")
        # A screen reader is told where the slider stands.
        told = page.evaluate("document.getElementById('at').getAttribute('aria-valuetext')")
        # Behind the end come the deposit, the head over it, and validators' word for that head.
        assert any(word in told for word in ("library", "head", "cosigned")), told
        page.evaluate("[...document.querySelectorAll('.tabs a')].find((one) => one.innerText === 'Lineage').click()")
        page.until(f"location.pathname.endsWith('/lineage') && location.search === '?at={length}'", "lineage, then")
        assert page.problems() == []


def test_a_versions_bytes_are_verified_by_a_button(browser: Chromium, site: Site) -> None:
    with browser.page(f"{site.address}/runs/{site.run}/lineage") as page:
        page.evaluate("document.getElementById('verify-1').click()")
        page.until("document.body.innerText.includes('The bytes hold.')", "the answer")


def test_experts_are_shown_with_use_and_change(browser: Chromium, site: Site) -> None:
    with browser.page(f"{site.address}/runs/{site.run}/selection") as page:
        cells = "[...document.querySelectorAll('section[aria-labelledby={}] rect title')].map((one) => one.textContent)"
        page.until(f"{cells.format('change')}.length", "what changed")
        used, changed = (page.evaluate(cells.format(section)) for section in ("use", "change"))
        selected = page.evaluate("document.querySelectorAll('section[aria-labelledby=selection] title').length") - 1
        assert len(used) >= selected > len(changed) > 0
        assert all(float(text.rpartition(": ")[2]) > 0 for text in changed)


def test_the_library_is_searched_and_experts_are_compared(browser: Chromium, site: Site) -> None:
    with browser.page(f"{site.address}/library") as page:
        page.evaluate("document.getElementById('q').focus()")
        page.call("Input.insertText", text="recipes")
        page.press("Enter")
        page.until("location.search.startsWith('?q=recipes')", "the search")
        page.until(f"document.querySelector('main').innerText.includes('{site.expert}')", "the expert")


async def test_an_empty_console_says_so_and_comes_alive(browser: Chromium, bench: Bench) -> None:
    with browser.page(bench.address) as page:
        assert "There is no run yet" in page.evaluate("document.body.innerText")
        assert await bench.bus.publish_fact("run-a", "run", 0, "created", created("run-a"))
        page.until("document.body.innerText.includes('run-a')", "the run")
        assert page.problems() == []


async def test_it_says_that_the_broker_or_the_console_is_gone(browser: Chromium, bench: Bench) -> None:
    visible = "document.getElementById('line').checkVisibility()"
    with browser.page(bench.address) as page:
        assert not page.evaluate(visible)
        bench.nats.kill()
        page.until("document.body.innerText.includes('The broker does not answer')", "a word about the broker")
        bench.nats.start()
        page.until("!document.body.innerText.includes('The broker does not answer')", "the broker again", 30)
        bench.console.kill()
        page.until(visible, "a word about the console", 30)


async def test_it_stays_live_under_ten_thousand_events_a_minute(browser: Chromium, bench: Bench) -> None:
    """For ten seconds; a run is created each second, and what counts is when an open page shows it."""
    delays: list[float] = []
    miners = [Identity.generate() for _ in range(EVENTS_A_MINUTE // 60)]
    with browser.page(bench.address) as page:
        async with asyncio.TaskGroup() as group:
            began, each = time.monotonic(), 10
            for second in range(each):
                run = f"run-{second}"
                assert await bench.bus.publish_fact(run, "run", 0, "created", created(run))
                published = time.monotonic()
                for miner in miners:
                    enrolled = enrolment(run, miner)
                    group.create_task(bench.bus.publish_fact(run, "run", 0, "miner", enrolled, miner.public))
                await asyncio.to_thread(page.until, f"document.body.innerText.includes('{run}')", run)
                delays.append(time.monotonic() - published)
                await asyncio.sleep(max(0.0, began + second + 1 - time.monotonic()))
        stored = sum([await bench.bus.last_sequence("RUNS")])
        assert stored == each * (1 + EVENTS_A_MINUTE // 60)
        page.until(f"document.body.innerText.includes('{EVENTS_A_MINUTE // 60}')", "every miner")
        assert page.problems() == []
    print(f"shown after {sorted(delays)[len(delays) // 2]:.2f} s (median), {max(delays):.2f} s (longest)")
    assert sorted(delays)[len(delays) // 2] < 5


async def test_the_login_has_no_barriers(browser: Chromium, bench: Bench, axe: Path) -> None:
    token = "a-token-for-this-test"
    bench.console.kill()
    bench.console._env["CONNITO_CONSOLE_TOKEN"] = token
    bench.console.log.write_text("")
    bench.console.start()
    bench.wait_until_it_listens()
    with browser.page(bench.address) as page:
        assert page.evaluate("location.pathname") == "/login"
        assert page.barriers(axe) == []
        page.call("Input.insertText", text="wrong")
        page.press("Enter")
        page.until("document.body.innerText.includes('This is not the token')", "a refusal")
        assert page.barriers(axe) == []
        page.evaluate("document.getElementById('token').focus()")
        page.call("Input.insertText", text=token)
        page.press("Enter")
        page.until("location.pathname === '/'", "the runs")
