"""Experiments of `inlay serve`: who gets which arm, what is kept, and tests that may be looked at all the time."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from typer.testing import CliRunner

from inlay.cli.app import app
from inlay.errors import UsageError
from inlay.serve.experiments.arms import Experiment, Trial, draw, make_experiment, unit_of
from inlay.serve.experiments.results import Results
from inlay.serve.experiments.sequential import LEVEL, Bets, difference, mean_interval, share_interval
from inlay.serve.experiments.store import Measured, Store
from inlay.serve.http.experiments import set_from_file, start
from serving import serving

SERVED = ["plain", "reviews", "chats"]
UNITS = [unit_of("", f"user {number}") for number in range(4000)]


def drawn(**arms):
    experiment = Experiment("reviews", arms)
    return [draw(experiment, unit) for unit in UNITS]


# ---- who gets which arm


def test_arms_are_drawn_by_their_weights_and_stay():
    first = drawn(v3=9, v4=1)
    assert first == drawn(v4=0.1, v3=0.9)  # of any sum, in any order
    assert abs(first.count("v4") / len(UNITS) - 0.1) < 0.02
    assert set(drawn(v3=1, v4=0)) == {"v3"}
    other = [draw(Experiment("sql", {"v3": 9, "v4": 1}), unit) for unit in UNITS]
    both = sum(a == b == "v4" for a, b in zip(first, other, strict=True))
    assert both / len(UNITS) < 0.03  # who is in the small arm of one experiment is not in that of all


def test_the_same_user_gets_the_same_arm_in_every_process():
    assert unit_of("ann", "42").hex() == "cf6072d4dfdde43b2ba3c872ed1299ba"  # as b2sum -l 128 says
    assert [draw(Experiment("a", {"x": 1, "y": 1}), unit) for unit in UNITS[:12]] == list("xyxxyyxxyxxy")
    assert unit_of("ann", "42") != unit_of("bob", "42")
    assert unit_of("ann", None) != unit_of("ann", None)


def test_weights_that_move_move_no_more_than_they_must():
    before, after = drawn(v3=90, v4=10), drawn(v3=70, v4=30)
    moved = {(a, b) for a, b in zip(before, after, strict=True) if a != b}
    assert moved == {("v3", "v4")}
    assert abs(sum(a != b for a, b in zip(before, after, strict=True)) / len(UNITS) - 0.2) < 0.03
    third = drawn(v3=90, v4=10, v5=20)
    assert all(a == b or b == "v5" for a, b in zip(before, third, strict=True))


@pytest.mark.parametrize(
    ("name", "arms", "said"),
    [
        ("", {"a": 1}, "cannot be called"),
        ("{x", {"a": 1}, "cannot be called"),
        ("base", {"a": 1}, "the base's own name"),
        ("x", {}, "has 0 arms"),
        ("x", {"a": 1, "v9": 1}, "'v9' of 'x' is no model"),
        ("x", {"a": -1}, "weight -1"),
        ("x", {"a": float("nan")}, "weight nan"),
        ("x", {"a": True}, "weight True"),
        ("x", {"a": 0, "b": 0}, "all arms of 'x'"),
        ("b", {"a": 1}, "'b' is an adapter"),
    ],
)
def test_wrong_experiments_are_refused(name, arms, said):
    known = {"a", "b"}.__contains__
    with pytest.raises(UsageError, match=said):
        make_experiment(name, arms, "base", known, known)
    assert make_experiment("b", {"a": 1, "b": 0}, "base", known, known).arms == {"a": 1, "b": 0}


# ---- tests that may be looked at all the time


def looked_at(one, two, mean, runs=120, units=240, step=12):
    """How often, looked at after every few units, our test saw a difference, an interval missed `mean`, and a usual z
    test saw a difference."""
    random = np.random.default_rng(5)
    seen = missed = usual = 0
    for _ in range(runs):
        x, y = one(random, units), two(random, units)
        a, b = Bets(64), Bets(64)
        alarms = [False] * 3
        for n in range(step, units + 1, step):
            a.add(x[n - step : n])
            b.add(y[n - step : n])
            low, high = a.interval()
            away = abs(x[:n].mean() - y[:n].mean())
            error = 1.96 * np.sqrt((x[:n].var() + y[:n].var()) / n)
            now = difference([(a, b)])[1] < 1 - LEVEL, not low <= mean <= high, n >= 20 and away > error
            alarms = [old or new for old, new in zip(alarms, now, strict=True)]
        seen, missed, usual = (total + alarm for total, alarm in zip((seen, missed, usual), alarms, strict=True))
    return seen / runs, missed / runs, usual / runs


def thumbs(p):
    return lambda random, count: (random.random(count) < p).astype(float)


def test_who_peeks_is_not_fooled():
    """120 runs without a difference: at a true rate of 5 % more than 13 alarms have a probability of 0.002."""
    for one, mean in ((thumbs(0.5), 0.5), (thumbs(0.9), 0.9), (lambda r, n: r.beta(2, 1, n), 2 / 3)):
        seen, missed, usual = looked_at(one, one, mean)
        assert seen <= 13 / 120 and missed <= 13 / 120
        assert usual > 0.15  # what the same looks do to a test that is made for one look


def test_what_drifts_while_weights_move_is_no_difference():
    """Users think less and less of both arms alike, and the second arm comes into its own late."""
    random, wrong, pooled = np.random.default_rng(4), 0, 0
    for _ in range(60):
        phases = [(Bets(64), Bets(64)) for _ in range(2)]
        alarms = [False, False]
        for (one, two), share, p in zip(phases, (0.05, 0.5), (0.9, 0.6), strict=True):
            for _ in range(20):
                count = random.binomial(40, share)
                one.add(thumbs(p)(random, 40 - count))
                two.add(thumbs(p)(random, count))
                (a, b), (c, d) = phases
                alarms[0] |= difference(phases)[1] < 1 - LEVEL
                alarms[1] |= difference([(a.joined(c), b.joined(d))])[1] < 1 - LEVEL
        wrong, pooled = wrong + alarms[0], pooled + alarms[1]
    assert wrong <= 8 and pooled > 30  # what one pot for all phases makes of the same values


def test_phases_add_up():
    random, phases = np.random.default_rng(6), []
    ps = []
    for _ in range(3):
        pair = Bets(), Bets()
        pair[0].add(thumbs(0.9)(random, 120))
        pair[1].add(thumbs(0.7)(random, 120))
        phases.append(pair)
        (low, high), p = difference(phases)
        assert low <= -0.2 <= high
        ps.append(p)
    assert ps[2] < ps[0] and ps[2] < 0.01


def test_a_difference_is_found():
    seen, missed, _ = looked_at(thumbs(0.9), thumbs(0.65), 0.9, runs=40)
    assert seen > 0.9 and missed <= 6 / 40


def test_bets_go_on_and_bound_every_mean_between_their_edges():
    values = np.random.default_rng(2).beta(2, 1, 3000)
    whole, parts, fine = Bets(32), Bets(32), Bets(256)
    whole.add(values)
    for part in np.split(values, [1, 5, 1500]):
        parts.add(part)
    fine.add(values)
    assert np.allclose(whole.up, parts.up) and np.allclose(whole.down, parts.down)
    assert (np.repeat(whole.least(), 8) <= fine.least() + 1e-9).all()
    low, high = fine.interval()
    assert low <= 2 / 3 <= high and high - low < 0.06
    assert Bets().interval() == (0, 1) and difference([(Bets(), Bets())]) == difference([]) == ((-1, 1), 1)


def test_the_interval_of_a_difference_is_that_of_all_pairs_left():
    one, two = Bets(32), Bets(32)
    one.add([0.0, 1.0, 0.0, 0.2] * 30)
    two.add([1.0, 0.7, 0.9, 1.0] * 30)
    (low, high), p = difference([(one, two)])
    a, b = one.least(), two.least()
    pairs = [(i, j) for i, j in itertools.product(range(32), repeat=2) if a[i] + b[j] < -np.log(1 - LEVEL)]
    assert low == min(j - i - 1 for i, j in pairs) / 32 and high == max(j - i + 1 for i, j in pairs) / 32
    assert low > 0 and p < 1e-6


def test_intervals_of_rates_and_times_hold_under_peeking():
    random = np.random.default_rng(3)
    wrong = [0, 0]
    for _ in range(100):
        hits, times = (random.random(400) < 0.04).cumsum(), random.exponential(1, 400)
        sums, squares = times.cumsum(), (times**2).cumsum()
        looks = [(share_interval(int(hits[n - 1]), n), mean_interval(n, sums[n - 1], squares[n - 1]))
                 for n in range(50, 401, 10)]  # fmt: skip
        wrong[0] += any(not low <= 0.04 <= high for (low, high), _ in looks)
        wrong[1] += any(not low <= 1 <= high for _, (low, high) in looks)
    assert max(wrong) <= 12
    assert share_interval(0, 0) == (0, 1) and share_interval(3, 3)[1] == 1 and mean_interval(1, 1, 1) is None


# ---- what is kept


def trial(number, arm="v3", user=None, experiment="reviews"):
    return Trial(experiment, arm, unit_of("", user), f"cmpl-{number}")


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "state.sqlite")
    made.put(Experiment("reviews", {"v3": 0.9, "v4": 0.1}))
    yield made
    made.close()


def test_counts_and_feedback_of_each_arm(store):
    for number in range(4):
        one = trial(number, "v3" if number else "v4")
        store.began(one, "ann")
        store.ended(one, Measured("done" if number < 3 else "failed", 10, 5, 0.1 * (number + 1), 0.02))
    assert store.give("cmpl-1", 1.0, None, "ann") == ("v3", True)
    assert store.give("cmpl-1", 1.0, None, "ann") == ("v3", True)
    assert store.give("cmpl-1", 0.0, None, "ann") == ("v3", False)  # the first stands
    assert store.give("cmpl-2", 0.0, None, "bob") is None  # whose answer it was not
    assert store.give("cmpl-9", 0.0, None, None) is None
    made = Results(store).of(Experiment("reviews", {"v3": 0.9, "v4": 0.1}))
    v3, v4 = made["arms"]
    assert (v3["requests"], v3["errors"], v3["prompt_tokens"], v3["completion_tokens"]) == (3, 1, 30, 15)
    assert v3["ttft_ms"] == pytest.approx(300) and v3["between_ms"] == pytest.approx(20)
    assert v3["ttft_ms_interval"][0] < 300 < v3["ttft_ms_interval"][1] and v4["ttft_ms_interval"] is None
    assert v3["feedback"]["mean"] == 1 and v3["feedback"]["n"] == 1 and v4["feedback"]["mean"] is None
    assert made["comparisons"][0]["arm"] == "v4" and made["comparisons"][0]["differs"] is False


def test_a_user_counts_once_whatever_the_arm(store):
    for number, (arm, user) in enumerate([("v3", "a"), ("v3", "a"), ("v4", "a"), ("v4", "b"), ("v4", None)]):
        store.began(trial(number, arm, user), "")
        store.give(f"cmpl-{number}", number % 2, "a comment", None)
    results = Results(store)
    for _ in range(2):  # the second look goes on from the first
        v3, v4 = results.of(Experiment("reviews", {"v3": 1, "v4": 1}))["arms"]
        assert (v3["feedback"]["n"], v3["feedback"]["given"]) == (1, 2)
        assert (v4["feedback"]["n"], v4["feedback"]["given"]) == (2, 3)


def test_weights_that_move_begin_a_phase(store):
    arms = {"v3": 1, "v4": 1}
    assert [store.put(Experiment("e", one)) for one in (arms, arms, {"v3": 1}, arms)] == [True, False, False, False]
    assert store.get("e").phase == 2 and list(store.phases("e").values()) == [arms, {"v3": 1}, arms]
    number = itertools.count()
    for phase, values in enumerate(({"v3": "0011", "v4": "0111"}, {"v3": "1" * 40}, {"v3": "1", "v4": "1"})):
        for arm, value in ((arm, value) for arm, own in values.items() for value in own):
            one = trial(next(number), arm, experiment="e")
            one.phase = phase
            store.began(one, "")
            store.give(one.id, float(value), None, None)
    found = Results(store).of(store.get("e"))
    assert [arm["feedback"]["n"] for arm in found["arms"]] == [45, 5]
    assert found["comparisons"][0]["difference"] == pytest.approx(0.25 * 2 / 2.5)  # 0.25 of 4 + 4, 0 of 1 + 1


def test_results_are_the_same_whenever_somebody_looked(store):
    results = Results(store)
    for number in range(60):
        store.began(trial(number, ("v3", "v4")[number % 2]), "")
        store.give(f"cmpl-{number}", float(number % 3 > 0 or number % 2), None, None)
        if number % 7 == 0:
            results.of(Experiment("reviews", {"v3": 1, "v4": 1}))
    mine, fresh = (r.of(Experiment("reviews", {"v3": 1, "v4": 1})) for r in (results, Results(store)))
    assert mine["comparisons"][0]["p"] == pytest.approx(fresh["comparisons"][0]["p"])
    assert [a["feedback"]["interval"] for a in mine["arms"]] == [a["feedback"]["interval"] for a in fresh["arms"]]


def test_what_is_dropped_is_forgotten(store):
    one = trial(1)
    store.began(one, "")
    store.give("cmpl-1", 1, None, None)
    results = Results(store)
    assert results.of(Experiment("reviews", {"v3": 1}))["arms"][0]["feedback"]["n"] == 1
    assert store.drop("reviews") and not store.drop("reviews") and store.get("reviews") is None
    store.ended(one, Measured("done"))  # it began before
    store.put(Experiment("reviews", {"v3": 1}))
    found = results.of(Experiment("reviews", {"v3": 1}))["arms"][0]
    assert found["requests"] == 0 and found["feedback"]["n"] == 0
    assert store.give("cmpl-1", 1, None, None) is None


def test_arms_that_were_taken_out_keep_their_figures(store):
    one = trial(1, "v2")
    store.began(one, "")
    store.ended(one, Measured("done"))
    arms = Results(store).of(Experiment("reviews", {"v3": 1}))["arms"]
    assert [(arm["name"], arm["weight"], arm["requests"]) for arm in arms] == [("v3", 1, 0), ("v2", 0, 1)]


KILLED = """
import sys
from inlay.serve.experiments.arms import Experiment, Trial, unit_of
from inlay.serve.experiments.store import Measured, Store
store = Store(sys.argv[1])
store.put(Experiment("a", {"x": 1}))
for number in range(100000):
    trial = Trial("a", "x", unit_of("", None), f"cmpl-{number}")
    store.began(trial, "")
    store.ended(trial, Measured("done", 3, 2))
    store.give(trial.id, 1.0, None, None)
    print(number, flush=True)
"""


def test_what_was_said_to_be_kept_survives_a_kill(tmp_path):
    path = tmp_path / "state.sqlite"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(200)]
    os.kill(process.pid, signal.SIGKILL)
    said += [int(line) for line in process.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
    with sqlite3.connect(path) as base:
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    base.close()
    store = Store(path)
    given, counts = store.feedback("a"), store.counts("a")["x"]
    assert len(said) <= len(given) <= len(said) + 1
    assert len(given) <= counts.requests <= len(given) + 1 and counts.prompt_tokens == 3 * counts.requests
    store.close()


def test_files_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "x").write_text("no database, however long it is looked at" * 9)
    for path in (tmp_path / "x", tmp_path / "nowhere" / "y", tmp_path):
        with pytest.raises(UsageError, match="cannot hold experiments"):
            Store(path)


# ---- through the server


@pytest.fixture(scope="module")
def known(keys):
    return {
        "boss": keys.add("boss", None, None, True),
        "ann": keys.add("ann", ["films"], None, False),
        "bob": keys.add("bob", ["plain"], None, False),
    }


@pytest.fixture(scope="module")
def running(base_folder, folder, keys):
    """A server that asks for keys, and keeps experiments beside the adapters' folder."""
    with serving(base_folder, folder, keys, compare=True, state=str(folder.parent / "state.sqlite")) as made:
        yield made


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def ask(running, known):
    with httpx.Client(base_url=f"{running.url}/v1/", timeout=30) as client:

        def call(method, path, body=None, key="boss", **headers):
            headers = bearer(known[key]) | headers
            return client.request(method, path, json=body, headers=headers)

        yield call


@pytest.fixture
def films(ask):
    assert ask("PUT", "experiments/films", {"arms": {"plain": 1, "chats": 1}}).status_code == 201
    yield
    assert ask("DELETE", "experiments/films").status_code == 200


PROMPT = {"prompt": "a secret film", "max_tokens": 6, "temperature": 0}


def test_the_arm_answers_and_the_alias_is_the_model(running, known, films):
    client, ids = running.client(known["ann"]), running.tokenizer("a secret film", add_special_tokens=False).input_ids
    arms = {}
    for user in range(12):
        made = client.completions.create(model="films", user=f"user-{user}", **PROMPT)
        arms[user] = made.system_fingerprint
        assert made.model == "films"
        assert made.choices[0].text == running.alone(arms[user], ids, max_new_tokens=6)[0]
        again = list(client.completions.create(model="films", user=f"user-{user}", stream=True, **PROMPT))
        assert {piece.system_fingerprint for piece in again} == {arms[user]}
        assert "".join(piece.choices[0].text for piece in again) == made.choices[0].text
    assert set(arms.values()) == {"plain", "chats"}
    assert len({running.alone(arm, ids, max_new_tokens=6)[0] for arm in ("plain", "chats")}) == 2
    assert client.completions.create(model="films", **PROMPT).system_fingerprint in ("plain", "chats")


def test_sessions_stay_too_and_a_header_says_the_arm(ask, films):
    for path, body in (
        ("completions", PROMPT),
        ("completions", {**PROMPT, "stream": True}),
        ("completions", {**PROMPT, "echo": True, "max_tokens": 0}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
    ):
        seen = {}
        for session in range(6):
            made = [
                ask("POST", path, {"model": "films", **body}, "ann", **{"x-session": f"s{session}"}) for _ in range(2)
            ]
            assert all(one.status_code == 200 for one in made), made[0].text
            seen[session] = {one.headers["x-inlay-arm"] for one in made}
        assert all(len(arms) == 1 for arms in seen.values()) and len(set.union(*seen.values())) == 2
    plain = ask("POST", "completions", {"model": "plain", **PROMPT}, "bob")
    assert "x-inlay-arm" not in plain.headers and "system_fingerprint" not in plain.json()


def test_feedback_becomes_results(running, ask, films):
    given = {"plain": 0, "chats": 0}
    for number in range(24):
        made = ask("POST", "completions", {"model": "films", "user": f"secret-user-{number}", **PROMPT}, "ann").json()
        arm = made["system_fingerprint"]
        given[arm] += 1
        body = {"id": made["id"], "thumbs": "up" if arm == "chats" else "down", "comment": "well said"}
        assert ask("POST", "feedback", body, "bob").status_code == 404
        assert ask("POST", "feedback", body, "ann").json() == {
            "id": made["id"], "arm": arm, "value": float(arm == "chats"),
        }  # fmt: skip
        assert ask("POST", "feedback", {"id": made["id"], "value": 0.5}, "ann").status_code == 409
    running.service.experiments._writing.submit(lambda: None).result(10)  # what has ended is counted
    found = ask("GET", "experiments/films").json()
    for arm in found["arms"]:
        assert arm["feedback"]["n"] == arm["requests"] == given[arm["name"]] > 4
        assert arm["errors"] == 0 and arm["completion_tokens"] > 0 and arm["ttft_ms"] > 0 and arm["between_ms"] > 0
    (compared,) = found["comparisons"]
    assert compared["differs"] and compared["difference"] == 1 and compared["interval"][0] > 0
    assert ask("GET", "experiments").json()["data"] == [found]
    files = running.folder.parent.glob("state.sqlite*")
    kept = b"".join(path.read_bytes() for path in files)
    assert b"well said" in kept and b"secret" not in kept  # no prompt, and no user's name


@pytest.mark.parametrize(
    "body", [{}, {"value": 2}, {"value": -0.1}, {"value": 1, "thumbs": "up"}, {"thumbs": "sideways"}]
)
def test_feedback_has_one_value(ask, body):
    assert ask("POST", "feedback", {"id": "cmpl-1", **body}, "ann").status_code == 400


def test_only_who_may_use_the_alias_may_ask(ask, films, running, known):
    assert ask("POST", "completions", {"model": "films", **PROMPT}, "bob").status_code == 404
    assert ask("POST", "completions", {"model": "plain", **PROMPT}, "ann").status_code == 404
    assert [model["id"] for model in ask("GET", "models", key="ann").json()["data"]] == ["films"]
    assert ask("GET", "models/films", key="ann").json()["id"] == "films"
    assert "films" not in [model["id"] for model in ask("GET", "models", key="bob").json()["data"]]
    for method, path in (("GET", "experiments"), ("GET", "experiments/films"), ("DELETE", "experiments/films")):
        assert ask(method, path, key="ann").status_code == 403
    assert ask("PUT", "experiments/films", {"arms": {"plain": 1}}, "ann").status_code == 403
    with pytest.raises(openai.NotFoundError):
        running.client(known["bob"]).completions.create(model="films", **PROMPT)


def test_arms_must_be_there_and_stay(ask, films):
    refused = ask("PUT", "experiments/films", {"arms": {"plain": 1, "v9": 1}})
    assert refused.status_code == 400 and "'v9' of 'films'" in refused.json()["error"]["message"]
    assert "chats" in [arm["name"] for arm in ask("GET", "experiments/films").json()["arms"]]  # as before
    assert ask("PUT", "experiments/more", {"arms": {"films": 1}}).status_code == 400  # no alias of an alias
    assert ask("PUT", "experiments/reviews", {"arms": {"plain": 1}}).status_code == 400
    gone = ask("POST", "unload_lora_adapter", {"lora_name": "chats"})
    assert gone.status_code == 400 and "arm of the experiment 'films'" in gone.text
    taken = ask("POST", "load_lora_adapter", {"lora_name": "films", "lora_path": "plain"})
    assert taken.status_code == 400 and "is an experiment" in taken.text
    assert ask("GET", "experiments/none").status_code == ask("DELETE", "experiments/none").status_code == 404


def test_an_adapter_may_be_the_first_arm_of_its_own_name_and_mixes_are_arms(ask):
    mix = '{"plain": 0.5, "reviews": 0.5}'
    assert ask("PUT", "experiments/reviews", {"arms": {"reviews": 1, mix: 1, "tiny": 1}}).status_code == 201
    try:
        made = [ask("POST", "completions", {"model": "reviews", "user": f"u{n}", **PROMPT}).json() for n in range(16)]
        assert {one["system_fingerprint"] for one in made} == {"reviews", mix, "tiny"}
        models = [model["id"] for model in ask("GET", "models").json()["data"]]
        assert models.count("reviews") == 1
    finally:
        ask("DELETE", "experiments/reviews")
    alone = ask("POST", "completions", {"model": "reviews", **PROMPT}).json()
    assert "system_fingerprint" not in alone


def test_labels_are_asked_of_arms_too(running, ask):
    ask("PUT", "experiments/labels", {"arms": {"reviews": 1}})
    try:
        made = ask("POST", "classify", {"model": "labels", "input": ["a film", "a cat"]})
        assert made.headers["x-inlay-arm"] == made.json()["system_fingerprint"] == "reviews"
        assert ask("POST", "feedback", {"id": made.json()["id"], "value": 0.5}).json()["arm"] == "reviews"
        running.service.experiments._writing.submit(lambda: None).result(10)
        assert ask("GET", "experiments/labels").json()["arms"][0]["requests"] == 1
    finally:
        ask("DELETE", "experiments/labels")


def test_an_arm_whose_folder_has_gone_is_said(running, ask):
    store, said = running.service.experiments, []
    store.put(Experiment("gone", {"nowhere": 1, "plain": 0}))  # as another server left it
    try:
        answer = ask("POST", "completions", {"model": "gone", **PROMPT})
        assert answer.status_code == 503 and "'nowhere' of the experiment 'gone'" in answer.text
        start(SimpleNamespace(names=running.service.names, experiments=store), None, said.append)
        assert len(said) == 1 and "'nowhere' of the experiment 'gone'" in said[0]
    finally:
        ask("DELETE", "experiments/gone")


def test_experiments_of_a_file(running, tmp_path):
    names, store, said = running.service.names, running.service.experiments, []
    path = tmp_path / "e.yaml"
    path.write_text("films: {plain: 0.9, chats: 0.1}\nmore:\n  tiny: 1\n")
    set_from_file(names, store, str(path), said.append)
    assert store.get("films").arms == {"plain": 0.9, "chats": 0.1} and said == []
    path.write_text("films: {plain: 1}\n")
    set_from_file(names, store, str(path), said.append)
    assert store.get("films").arms == {"plain": 1} and "'more' is not in" in said[0]
    for text in ("films: {plain: 1, v9: 1}", "films: plain", "- a", "films: {plain: no}", "a: b: c", ""):
        path.write_text("more: {plain: 1}\n" + text if text.startswith("films") else text)
        with pytest.raises(UsageError):
            set_from_file(names, store, str(path), said.append)
        assert store.get("more").arms == {"tiny": 1}  # all or none
    with pytest.raises(UsageError, match="cannot be read"):
        set_from_file(names, store, str(tmp_path / "none.yaml"), said.append)
    assert store.drop("films") and store.drop("more")


def test_whatever_is_sent_about_experiments_is_answered(running, known):
    """Whatever the server's own OpenAPI allows, and what it does not."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers=bearer(known["boss"]))
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    failed, tried = [], set()

    def send(case):
        answer = case.call(base_url=running.url, timeout=30, headers=bearer(known["boss"]))
        tried.add((case.method, answer.status_code))
        if answer.status_code >= 500:
            failed.append((case.as_curl_command(), answer.text))

    for found in schema.include(path_regex="experiments|feedback").get_all_operations():
        operation = found.ok()
        for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
            test = given(case=operation.as_strategy(generation_mode=mode))(send)
            settings(max_examples=8, deadline=None, suppress_health_check=checks, database=None)(test)()
    assert not failed, failed[0]
    assert {method for method, _ in tried} == {"GET", "PUT", "DELETE", "POST"}


def test_a_server_without_a_file_says_so(base_folder, running):
    with serving(base_folder, running.folder) as other:
        for method, path, body in (("GET", "experiments", None), ("POST", "feedback", {"id": "a", "value": 1})):
            answer = httpx.request(method, f"{other.url}/v1/{path}", json=body)
            assert answer.status_code == 404 and "--state FILE" in answer.text


def test_the_command_keeps_what_it_answered_whatever_ends_it(base_folder, running, tmp_path):
    given = ["serve", "--adapters", running.folder, "--base", base_folder, "--port", "0", "--json"]
    given = [str(one) for one in (*given, "--experiments", tmp_path / "ab.yaml")]
    (tmp_path / "ab.yaml").write_text("films: {plain: 0.9, v9: 0.1}")
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code == 2 and "'v9' of 'films' is no model here" in refused.stderr
    (tmp_path / "ab.yaml").write_text("films: {plain: 0.5, chats: 0.5}")
    process = subprocess.Popen([sys.executable, "-m", "inlay", *given], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        with httpx.Client(base_url=json.loads(process.stdout.readline())["url"], timeout=30) as client:
            made = client.post("/v1/completions", json={"model": "films", **PROMPT}).json()
            assert client.post("/v1/feedback", json={"id": made["id"], "value": 0.25}).status_code == 200
    finally:
        process.kill()
        process.communicate()
    store = Store(tmp_path / "ab.sqlite")
    (kept,) = store.feedback("films")
    assert (kept.arm, kept.value, kept.first) == (made["system_fingerprint"], 0.25, True)
    assert store.get("films").arms == {"plain": 0.5, "chats": 0.5}
    store.close()
