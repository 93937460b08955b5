"""The engine: asks of many threads are answered as `generate` answers each alone, whatever goes wrong beside them."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import inlay
from engines import answer, ask, read, saying, serving, until
from inlay.errors import InlayError, UsageError
from inlay.runtime.generating import generate
from inlay.runtime.requests import Request
from inlay.runtime.token_bytes import token_bytes
from inlay.serve.engine import Busy, UnknownAdapter
from test_decode import prompts_for
from test_laws import bank_of
from zoo import make

NAMES = ("small", "dora", "ia3", "prompt", "short", "bitfit", "houlsby", "loreft")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A bank of every method, and some of its adapters in a folder."""
    bank, folder = bank_of("llama"), tmp_path_factory.mktemp("adapters")
    names = [name for name in NAMES if name in bank.adapters]
    for name in names:
        bank.save(name, folder / name)
    return bank, folder, names


def expected(bank, given):
    found = {}
    requests = [Request(one.route, one.ids, one.sampling, one.place) for one in given]
    for token in generate(bank, requests):
        assert token.error is None
        found.setdefault((token.request, token.answer), []).append(token.id)
    return [[found[number, n] for n in range(one.sampling.n)] for number, one in enumerate(given)]


def answers(ticket):
    found = [[] for _ in range(ticket.ask.sampling.n)]
    for token in ticket.tokens():
        assert token.error is None, token.error
        found[token.answer].append(token.id)
    return found


def test_many_threads_get_what_each_would_get_alone(saved):
    bank, folder, names = saved
    rows = [None, *names, ["small", "dora"], {"small": 0.5, "ia3": 2.0}] * 3
    more = [{"n": 2, "temperature": 1.0, "seed": n} if n % 4 == 1 else {} for n in range(len(rows))]
    given = [
        ask(row, ids, 9, tenant=f"t{n % 3}", **settings)
        for n, (row, ids, settings) in enumerate(zip(rows, prompts_for(rows), more, strict=True))
    ]
    alone = expected(bank, given)
    with serving(folder, most=7) as engine, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda one: answers(engine.submit(one)), given)) == alone
        stats = engine.stats()
        assert stats.running == stats.waiting == 0 and stats.tokens == sum(len(a) for own in alone for a in own)
        until(lambda: engine.stats().blocks_used == 0)
        assert engine.ready and engine.alive
    assert not engine.ready and not engine.alive


def test_a_small_store_makes_rows_wait_or_read_again(saved):
    bank, folder, names = saved
    given = [ask("small", [6 + n] * 20, 30) for n in range(5)]
    given += [ask(row, ids, 30) for row, ids in zip(names, prompts_for(names), strict=True)]
    alone = expected(bank, given)
    with serving(folder, store=5 * 32 * token_bytes(bank)) as engine:
        go = threading.Event()
        engine.call(lambda bank: go.wait(20))
        tickets = [engine.submit(one) for one in given]
        go.set()
        assert [answers(ticket) for ticket in tickets] == alone
        assert engine.stats().blocks == 5 and engine.stats().preempted > 0


def test_tasks_read_tokens_as_threads_do(saved):
    bank, folder, names = saved
    given = [ask(row, ids) for row, ids in zip(names, prompts_for(names), strict=True)]

    async def all_of(engine):
        async def one(own):
            ticket = engine.submit(own)
            found = [token.id async for token in ticket]
            assert ticket.submitted <= ticket.admitted <= ticket.first <= ticket.last and ticket.made == len(found)
            return [found]

        return await asyncio.gather(*map(one, given))

    with serving(folder) as engine:
        assert asyncio.run(all_of(engine)) == expected(bank, given)


def test_what_can_never_be_answered_is_refused_at_once(saved):
    _, folder, _ = saved
    with serving(folder, most=3) as engine:
        for wrong, words in (
            (ask(None, []), "no tokens"),
            (ask(None, [48]), "48 in the prompt is no token"),
            (ask(None, [-1]), "no token"),
            (ask(None, [5] * 60), "64 positions"),
            (ask(None, n=4), "n is 4"),
            (ask(None, stop="x"), "no tokenizer"),
            (ask(None, logit_bias={99: 1.0}), "the base has 48"),
            (ask(None, place=9), "before token 9"),
            (ask(3.5), "no row of a route"),
            (ask({"small": "much"}), "no finite number"),
        ):
            with pytest.raises(UsageError, match=words):
                engine.submit(wrong)
        with pytest.raises(UnknownAdapter, match="'nobody'"):
            engine.submit(ask(["small", "nobody"]))
        error = answer(engine, {"short": 0.5})
        assert isinstance(error, UsageError) and "'short' cannot be weighted" in str(error)
        assert engine.stats().waiting == 0 and len(answer(engine, "small")) == 6


def test_cancelled_asks_free_their_rows_and_blocks(saved):
    _, folder, _ = saved
    with serving(folder, most=2) as engine:
        tickets = [engine.submit(ask("small", [5 + n], 50, tenant="a")) for n in range(6)]
        next(tickets[0].tokens())
        for ticket in tickets:
            ticket.cancel()
            ticket.cancel()
            assert ticket.done and list(ticket.tokens()) == []
        until(lambda: engine.stats().running == engine.stats().waiting == engine.stats().blocks_used == 0)
        assert not any(engine.bank._lookup.routing.in_flight.values())
        assert len(answer(engine, "small")) == 6


def test_a_queue_that_is_full_says_when_to_come_back(saved):
    _, folder, _ = saved
    with serving(folder, most=1, waiting=2) as engine:
        hold, go = threading.Event(), threading.Event()
        engine.call(lambda bank: (hold.set(), go.wait(20)))
        hold.wait(20)
        tickets = [engine.submit(ask(None)) for _ in range(2)]
        with pytest.raises(Busy) as caught:
            engine.submit(ask(None))
        assert 1 <= caught.value.retry_after <= 60
        go.set()
        assert [len(read(ticket)) for ticket in tickets] == [6, 6]
        assert len(answer(engine, None)) == 6


def test_a_tenant_of_many_asks_does_not_hold_up_another(saved):
    _, folder, _ = saved
    with serving(folder, most=1) as engine:
        go, order, lock = threading.Event(), [], threading.Lock()
        engine.call(lambda bank: go.wait(20))
        tickets = [engine.submit(ask("small", new=40, tenant="heavy")) for _ in range(9)]
        light = engine.submit(ask("small", new=40, tenant="light"))
        waiting = engine.stats().tenants
        assert (waiting["heavy"].waiting, waiting["light"].waiting) == (9, 1)

        def finish(name, ticket):
            list(ticket.tokens())
            with lock:
                order.append(name)

        threads = [threading.Thread(target=finish, args=("heavy", ticket)) for ticket in tickets]
        threads.append(threading.Thread(target=finish, args=("light", light)))
        for thread in threads:
            thread.start()
        go.set()
        for thread in threads:
            thread.join(60)
    assert len(order) == 10 and sum(one.last < light.first for one in tickets) <= 6


def test_a_flood_leaves_rows_and_places_to_others_that_are_known(saved):
    _, folder, _ = saved
    with serving(folder, most=8, waiting=32) as engine:
        assert len(answer(engine, "small", tenant="light")) == 6
        go, running = threading.Event(), []
        engine.call(lambda bank: go.wait(20))
        tickets = [engine.submit(ask("small", new=50, tenant="heavy")) for _ in range(28)]
        with pytest.raises(Busy):
            engine.submit(ask("small", tenant="heavy"))
        tickets.append(engine.submit(ask("small", tenant="light")))  # there are places for it
        go.set()
        for _ in range(5):
            engine.call(lambda bank: running.append(engine.stats().tenants["heavy"].running)).result()
        assert len(read(tickets[-1])) == 6 and 4 <= max(running) <= 7
        for ticket in tickets:
            ticket.cancel()


def test_a_sick_adapter_ends_its_own_asks_alone(saved):
    bank, folder, _ = saved
    with serving(folder) as engine:
        healthy = ask("dora", new=20)
        assert len(answer(engine, "small")) == 6

        def poison(bank):
            name = engine.adapters.resolve("small")
            with torch.no_grad():
                for value in bank.adapters[name].parameters():
                    value.fill_(float("nan"))
            engine._writer.reset()

        engine.call(poison).result()
        sick, well = engine.submit(ask("small", [9, 8])), engine.submit(healthy)
        error = read(sick)
        assert isinstance(error, InlayError) and "NaN" in str(error) and "@" not in str(error)
        assert answers(well) == expected(bank, [healthy])[0]


def test_a_step_that_fails_ends_what_ran_and_the_engine_goes_on(saved):
    bank, folder, _ = saved
    given = ask("dora", new=20)
    with serving(folder, most=2) as engine:
        assert answers(engine.submit(given)) == expected(bank, [given])[0]
        session = engine._writer._session
        step, failed = session.step, threading.Event()

        def broken():
            if len(session._writing) < 2 or failed.is_set():
                return step()
            failed.set()
            raise RuntimeError("planted")

        session.step = broken
        go = threading.Event()
        engine.call(lambda bank: go.wait(20))
        tickets = [engine.submit(given) for _ in range(3)]
        go.set()
        found = [read(ticket) for ticket in tickets]
        assert [isinstance(one, InlayError) for one in found] == [True, True, False]
        assert "RuntimeError" in str(found[0]) and [found[2]] == expected(bank, [given])[0]
        until(lambda: engine.stats().blocks_used == 0)
        assert engine.alive and not any(engine.bank._lookup.routing.in_flight.values())


def test_what_is_called_runs_between_steps_and_its_errors_come_back(saved):
    _, folder, _ = saved
    with serving(folder) as engine:
        ticket = engine.submit(ask(None, new=40))
        assert engine.call(lambda bank: threading.current_thread().name).result() == "inlay engine"
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda bank: 1 / 0).result()
        engine.call(lambda bank: bank.route([None]).__enter__()).result()  # a route left open stays in its call
        assert len(read(ticket)) == 40


def test_stopping_lets_answers_end_or_ends_them_with_an_error(saved):
    _, folder, _ = saved
    with serving(folder, most=1) as engine:
        tickets = [engine.submit(ask("small", new=30)) for _ in range(3)]
        stopping = threading.Thread(target=engine.stop, args=(30.0,))
        stopping.start()
        until(lambda: not engine.ready)
        with pytest.raises(Busy, match="stopping"):
            engine.submit(ask("small"))
        assert [len(read(ticket)) for ticket in tickets] == [30] * 3
        stopping.join(30)
    with pytest.raises(Busy):
        engine.call(lambda bank: None).result()
    with serving(folder, most=1) as engine:
        go = threading.Event()
        engine.call(lambda bank: go.wait(20))
        tickets = [engine.submit(ask("small", new=50)) for _ in range(9)]
        stopping = threading.Thread(target=engine.stop, args=(0.0,))
        stopping.start()
        go.set()
        stopping.join(30)
        assert all("stopped" in str(read(ticket)) for ticket in tickets)
        assert not engine.alive and not any(engine.bank._lookup.routing.in_flight.values())


@pytest.mark.parametrize("base", ["mamba", "t5"])
def test_bases_that_do_not_pack_are_answered_in_batches(base, tmp_path):
    bank = inlay.attach(make(base))
    for seed, (own, method) in enumerate({"lora": inlay.LoRA(r=2), "dora": inlay.DoRA(r=2)}.items()):
        bank.add(own, method, seed=seed)
        with torch.no_grad():
            for value in bank.adapters[own].parameters():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
        bank.save(own, tmp_path / own)
    rows = [None, "lora", "dora"] * 2
    given = [ask(row, ids, 5) for row, ids in zip(rows, prompts_for(rows), strict=True)]
    alone = expected(bank, given)
    with serving(tmp_path, base, most=4) as engine:
        go = threading.Event()
        engine.call(lambda bank: go.wait(20))
        tickets = [engine.submit(one) for one in given]
        tickets[2].cancel()
        go.set()
        for number, ticket in enumerate(tickets):
            if number != 2:
                assert answers(ticket) == alone[number]
        assert engine.stats().blocks == 0


def test_adapters_are_replaced_and_dropped_under_traffic(tmp_path):
    """Each adapter says its own token: an answer of two tokens, or of another's, is a wrong one."""
    from engines import sayable

    tokens = sayable(inlay.attach(make("llama")))[:6]
    folders = {n: tmp_path / f"a{n}" for n in range(3)}
    for n, folder in folders.items():
        saying(tokens[n], folder)
        saying(tokens[n + 3], tmp_path / f"b{n}")
    valid = {f"a{n}": {tokens[n], tokens[n + 3]} for n in folders}
    wrong, unknown, done, stop = [], [], [], threading.Event()
    with serving(tmp_path, most=6) as engine:

        def ask_on(number):
            name = f"a{number % 3}"
            while not stop.is_set():
                try:
                    found = answer(engine, name, [5 + number, 6], 12)
                except UnknownAdapter:
                    unknown.append(name)
                    continue
                if isinstance(found, InlayError) or len(set(found)) != 1 or not set(found) <= valid[name]:
                    wrong.append((name, found))
                done.append(name)

        threads = [threading.Thread(target=ask_on, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for turn in range(12):
            name = f"a{turn % 2}"
            engine.adapters.load(name, f"{'ba'[turn // 2 % 2]}{turn % 2}")
            if turn % 3 == 2:
                engine.adapters.unload("a2")
                time.sleep(0.02)
                engine.adapters.load("a2", "a2")
        stop.set()
        for thread in threads:
            thread.join(60)
        assert not wrong and len(done) > 12 and set(unknown) <= {"a2"}
        until(lambda: len(engine.bank.adapters) <= 3)


def test_an_answer_ends_where_an_adapter_leaves_no_position(tmp_path):
    """Who asks for all the positions of a base need not know what its adapters take; what leaves none is refused."""
    bank = inlay.attach(make("gpt2"))
    bank.add("prefix", inlay.PrefixTuning(num_virtual_tokens=11, init="random"))
    bank.add("prompt", inlay.PromptTuning(num_virtual_tokens=7, init="random"))
    for name in bank.adapters:
        bank.save(name, tmp_path / name)
    with serving(tmp_path, "gpt2", store=2**24) as engine:
        for name, left in ((None, 54), ("prefix", 43), ("prompt", 47)):
            tokens = list(engine.submit(ask(name, range(10, 20), 54)).tokens())
            assert len(tokens) == left and tokens[-1].finish_reason == "length"
        error = answer(engine, "prefix", range(5, 42), 20)
        assert len(error) == 64 - 37 - 11
        assert "its adapters 11, and 4 new tokens" in str(answer(engine, "prefix", [7] * 60, 4))
