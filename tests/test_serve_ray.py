"""Several servers behind Ray Serve: the answers of one server, each adapter at one replica, and a killed replica."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec

import httpx
import openai
import psutil
import pytest

from inlay.bases import extras
from inlay.errors import InlayError, UsageError
from inlay.serve.cluster.asked import Changes
from inlay.serve.cluster.merged import merged_adapters, merged_metrics
from inlay.serve.cluster.preferring import preferred
from inlay.serve.cluster.run import serve_cluster
from inlay.serve.http.settings import ServeSettings
from serving import make_adapters, serving

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'inlay[ray]'")
MODELS = ["plain", "reviews", "chats", "asks", "tiny"]
LONG = 100
NEW = {
    "model": "new", "prompt": "a good film", "max_tokens": LONG, "temperature": 0, "extra_body": {"ignore_eos": True},
}  # fmt: skip


# ---- the parts


def test_an_adapter_stays_where_it_is_until_that_is_full():
    loads = dict.fromkeys("abcd", 0)
    names = [f"adapter {number}" for number in range(400)]
    first = {name: preferred(name, loads)[0] for name in names}
    assert all(preferred(name, loads) == preferred(name, loads) for name in names)
    shares = Counter(first.values())
    assert set(shares) == set(loads) and max(shares.values()) < 2 * min(shares.values())
    without = {name: preferred(name, dict.fromkeys("abc", 0))[0] for name in names}
    assert all(without[name] == first[name] for name in names if first[name] != "d")
    own = preferred("hot", loads)
    assert preferred("hot", {**loads, own[0]: 7}) == own
    assert preferred("hot", {**loads, own[0]: 40}) == [*own[1:], own[0]]
    assert preferred("hot", loads, [own[0]]) == [*own[1:], own[0]]
    assert preferred(None, {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"] and preferred("hot", {}) == []


def test_changes_are_kept_while_their_folders_are_there(tmp_path):
    changes = Changes()
    (tmp_path / "there").mkdir()
    changes.add("x", str(tmp_path / "there"), True)
    changes.add("y", str(tmp_path / "gone"), False)
    changes.add("x", str(tmp_path / "there"), False)
    assert changes.version == 3 and [(one.name, one.number) for one in changes.all()] == [("y", 2), ("x", 3)]
    changes.forget(changes.all())
    assert [one.name for one in changes.all()] == ["x"] and changes.version == 3


def test_replicas_answers_become_one():
    one = {"name": "x", "loaded": False, "last_used": None, "version": 0, "error": None}
    bodies = {
        "b": json.dumps({"base": "t", "data": [one]}).encode(),
        "a": json.dumps({"base": "t", "data": [{**one, "loaded": True, "last_used": 3.0, "version": 2}]}).encode(),
    }
    made = merged_adapters(bodies)
    assert made["base"] == "t" and made["data"] == [
        {**one, "loaded": True, "last_used": 3.0, "version": 2, "replicas": ["a"]}
    ]
    page = b'# HELP inlay_tokens_total Made\n# TYPE inlay_tokens_total counter\ninlay_tokens_total{k="v"} %d.0\n'
    text = merged_metrics({"a": page % 1, "b": page % 2}).decode()
    assert 'inlay_tokens_total{k="v",replica="a"} 1.0' in text and 'inlay_tokens_total{k="v",replica="b"} 2.0' in text


def test_flags_of_several_servers_need_ray():
    with pytest.raises(UsageError, match=r"--replicas is about several servers\. Add --ray\."):
        ServeSettings(replicas=3)


def test_ray_is_named_where_it_is_missing(monkeypatch, tmp_path):
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "0")  # and put back
    there = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "ray" else there(name))
    with pytest.raises(InlayError, match=r"inlay serve --ray needs ray, which is not installed\. pip install 'ray\["):
        serve_cluster(ServeSettings(adapters=[str(tmp_path)], ray=True), print, print)
    with pytest.raises(UsageError, match="does not exist"):
        serve_cluster(ServeSettings(adapters=[str(tmp_path / "none")], ray=True), print, print)


class Handle:
    """Replicas that are told what to do: each asked one takes the next of `plays`, and what it was asked is kept."""

    def __init__(self, *plays):
        self.plays, self.asked = list(plays), []

    def options(self, stream):
        return self

    def remote(self, asked):
        self.asked.append(asked)
        return Played(self.plays.pop(0))


class Played:
    def __init__(self, play):
        self.play, self.cancelled = iter(play), False

    def __aiter__(self):
        return self

    async def __anext__(self):
        step = next(self.play, None)
        if step is None:
            raise StopAsyncIteration
        if isinstance(step, Exception):
            raise step
        return [step]

    def cancel(self):
        self.cancelled = True


def asked_of(front, method="POST", body=b'{"model": "x"}', path="/v1/completions"):
    """What a front sends for one request."""
    from inlay.serve.http.keys import EVERYBODY

    async def ask():
        sent, parts = [], [{"type": "http.request", "body": body}]

        async def receive():
            return parts.pop() if parts else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        await front({"type": "http", "method": method, "path": path, "inlay.key": EVERYBODY}, receive, send)
        return sent

    return asyncio.run(ask())


def begins(name, kind=b"application/json"):
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
    return [{"type": "inlay.began", "replica": name}, head]


@needs_ray
def test_a_request_goes_to_another_replica_where_that_is_safe():
    from ray.exceptions import RayActorError

    from inlay.serve.cluster.front import Front
    from inlay.serve.http.limits import Limits
    from inlay.serve.http.problems import Problem

    def front(*plays):
        return Front(Handle(*plays), Limits(), "base", lambda: None)

    end, lost = {"type": "http.response.body", "body": b"{}"}, RayActorError()
    unfit, whole = [{"type": "inlay.unfit", "replica": "c", "said": "no"}], [*begins("b"), end]
    made = front([*begins("a"), lost], unfit, whole)
    assert dict(asked_of(made)[0]["headers"])[b"x-inlay-replica"] == b"b"
    assert [one.avoid for one in made.handle.asked] == [(), ("a",), ("a", "c")]
    assert {one.adapter for one in made.handle.asked} == {"x"}
    with pytest.raises(Problem, match="3 replicas failed"):
        asked_of(front(*[[*begins("a"), lost]] * 3))
    with pytest.raises(Problem, match="nobody knows whether it has done that"):
        asked_of(front([*begins("a"), lost]), "DELETE", path="/v1/experiments/x")
    piece = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
    sent = asked_of(front([*begins("a", b"text/event-stream"), piece, lost]))
    assert [one["body"][:7] for one in sent[1:]] == [b"data: 1", b"data: {"] and b"replica_lost" in sent[-1]["body"]
    assert sent[-1]["body"].endswith(b"data: [DONE]\n\n") and not sent[-1]["more_body"]


@needs_ray
def test_a_replica_that_lacks_changes_gets_them(tmp_path):
    from inlay.serve.cluster.front import Front
    from inlay.serve.http.limits import Limits

    whole = [*begins("b"), {"type": "http.response.body", "body": b"{}"}]
    front = Front(Handle([{"type": "inlay.behind"}], whole), Limits(), "base", lambda: None)
    front.changes.add("new", str(tmp_path), True)
    asked_of(front)
    first, second = front.handle.asked
    assert (first.version, first.changes, second.version) == (1, None, 1)
    assert [one.name for one in second.changes] == ["new"]


@needs_ray
def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    from inlay.serve.cluster.run import _check_address

    with pytest.raises(UsageError, match="Give auto or HOST:PORT"):
        _check_address("ray://somewhere:10001")
    with pytest.raises(InlayError, match=r"no Ray cluster answers at --ray-address 127\.0\.0\.1:1 "):
        _check_address("127.0.0.1:1")


# ---- two replicas


class Cluster:
    """`inlay serve --ray` as a process of its own, beside one server alone that serves the same folder."""

    def __init__(self, process, alone, folder, log):
        self.process, self.alone, self.folder, self.log = process, alone, folder, log
        self.url = ""

    def replicas(self):
        return httpx.get(f"{self.url}/v1/replicas", timeout=30).json()["data"]

    def below(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def client(self, url=None, kind=openai.OpenAI):
        return kind(base_url=f"{url or self.url}/v1", api_key="none", max_retries=0, timeout=240)

    def right(self, **given):
        return self.client(self.alone.url).completions.create(**given).choices[0].text


@pytest.fixture(scope="module")
def cluster(base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make_adapters(base_folder, folder)
    flags = ["--adapters", folder, "--base", base_folder, "--base-name", "tiny", "--dtype", "float32", "--port", 0]
    flags += ["--ray", "--replicas", 2, "--replica-cpus", 1, "--store", "20MB", "--drain", 5, "--json"]
    command = [sys.executable, "-m", "inlay", "serve", *map(str, flags)]
    files = tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    )  # a socket's path is short
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": files.name}
    log = tmp_path_factory.mktemp("log") / "stderr"
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
    try:
        with serving(base_folder, folder) as alone:
            made = Cluster(process, alone, folder, log)
            line = process.stdout.readline()
            assert line, log.read_text()[-2000:]
            made.url = json.loads(line)["url"]
            yield made
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        files.cleanup()


def together(cluster, asks):
    """(text, replica) of each ask, all of them at once."""

    async def all_of_them():
        async def one(ask):
            raw = await client.completions.with_raw_response.create(**ask)
            return raw.parse().choices[0].text, raw.headers["x-inlay-replica"]

        async with cluster.client(kind=openai.AsyncOpenAI) as client:
            return await asyncio.gather(*map(one, asks))

    return asyncio.run(all_of_them())


@needs_ray
def test_answers_are_those_of_one_server(cluster):
    for model in MODELS:
        given = {"model": model, "prompt": "a good film", "max_tokens": 8, "temperature": 0.7, "seed": 3, "logprobs": 2}
        ours, theirs = (
            one.completions.create(**given) for one in (cluster.client(), cluster.client(cluster.alone.url))
        )
        assert ours.choices == theirs.choices and ours.usage.total_tokens == theirs.usage.total_tokens
        pieces = cluster.client().completions.create(**{**given, "logprobs": None}, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == ours.choices[0].text
    talk = {"model": "chats", "messages": [{"role": "user", "content": "a good film"}], "max_tokens": 8, "seed": 1}
    ours, theirs = (
        one.chat.completions.create(**talk) for one in (cluster.client(), cluster.client(cluster.alone.url))
    )
    assert ours.choices == theirs.choices
    texts = {"model": "reviews", "input": ["a good film", "a bad one"]}
    ours, theirs = (httpx.post(f"{one}/v1/classify", json=texts).json() for one in (cluster.url, cluster.alone.url))
    assert ours["data"] == theirs["data"]
    listed = [
        {one.id for one in client.models.list()} for client in (cluster.client(), cluster.client(cluster.alone.url))
    ]
    assert listed[0] == listed[1] == set(MODELS)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        cluster.client().completions.create(model="nobody", prompt="x")
    assert httpx.get(f"{cluster.url}/").text.startswith("<!doctype html>")


@needs_ray
def test_an_adapter_is_asked_where_it_is(cluster):
    found: dict[str, set[str]] = {}
    for _ in range(3):
        asks = [{"model": model, "prompt": "x", "max_tokens": 2} for model in MODELS[:4]]
        for ask, (_, replica) in zip(asks, together(cluster, asks), strict=True):
            found.setdefault(ask["model"], set()).add(replica)
    assert all(len(replicas) == 1 for replicas in found.values())
    loaded = {one["replica"]: set(one["loaded"]) for one in cluster.replicas()}
    assert len(loaded) == 2
    for replica, names in loaded.items():
        assert names == {name for name, at in found.items() if at == {replica}}
    said = httpx.get(f"{cluster.url}/v1/adapters").json()["data"]
    assert {one["name"]: set(one["replicas"]) for one in said} == found
    assert f'replica="{found["plain"].pop()}"' in httpx.get(f"{cluster.url}/metrics").text


@needs_ray
def test_loading_reaches_every_replica(base_folder, cluster, tmp_path):
    make_adapters(base_folder, tmp_path, ["plain"], seed=9)
    (tmp_path / "plain").rename(cluster.folder / "later")
    for url in (cluster.url, cluster.alone.url):
        load = {"lora_name": "new", "lora_path": "later"}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=load, timeout=60).status_code == 200
    found = together(cluster, [NEW] * 24)
    assert {text for text, _ in found} == {cluster.right(**NEW)}
    assert len({replica for _, replica in found}) == 2  # one adapter that many ask for spills over
    out = {"lora_name": "reviews"}
    assert httpx.post(f"{cluster.url}/v1/unload_lora_adapter", json=out, timeout=60).status_code == 200
    assert "reviews" not in httpx.get(f"{cluster.url}/v1/adapters").text
    assert all("reviews" not in one["loaded"] for one in cluster.replicas())
    assert httpx.post(f"{cluster.url}/v1/unload_lora_adapter", json=out).status_code == 404
    wrong = httpx.post(f"{cluster.url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "../base"})
    assert wrong.status_code == 403


@needs_ray
def test_a_client_that_goes_frees_its_row(cluster):
    given = {"model": "plain", "prompt": "x", "max_tokens": LONG, "n": 16, "extra_body": {"ignore_eos": True}}
    before = httpx.get(f"{cluster.url}/metrics").text
    with cluster.client().completions.create(**given, stream=True) as pieces:
        next(iter(pieces))
    until = time.monotonic() + 30
    while any(one["running"] for one in cluster.replicas()) and time.monotonic() < until:
        time.sleep(0.1)
    text = httpx.get(f"{cluster.url}/metrics").text
    left = [line for line in text.splitlines() if 'adapter="plain",outcome="left"' in line and "_total" in line]
    assert 'outcome="left"' not in before and len(left) == 1 and left[0].endswith(" 1.0")


@needs_ray
def test_nothing_listens_beyond_this_machine(cluster):
    found = [
        one.laddr.ip
        for process in [psutil.Process(cluster.process.pid), *cluster.below()]
        for one in process.net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    ]
    assert len(found) > 5
    assert all(ip.removeprefix("::ffff:").startswith("127.") for ip in found)


@needs_ray
def test_a_killed_replica_loses_no_request(cluster):
    given = {"prompt": "a good film", "max_tokens": LONG, "temperature": 0, "extra_body": {"ignore_eos": True}}
    right = {model: cluster.right(model=model, **given) for model in ("plain", "asks", "chats", "new")}
    home = dict(
        zip(right, [at for _, at in together(cluster, [{**given, "model": one} for one in right])], strict=True)
    )
    asks = [{**given, "model": one} for one in right] * 4
    killed, errors = [], []

    async def stream_and_kill(client, pids):
        pieces = await client.completions.create(**given, model="plain", stream=True)
        try:
            async for _ in pieces:
                if not killed:
                    killed.append(pids[home["plain"]])
                    os.kill(killed[0], signal.SIGKILL)
        except openai.APIError as error:
            errors.append(error)

    async def all_of_them():
        pids = {one["replica"]: one["pid"] for one in cluster.replicas()}
        async with cluster.client(kind=openai.AsyncOpenAI) as client:
            jobs = [client.completions.create(**ask) for ask in asks]
            return (await asyncio.gather(*jobs, stream_and_kill(client, pids)))[:-1]

    found = asyncio.run(all_of_them())
    assert [one.choices[0].text for one in found] == [right[ask["model"]] for ask in asks]
    assert killed and not psutil.pid_exists(killed[0])
    assert [error.code for error in errors] == ["replica_lost"]
    assert cluster.log.read_text().count("has failed a request") >= 2  # the stream, and those that went elsewhere


@needs_ray
def test_a_new_replica_knows_what_was_changed_before(cluster):
    """One comes in place of the one that was killed, and serves what was loaded by name."""
    until = time.monotonic() + 240
    while httpx.get(f"{cluster.url}/readyz", timeout=30).json().get("replicas", 0) < 2 and time.monotonic() < until:
        time.sleep(0.5)
    assert len(cluster.replicas()) == 2
    answers = together(cluster, [NEW] * 24)
    assert {text for text, _ in answers} == {cluster.right(**NEW)}
    assert len({at for _, at in answers}) == 2
    assert "reviews" not in httpx.get(f"{cluster.url}/v1/adapters").text


@needs_ray
def test_it_ends_whole(cluster):
    below = cluster.below()
    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.process.wait(30) == 0
    _, left = psutil.wait_procs(below, 10)
    assert not left
