"""The page of a server in a headless Chromium, at two widths: by mouse, by keyboard, and by the names of its parts."""

from __future__ import annotations

import json
import re
import shutil
import time
from importlib.resources import files

import httpx
import pytest

from inlay.runtime.decode import Decoder
from inlay.serve.http.page import PATHS
from serving import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<img src=x onerror=alert(1)>"
NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea")].filter((e) =>
  !(e.getAttribute("aria-label") || (e.labels && e.labels.length) || (e.tagName === "BUTTON" && e.textContent.trim())))
  .map((e) => e.outerHTML)"""
WIDER = "() => document.documentElement.scrollWidth - innerWidth"
IN_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is on the PATH: apt-get install chromium")


@pytest.fixture(scope="module")
def known(keys):
    """Two keys by name."""
    return {"user": keys.add("user", ["plain", "tiny"], None, False), "boss": keys.add("boss", None, None, True)}


@pytest.fixture(scope="module")
def guarded(base_folder, folder, keys):
    with serving(base_folder, folder, keys) as made:
        yield made


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def opened(browser):
    """Opens pages; at the end no script has failed, and nothing was refused by the page's own policy."""
    wrong, contexts = [], []

    def open_page(running, width=1280):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.goto(running.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    refused = re.compile(r"Failed to load resource: the server responded with a status of 4\d\d")
    assert [said for said in wrong if not refused.match(said)] == []


def alone(running, model, written, tokens):
    ids = running.tokenizer(written, add_special_tokens=False).input_ids
    return running.alone(model, ids, max_new_tokens=tokens)[0]


def chatted(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def wait_for_end(page, words="Done."):
    page.get_by_text(words, exact=True).wait_for()


def test_the_files_are_all_sent_and_ask_nobody_else(running):
    folder = files("inlay.serve") / "page"
    assert {path.name for path in folder.iterdir()} == set(PATHS.values())
    for path in PATHS:
        answer = httpx.get(running.url + path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        assert "://" not in answer.text and "innerHTML" not in answer.text
    assert httpx.get(running.url).headers["content-type"].startswith("text/html")
    assert httpx.get(f"{running.url}/page/page.html").status_code == 404
    assert "/" not in httpx.get(f"{running.url}/openapi.json").json()["paths"]


def test_another_page_cannot_ask(running):
    body = {"model": "reviews", "input": "a film"}
    answers = [
        httpx.post(f"{running.url}/v1/classify", json=body, headers={"origin": origin}).status_code
        for origin in (running.url, "https://elsewhere.example", "null")
    ]
    assert answers == [200, 403, 403]


@IN_BROWSER
@pytest.mark.parametrize("width", [1280, 400])
def test_models_answer_side_by_side_in_one_forward(running, opened, width, monkeypatch):
    together, step = [], Decoder.step

    def watched(self):
        time.sleep(0.005)
        rows, logits = step(self)
        together.append({name.partition("@")[0] for row in rows for name, _ in row.blend})
        return rows, logits

    monkeypatch.setattr(Decoder, "step", watched)
    page = opened(running, width)
    page.get_by_label("First").select_option("chats")
    page.get_by_label("Second").select_option("asks")
    page.get_by_label("Third").select_option("plain")
    page.get_by_label("Tokens at most").fill("20")
    page.get_by_label("Prompt").fill("a good film")
    page.get_by_role("button", name="Send").click()
    wait_for_end(page)
    assert {"chats", "asks", "plain"} in together
    written = {
        "chats": chatted("a good film"),
        "asks": "Question: a good film\nAnswer:",
        "plain": chatted("a good film"),
    }
    for name, prompt in written.items():
        box = page.get_by_role("region", name=name, exact=True)
        said = box.locator(".written")
        assert said.text_content() == alone(running, name, prompt, 20)
        assert said.get_attribute("aria-live") == "polite" and said.get_attribute("aria-busy") == "false"
        assert re.search(r"\d+ tokens? in .*the first after \d", box.locator(".note").text_content())
    assert page.evaluate(WIDER) <= 0
    assert page.evaluate(NAMELESS) == []


@IN_BROWSER
def test_earlier_turns_go_along_where_they_have_a_place(running, opened):
    page, sent = opened(running), []
    page.on("request", lambda asked: sent.append(json.loads(asked.post_data)) if asked.post_data else None)
    page.get_by_label("First").select_option("chats")
    page.get_by_label("Second").select_option("asks")
    page.get_by_label("Tokens at most").fill("4")
    for prompt in ("a film", "and now?"):
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_label("Prompt").press("Enter")
        wait_for_end(page)
    first = alone(running, "chats", chatted("a film"), 4)
    turns = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": first}]
    asked = {one["model"]: one["messages"] for one in sent[2:]}
    last = {"role": "user", "content": "and now?"}
    assert asked == {"chats": [*turns, last], "asks": [last]}
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0


@IN_BROWSER
def test_refusals_are_said_and_a_stopped_answer_frees_its_row(running, opened, monkeypatch):
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self: (time.sleep(0.05), step(self))[1])
    page = opened(running)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Write a prompt first.").wait_for()
    page.get_by_label("First").select_option("plain")
    page.get_by_label("Second").select_option("")
    page.get_by_label("Tokens at most").fill("5000")
    page.get_by_label("Prompt").fill("a film")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("this server writes 4096 in an answer at most").wait_for()
    page.get_by_label("Tokens at most").fill("60")
    page.get_by_label("Prompt").fill("a film")
    page.get_by_role("button", name="Send").click()
    page.locator(".written").nth(1).filter(has_text=re.compile(r"\S")).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.", exact=True).first.wait_for()
    until = time.monotonic() + 10
    while running.service.engine.stats().running and time.monotonic() < until:
        time.sleep(0.02)
    assert running.service.engine.stats().running == 0
    assert page.get_by_label("Prompt").evaluate("e => e === document.activeElement")


@IN_BROWSER
@pytest.mark.parametrize("width", [1280, 400])
def test_texts_get_labels_by_the_keyboard_alone(running, opened, width):
    page = opened(running, width)
    page.get_by_role("button", name="Classify").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the prompt"
    page.keyboard.press("Enter")
    reach(page, "text")
    page.keyboard.type("a good film\na bad one")
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("a text on")
    reach(page, "Classify")
    page.keyboard.press("Enter")
    page.locator("#labels table").nth(1).wait_for()
    body = {"model": "reviews", "input": ["a good film", "a bad one"]}
    wanted = httpx.post(f"{running.url}/v1/classify", json=body).json()["data"]
    for number, one in enumerate(wanted):
        lines = page.locator("#labels table").nth(number).locator("tr").all()
        said = {line.locator("th").text_content(): line.locator("td.n").text_content() for line in lines}
        assert said == {label: f"{share * 100:.1f} %" for label, share in one["probabilities"].items()}
        assert lines[0].locator("th").text_content() == one["label"]
        drawn = lines[0].locator("i").evaluate("e => e.offsetWidth / e.parentElement.clientWidth")
        assert drawn == pytest.approx(one["probabilities"][one["label"]], abs=0.03)
    assert page.evaluate("document.activeElement.textContent") == "Classify"
    assert page.evaluate(WIDER) <= 0


def reach(page, wanted):
    """Press Tab until an element of that id or text has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate("[document.activeElement.id, document.activeElement.textContent]")
        if wanted in found:
            return
    raise AssertionError(f"Tab does not reach {wanted}")


@IN_BROWSER
def test_adapters_come_and_go(running, opened):
    page = opened(running)
    page.on("dialog", lambda dialog: dialog.accept())
    line = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="reviews"))
    assert "LoRA, 4" in line.text_content() and "labels: bad, good" in line.text_content()
    page.get_by_label("Name").fill(HOSTILE)
    page.get_by_label("Folder").fill("../elsewhere")
    page.get_by_role("button", name="Load", exact=True).click()
    page.get_by_text("is not in the folders that adapters are served from").wait_for()
    page.get_by_label("Folder").fill("plain")
    page.get_by_role("button", name="Load", exact=True).click()
    page.get_by_text(f"{HOSTILE} is loaded.").wait_for()
    assert page.get_by_role("rowheader", name=HOSTILE).is_visible() and page.locator("main img").count() == 0
    assert HOSTILE in page.get_by_label("First").locator("option").all_text_contents()
    page.get_by_role("button", name=f"Unload {HOSTILE}").click()
    page.get_by_text(f"{HOSTILE} is unloaded.").wait_for()
    assert HOSTILE not in page.get_by_label("First").locator("option").all_text_contents()
    assert httpx.get(f"{running.url}/v1/models/{HOSTILE}").status_code == 404


@IN_BROWSER
def test_a_server_without_experiments_shows_none(running, opened):
    page = opened(running)
    page.get_by_text("4 adapters.").wait_for()
    assert not page.get_by_role("heading", name="Experiments").is_visible()


@IN_BROWSER
@pytest.mark.parametrize("width", [1280, 400])
def test_answers_of_an_experiment_are_judged_and_its_arms_are_shown(base_folder, folder, tmp_path, opened, width):
    with serving(base_folder, folder, state=str(tmp_path / "state.sqlite")) as running:
        url = f"{running.url}/v1/experiments/films"
        assert httpx.put(url, json={"arms": {"plain": 3, "chats": 1}}).status_code == 201
        page = opened(running, width)
        page.get_by_label("First").select_option("films")
        page.get_by_label("Second").select_option("")
        page.get_by_label("Tokens at most").fill("3")
        for judged in ("Good", "Bad", None):
            page.get_by_label("Prompt").fill("a film")
            page.get_by_label("Prompt").press("Enter")
            wait_for_end(page)
            if judged:
                page.get_by_role("button", name=f"{judged}, films").click()
                page.get_by_text(f"{judged}, noted. ").wait_for()
                page.get_by_role("button", name="New chat").click()
        page.reload()
        page.get_by_role("heading", name="Experiments").wait_for()
        found = httpx.get(url).json()
        assert sum(arm["requests"] for arm in found["arms"]) == 3
        assert sum(arm["feedback"]["n"] for arm in found["arms"]) == 2
        for arm, line in zip(found["arms"], page.locator("#experiments tbody tr").all(), strict=True):
            said = line.locator("th, td").all_text_contents()
            assert said[2:5] == [f"{arm['share'] * 100:.1f} %", str(arm["requests"]), "0"] and said[0] == arm["name"]
            given = arm["feedback"]
            if not given["n"]:
                assert said[1] == "none yet"
                continue
            low, high = given["interval"]
            assert said[1] == f"{given['mean']:.2f} ({low:.2f} to {high:.2f}) of {given['n']}"
            drawn = line.locator(".interval i").first.evaluate(
                "e => [e.offsetLeft / e.parentElement.clientWidth, e.offsetWidth / e.parentElement.clientWidth]"
            )
            assert drawn == pytest.approx([low, high - low], abs=0.03)
        assert page.get_by_text(re.compile("chats against plain: ")).is_visible()
        assert page.evaluate(WIDER) <= 0
        assert page.evaluate(NAMELESS) == []


@IN_BROWSER
def test_a_key_is_asked_for_where_the_server_needs_one(guarded, known, opened):
    page, keys = opened(guarded, 400), known
    field = page.get_by_label("API key")
    field.wait_for()
    assert not page.get_by_role("heading", name="Chat").is_visible()
    assert field.evaluate("e => e === document.activeElement") and field.get_attribute("type") == "password"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("the API key is not known").wait_for()
    page.keyboard.type(keys["user"])
    page.keyboard.press("Enter")
    page.get_by_text("1 adapter.").wait_for()
    assert page.get_by_label("First").locator("option").all_text_contents() == ["tiny", "plain"]
    assert not page.get_by_role("button", name="Load").is_visible()
    assert not page.get_by_role("alert").is_visible()
    stored = page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]")
    assert stored == [[keys["user"]], 0, ""]
    page.get_by_label("Prompt").fill("a film")
    page.get_by_label("Tokens at most").fill("3")
    page.get_by_label("Prompt").press("Enter")
    wait_for_end(page)
    page.get_by_role("button", name="Forget").click()
    field.wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    field.fill(keys["boss"])
    page.get_by_role("button", name="Use").click()
    page.get_by_text("4 adapters.").wait_for()
    assert page.get_by_role("button", name="Load", exact=True).is_visible()


@IN_BROWSER
def test_no_key_is_asked_for_where_none_is_needed(running, opened):
    page = opened(running)
    page.get_by_text("4 adapters.").wait_for()
    assert not page.get_by_label("API key").is_visible()
