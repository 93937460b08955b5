"""What `inlay serve` refuses, and how: keys, rates, sizes, paths, clients that vanish, and whatever a fuzzer sends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from typer.testing import CliRunner

from inlay.cli.app import app
from inlay.errors import InlayError, UsageError
from inlay.runtime.requests import Token
from inlay.serve.http.answers import AnswerText, CompletionShape, TokenWords
from inlay.serve.http.keys import Key, Keys, Rates
from inlay.serve.http.limits import Rate
from inlay.serve.http.sending import Events
from inlay.serve.http.server import bound, check_safe
from inlay.serve.http.settings import ServeSettings
from serving import make_adapters, serving

SERVED = ["plain", "reviews"]
SERVER = dict(max_body=20_000, max_prompt=60, max_answer=100, max_answers=8, rows=4, slow=2.0, drain=2.0)
LONG = {"model": "plain", "prompt": "a film", "max_tokens": 90, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def known(keys):
    """Keys by name."""
    return {
        "all": keys.add("all", None, None, False),
        "one": keys.add("one", ["plain"], None, False),
        "slow": keys.add("slow", None, Rate.read("2/h"), False),
        "boss": keys.add("boss", None, None, True),
    }


@pytest.fixture(scope="module")
def guarded(base_folder, folder, keys, known):
    with serving(base_folder, folder, keys, max_open_per_key=2, **SERVER) as made:
        yield made


def post(running, path="completions", body=None, key=None, **more):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{running.url}/v1/{path}", json=body, headers=headers | more, timeout=30)


def said(answer, status):
    """The error of an answer, in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def short(**more):
    return {"model": "plain", "prompt": "a film", "max_tokens": 2, "temperature": 0} | more


def quiet(running, seconds=10.0):
    """Wait until nothing is under way."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stats = running.service.engine.stats()
        if not stats.running and not stats.waiting:
            return True
        time.sleep(0.02)
    return False


# ---- what is asked


def test_an_unknown_name_is_never_the_base(running):
    for model in ("nobody", "", "plain ", '{"nobody": 1.0}', '{"tiny": 1.0}', "{", {"plain": 1.0, "nobody": 2.0}):
        assert said(post(running, body=short(model=model)), 404)["code"] == "model_not_found"
    assert said(httpx.get(f"{running.url}/v1/models/nobody"), 404)
    assert said(post(running, "classify", {"model": "nobody", "input": "x"}), 404)
    assert said(post(running, "unload_lora_adapter", {"lora_name": "nobody"}), 404)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n is 0"),
        ({"n": 9}, "answers"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [100000]}, "token"),
        ({"prompt": ["a"] * 9}, "answers"),
        ({"max_tokens": 0}, "max_new_tokens"),
        ({"max_tokens": 101}, "100"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 50}, "logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "9999"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"stop": [""]}, "stop"),
        ({"wisdom": 1}, "wisdom"),
        ({"model": {}}, "mix"),
        ({"model": {"plain": 1e9}}, "weights"),
        ({"response_format": {"type": "poem"}}, "poem"),
    ],
)
def test_what_is_wrong_is_named(running, change, words):
    assert words in said(post(running, body=short(**change)), 400)["message"]


def test_what_this_server_does_not_do_is_refused(running):
    turn = {"model": "plain", "messages": [{"role": "user", "content": "x"}]}
    assert "tools" in said(post(running, "chat/completions", turn | {"tools": [{"type": "function"}]}), 400)["message"]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    said(post(running, "chat/completions", turn | {"messages": [{"role": "user", "content": image}]}), 400)
    said(post(running, "chat/completions", turn | {"messages": []}), 400)
    said(httpx.post(f"{running.url}/v1/completions", content=b"{", headers={"content-type": "application/json"}), 400)
    said(httpx.get(f"{running.url}/v1/nothing"), 404)
    said(httpx.get(f"{running.url}/v1/completions"), 405)


def test_half_a_character_is_answered(running):
    body = json.dumps(short(prompt="a \ud800 film", echo=True)).encode()
    answer = httpx.post(f"{running.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    body = json.dumps(short(model="\ud800")).encode()
    answer = httpx.post(f"{running.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 404


# ---- sizes


def test_bodies_and_prompts_have_limits(running):
    said(post(running, body=short(prompt="x" * 30_000)), 413)
    assert said(post(running, body=short(prompt=[5] * 61)), 413)["code"] == "context_length_exceeded"
    parts = (b"x" * 5000 for _ in range(10))  # without a length said before
    said(httpx.post(f"{running.url}/v1/completions", content=parts), 413)
    said(post(running, "classify", {"model": "reviews", "input": ["x"] * 9}), 400)


def test_a_body_that_does_not_come_is_left(running):
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as opened:
        opened.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in opened.recv(4096).splitlines()[0]


def test_a_full_queue_says_when_to_come_back(base_folder, folder):
    with serving(base_folder, folder, rows=1, queue=1, max_answer=100) as running, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: post(running, body=LONG), range(8)))
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert said(answer, 429)["type"] == "rate_limit_error"
                assert int(answer.headers["retry-after"]) >= 1


def test_requests_of_one_key_that_are_open_have_a_limit(guarded, known):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: post(guarded, body=LONG, key=known["all"]), range(6)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert post(guarded, body=short(), key=known["all"]).status_code == 200


# ---- who asks


def test_without_a_key_nothing_is_said(guarded, known):
    for key in (None, "wrong", known["all"] + "x", known["all"][:-1]):
        assert said(post(guarded, body=short(), key=key), 401)["code"] == "invalid_api_key"
    assert said(httpx.get(f"{guarded.url}/v1/models"), 401)
    assert said(httpx.get(f"{guarded.url}/metrics"), 401)
    assert httpx.get(f"{guarded.url}/healthz").status_code == 200
    assert post(guarded, body=short(), key=known["all"]).status_code == 200


def test_a_key_sees_its_adapters_alone(guarded, known):
    assert post(guarded, body=short(), key=known["one"]).status_code == 200
    listed = httpx.get(f"{guarded.url}/v1/models", headers={"authorization": f"Bearer {known['one']}"}).json()
    assert [model["id"] for model in listed["data"]] == ["plain"]
    hidden = [said(post(guarded, body=short(model=m), key=known["one"]), 404) for m in ("reviews", "nobody")]
    assert hidden[0]["message"].replace("reviews", "nobody") == hidden[1]["message"]
    for model in ("tiny", {"plain": 1.0, "reviews": 1.0}):
        said(post(guarded, body=short(model=model), key=known["one"]), 404)
    said(post(guarded, "classify", {"model": "reviews", "input": "x"}, known["one"]), 404)


def test_a_rate_is_kept(guarded, known):
    codes = [post(guarded, body=short(), key=known["slow"]) for _ in range(3)]
    assert [answer.status_code for answer in codes] == [200, 200, 429]
    assert 1 <= int(codes[-1].headers["retry-after"]) <= 1800


def test_only_an_admin_loads_and_unloads(guarded, known):
    load = {"lora_name": "mine", "lora_path": "plain"}
    said(post(guarded, "load_lora_adapter", load, known["all"]), 403)
    said(post(guarded, "unload_lora_adapter", {"lora_name": "plain"}, known["all"]), 403)
    said(httpx.get(f"{guarded.url}/metrics", headers={"authorization": f"Bearer {known['all']}"}), 403)
    assert post(guarded, "load_lora_adapter", load, known["boss"]).status_code == 200
    assert post(guarded, body=short(model="mine"), key=known["all"]).status_code == 200
    assert post(guarded, "unload_lora_adapter", {"lora_name": "mine"}, known["boss"]).status_code == 200


def test_what_one_key_has_read_is_not_told_to_another(guarded, known):
    body = short(prompt=[5, 6, 7, 8, 9] * 10)
    counts = [
        post(guarded, body=body, key=known[who]).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for who in ("all", "boss", "all")
    ]
    assert counts[:2] == [0, 0] and counts[2] > 0


def test_keys_stand_hashed_in_their_file(keys, known, tmp_path):
    stored = keys.path.read_bytes()
    assert all(key.encode() not in stored and key[6:].encode() not in stored for key in known.values())
    assert os.stat(keys.path).st_mode & 0o077 == 0
    own = Keys(tmp_path / "own", make=True)
    key = own.add("a", ["x"], Rate.read("5/s"), False)
    assert own.find(key) == Key("a", frozenset({"x"}), Rate(5, 1.0))
    with pytest.raises(UsageError, match="there is a key called 'a'"):
        own.add("a", None, None, False)
    own.drop("a")
    assert own.find(key) is None
    with pytest.raises(UsageError, match="no key is called"):
        own.drop("a")
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(InlayError, match="cannot be used"):
        Keys(tmp_path / "text")
    with pytest.raises(UsageError, match="holds no keys"):
        Keys(tmp_path / "missing")


def test_rates_fill_again():
    now = [0.0]
    rates = Rates(lambda: now[0])
    key = Key("a", rate=Rate.read("2/s"))
    assert [rates.wait(key) for _ in range(3)] == [0, 0, 0.5]
    now[0] = 0.5
    assert [rates.wait(key), rates.wait(key)] == [0, 0.5]
    with pytest.raises(ValueError):
        Rate.read("5 per second")


# ---- from where


def test_other_names_and_other_pages_are_refused(running):
    for host in ("evil.example", "evil.example:8000", "", "127.0.0.1.evil.example"):
        assert said(post(running, body=short(), host=host), 403)["code"] in ("wrong_host",)
    for origin in ("http://evil.example", "null", "https://127.0.0.1.evil.example"):
        said(post(running, body=short(), origin=origin), 403)
    for host in ("localhost", "LOCALHOST:1", "[::1]:8000"):
        assert post(running, body=short(), host=host, origin="http://localhost:3000").status_code == 200


def test_other_machines_need_keys(keys):
    for host in ("0.0.0.0", "::", "10.0.0.5", "example.org"):
        with pytest.raises(UsageError, match="lets other machines ask"):
            check_safe(host, None)
        check_safe(host, keys)
    check_safe("127.0.0.1", None)
    opened = bound("127.0.0.1", 0)
    with pytest.raises(InlayError, match="cannot be had"):
        bound("127.0.0.1", opened.getsockname()[1])
    opened.close()


def test_paths_lead_nowhere_else(running, folder, tmp_path, base_folder):
    (folder / "link").symlink_to(tmp_path)
    make_adapters(base_folder, tmp_path, ["plain"])
    for path in ("/etc", "../..", f"{tmp_path}/plain", "link/plain", "~", "plain/../../x", "\0", "x" * 5000):
        answer = post(running, "load_lora_adapter", {"lora_name": "x", "lora_path": path})
        assert answer.status_code in (400, 403), answer.text
        said(answer, answer.status_code)
    said(post(running, "load_lora_adapter", {"lora_name": "x", "lora_path": "nothing"}), 400)
    said(post(running, "load_lora_adapter", {"lora_name": "tiny", "lora_path": "plain"}), 400)
    (folder / "link").unlink()


# ---- who leaves


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_rows(running, stream):
    port = int(running.url.rpartition(":")[2])
    body = json.dumps({**LONG, "n": 4, "stream": stream}).encode()
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}\r\n\r\n"
    assert quiet(running)
    before = running.service.engine.stats().tokens
    opened = socket.create_connection(("127.0.0.1", port), timeout=20)
    opened.sendall(head.encode() + body)
    until = time.monotonic() + 20
    while not running.service.engine.stats().running and time.monotonic() < until:
        time.sleep(0.001)
    opened.close()
    assert quiet(running)
    assert running.service.engine.stats().tokens - before < 4 * LONG["max_tokens"]
    assert running.service.engine.stats().blocks_used == 0 or post(running, body=short()).status_code == 200


def test_a_client_that_reads_nothing_is_left():
    """A kernel takes some hundred kilobytes for a client that does not read: here nothing is taken."""

    class Endless:
        answers, ended = {(0, 0): AnswerText(0, 0)}, None

        async def tokens(self):
            while True:
                await asyncio.sleep(0)
                yield self.answers[0, 0], Token(0, 0, 5, "a")

        def end(self, outcome):
            self.ended = outcome

    async def receive():
        await asyncio.Event().wait()

    sent = []

    async def send(message):
        sent.append(message)
        if len(sent) > 3:
            await asyncio.Event().wait()

    work, scope = Endless(), {}
    shape = CompletionShape("plain", TokenWords(None), False, [], None)
    asyncio.run(Events(work, shape, False, slow=0.1)(scope, receive, send))
    assert work.ended == "left" and len(sent) == 4 and "too slowly" in scope["inlay.note"]


def test_a_stream_may_fail_before_it_begins(running):
    answer = post(running, body=short(stream=True, max_tokens=100, prompt=[5] * 60))
    assert said(answer, 400)["message"]  # the base has 128 positions


# ---- whatever else is sent


def test_no_request_makes_the_server_fail(running):
    """Whatever the server's own OpenAPI allows, and what it does not."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    failed = []

    def tried(case):
        answer = case.call(base_url=running.url, timeout=30)
        if answer.status_code >= 500:
            failed.append((case.as_curl_command(), answer.text))

    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
            test = given(case=operation.as_strategy(generation_mode=mode))(tried)
            settings(max_examples=8, deadline=None, suppress_health_check=checks, database=None)(test)()
    assert not failed, failed[0]
    assert running.service.engine.alive and post(running, body=short()).status_code == 200


# ---- the command


def test_settings_about_keys_need_their_file(tmp_path):
    with pytest.raises(UsageError, match="--keys FILE"):
        ServeSettings(add_key="a")
    with pytest.raises(UsageError, match="--add-key"):
        ServeSettings(rate="5/s", keys=str(tmp_path / "k"))
    with pytest.raises(UsageError, match="5/s"):
        ServeSettings(add_key="a", keys="k", rate="fast")
    assert ServeSettings(base="/models/tiny/").name_of_base == "tiny"


def call(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_the_command_serves_until_a_signal(base_folder, folder, tmp_path):
    made = call("--add-key", "a", "--adapters-of", "plain", "--keys", tmp_path / "k", "--json")
    key = json.loads(made.stdout)["key"]
    refused = call("--adapters", folder, "--host", "0.0.0.0")
    assert refused.exit_code == 2 and "lets other machines ask" in refused.stderr
    given = ["--adapters", folder, "--base", base_folder, "--port", "0", "--keys", tmp_path / "k", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "inlay", "serve", *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        body = short(prompt="a secret film")
        answer = httpx.post(f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=30)
        assert answer.status_code == 200
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=30,
            headers={"authorization": f"Bearer {key}"},
        ) as stream:  # fmt: skip
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"  # what was under way has ended
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "secret" not in errors and "Traceback" not in errors and "/v1/completions 200" in errors
    finally:
        process.kill()
