"""The page of the service in a real headless Chromium."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import over_http
from stub_service import StubPolicy, application

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")


@pytest.fixture
def url() -> Iterator[str]:
    with over_http(application(policy=StubPolicy())) as found:
        yield found


def test_a_person_samples_and_lets_the_judge_compare(url: str) -> None:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#does:not(:empty)")
        assert page.text_content("#does") == "The policy answers N times, the reward model sorts, the judge compares two."
        page.fill("#prompt", "How many apples? <b>None</b>")
        page.fill("#n", "5")
        page.click("#send")
        page.wait_for_selector("#candidates li")
        rewards = [float(text) for text in page.locator("#candidates .reward").all_text_contents()]
        assert len(rewards) == 5 and rewards == sorted(rewards, reverse=True)
        assert page.locator("li.best pre").text_content() == "word " * 5
        assert page.locator("#candidates input:checked").count() == 2
        page.click("#judge")
        page.wait_for_selector("#verdict:not([hidden])")
        assert (page.locator("#verdict").text_content() or "").startswith("Verdict: ")
        if folder := os.environ.get("GSIL_PICTURES"):
            page.screenshot(path=str(Path(folder) / "page.png"), full_page=True)
        page.fill("#n", "1000")
        page.click("#send")
        page.wait_for_selector("#state.error")
        assert "the limit is 64" in (page.locator("#state").text_content() or "")
        assert not problems
        browser.close()


@pytest.mark.parametrize(
    ("judge", "does", "n"), [(True, "The policy answers, the judge compares two.", 2), (False, "The policy answers.", 1)]
)
def test_without_a_reward_model_no_best_is_offered(judge: bool, does: str, n: int) -> None:
    with over_http(application(policy=StubPolicy(), rewards=(), judge=judge)) as url, playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#does:not(:empty)")
        assert page.text_content("#title") == "Samples" and page.text_content("#does") == does
        assert page.text_content("#count") == "samples" and page.input_value("#n") == str(n) and page.is_hidden("#rewarder")
        page.fill("#prompt", "How many apples?")
        with page.expect_request("**/v1/chat/completions") as asked:
            page.click("#send")
        assert "best_of_n" not in asked.value.post_data_json
        page.wait_for_selector("#candidates li")
        assert page.locator("#candidates li").count() == n and page.locator("li.best").count() == 0
        browser.close()
