"""The live page of a race: on this machine alone, and asks only by those who have its link."""

from __future__ import annotations

import json
import urllib.request

import pytest
from starlette.testclient import TestClient

from inlay.race.live import Live, live_app
from inlay.runs.asking import Requests

HERE = "http://127.0.0.1:4321"
PLAN = {
    "method": "lora", "set": {"r": 2}, "steps": 9, "lr": 0.01, "name": "lora<b>", "seed": 0, "batch_size": 4,
    "epochs": 1.0, "stop_after": None,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    record = {"status": "running", "metric": "loss", "plans": {"lora<b>": PLAN, "two": {**PLAN, "name": "two"}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    return tmp_path


@pytest.fixture
def client(folder):
    return TestClient(live_app(folder, 4321, "secret"), base_url=HERE, follow_redirects=False)


def asks(folder):
    return [ask.to_dict() | {"id": ""} for ask in Requests(folder / "requests").waiting()]


def test_the_page_shows_what_there_is_and_escapes_it(client):
    text = client.get("/").text
    assert "two" in text and "lora<b>" not in text and "lora&lt;b&gt;" in text and "refresh" in text
    assert "<form" not in text and "<form" in client.get("/?token=secret").text


def test_other_hosts_are_refused(client):
    assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 403
    assert client.get("/", headers={"host": "127.0.0.1:1"}).status_code == 403
    assert client.get("/", headers={"host": "localhost:4321"}).status_code == 200


def test_who_has_the_link_may_ask(client, folder):
    form = {"token": "secret", "what": "clone", "name": "two", "set": "lr=0.5 r=3"}
    assert client.post("/ask", data=form, headers={"origin": HERE}).status_code == 303
    assert asks(folder) == [{"what": "clone", "name": "two", "settings": {"lr": 0.5, "r": 3}, "id": ""}]


@pytest.mark.parametrize(
    ("change", "headers", "code"),
    [
        ({"token": "wrong"}, {}, 403),
        ({"token": ""}, {}, 403),
        ({}, {"origin": "http://elsewhere.example"}, 403),
        ({}, {"origin": "null"}, 403),
        ({"what": "remove"}, {}, 400),
        ({"set": "lr"}, {}, 400),
        ({"what": "stop", "set": "lr=1"}, {}, 400),
    ],
)
def test_others_may_not(change, headers, code, client, folder):
    form = {"token": "secret", "what": "clone", "name": "two", "set": "lr=0.5", **change}
    assert client.post("/ask", data=form, headers=headers).status_code == code
    assert asks(folder) == []


def test_it_is_served_while_the_race_runs(folder):
    said = []
    with Live(folder, said.append):
        link = said[0].removeprefix("live at ")
        assert link.startswith("http://127.0.0.1:") and "token=" in link
        assert "two" in urllib.request.urlopen(link, timeout=20).read().decode()
    with pytest.raises(OSError):
        urllib.request.urlopen(link, timeout=5)
