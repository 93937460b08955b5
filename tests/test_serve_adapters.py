"""Adapters of a server: found, loaded when they are asked for, replaced, let go; and what is never opened."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time

import pytest
import torch

import inlay
from engines import answer, ask, read, sayable, saying, serving, until
from inlay.errors import FormatError, InlayError, UsageError
from inlay.serve.adapters import AdapterStore, Forbidden, NotSettled, UnknownAdapter
from inlay.serve.watching import Watcher
from zoo import make


@pytest.fixture(scope="module")
def bank():
    return inlay.attach(make("llama"))


@pytest.fixture(scope="module")
def tokens(bank):
    return sayable(bank)


@pytest.fixture
def folder(tmp_path, tokens):
    """Three adapters, one of them in a run's folder, and folders of other things."""
    home = tmp_path / "adapters"
    home.mkdir()
    saying(tokens[0], home / "one")
    saying(tokens[1], home / "two")
    (home / "run" / "last").mkdir(parents=True)
    (home / "run" / "run.json").write_text("{}")
    saying(tokens[2], home / "run" / "adapter")
    (home / "notes").mkdir()
    (home / ".hidden").mkdir()
    return home


def store_of(bank, folder, **settings):
    return AdapterStore(bank, [folder], **{"settle": 0.0, **settings})


@pytest.fixture
def emptied(bank):
    yield bank
    bank._lookup.routing.in_flight.clear()
    for name in list(bank.adapters):
        bank.remove(name)


def test_what_lies_in_the_folders_is_known_and_nothing_is_loaded(emptied, folder):
    store = store_of(emptied, folder)
    known = {info.name: info for info in store.known()}
    assert list(known) == ["one", "run", "two"] and not emptied.adapters
    info = known["one"]
    assert (info.method, info.loaded, info.version, info.last_used, info.error) == ("BITFIT", False, 0, None, None)
    assert info.bytes > 0 and info.path == (folder / "one").resolve() and info.notes.fingerprint == emptied.fingerprint
    assert known["run"].path == (folder / "run" / "adapter").resolve()
    for name in ("one", "run"):
        assert [info.name for info in store_of(emptied, folder / name).known()] == [name]
    with pytest.raises(UsageError, match="does not exist"):
        store_of(emptied, folder / "nowhere")


def test_an_adapter_is_loaded_when_it_is_asked_for(emptied, folder):
    store = store_of(emptied, folder)
    name = store.resolve("one")
    assert list(emptied.adapters) == [name] and store.resolve("one") == name
    info = store.info("one")
    assert info.loaded and info.version == 1 and info.method == "BitFit" and info.last_used is not None
    for unknown in ("nobody", "notes", "adapter", name):
        with pytest.raises(UnknownAdapter):
            store.resolve(unknown)


def test_those_used_longest_ago_leave_memory_and_come_back(emptied, folder):
    one = store_of(inlay.attach(make("llama")), folder)
    one.resolve("one")
    size = one.info("one").bytes
    store = store_of(emptied, folder, memory=2 * size)
    for name in ("one", "two", "run"):
        store.resolve(name)
        store.sweep()
    assert [info.loaded for info in store.known()] == [False, True, True]
    blend = emptied.take_off(store.resolve("two"))
    store.resolve("one")
    store.sweep()
    assert [info.loaded for info in store.known()] == [True, False, True]  # a row holds "two"
    store.resolve("run")
    store.sweep()
    assert [info.loaded for info in store.known()] == [False, True, True]
    emptied.land(blend)
    assert store.info("one").version == 1 and len(emptied.adapters) == 2


def test_a_server_answers_with_less_memory_than_its_adapters_take(folder, tokens):
    with serving(folder, memory=1) as engine:
        for _ in range(2):
            for name, token in zip(("one", "two", "run"), tokens, strict=False):
                assert answer(engine, name) == [token] * 6
        until(lambda: not engine.bank.adapters)
        made = engine._writer._session.decoder._made
        assert not [key for key in made if key[0] != "constant"]


def test_paths_that_lead_elsewhere_are_forbidden(emptied, folder, tmp_path, tokens):
    saying(tokens[3], tmp_path / "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    saying(tokens[3], folder / "inner")
    (folder / "inner" / "adapter_model.safetensors").unlink()
    (folder / "inner" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    store = store_of(emptied, folder)
    wrong = ["../outside", str(tmp_path / "outside"), "one/../../outside", "/etc", "a\0b", "link", "inner"]
    for path in wrong:
        with pytest.raises(Forbidden):
            store.load("new", path)
    with pytest.raises(InlayError):
        store.load("new", "x" * 5000)
    for name in ("link", "inner"):
        with pytest.raises(Forbidden, match="link out of the folders"):
            store.resolve(name)
        assert "link out" in {info.name: info.error for info in store.known()}[name]
    with pytest.raises(UsageError, match="holds no adapter"):
        store.load("new", "notes")
    for name in ("", "x" * 201, "a\nb"):
        with pytest.raises(UsageError, match="no name"):
            store.load(name, "one")
    assert not emptied.adapters
    (folder / "alias").symlink_to(folder / "one")
    store.load("new", "alias")
    store.load("newer", str(folder / "two"))
    assert len(emptied.adapters) == 2


def test_pickles_are_never_opened(emptied, folder, tokens):
    saying(tokens[3], folder / "old")
    torch.save({}, folder / "one" / "training_args.bin")  # beside whole weights others' files do no harm
    (folder / "old" / "adapter_model.safetensors").rename(folder / "old" / "adapter_model.bin")
    store = store_of(emptied, folder)
    with pytest.raises(Forbidden, match="is a pickle"):
        store.resolve("old")
    with pytest.raises(Forbidden, match="is a pickle"):
        store.load("new", "old")
    assert store.resolve("one") and len(emptied.adapters) == 1


def test_an_adapter_over_others_elsewhere_is_forbidden(emptied, folder, tmp_path):
    other = inlay.attach(make("llama"))
    for name in ("x", "y"):
        other.add(name, inlay.Houlsby(reduction_factor=4), seed=1)
        other.save(name, tmp_path / name)
    for place in (tmp_path, folder):
        parts = [str(shutil.copytree(tmp_path / n, place / f"{n}_copy")) for n in ("x", "y")]
        other.add(f"over {place}", inlay.Fusion(adapters=parts), seed=1)
        other.save(f"over {place}", folder / f"over_{place.name}")
    store = store_of(emptied, folder)
    with pytest.raises(Forbidden):
        store.resolve(f"over_{tmp_path.name}")
    assert not emptied.adapters
    store.resolve("over_adapters")
    assert len(emptied.adapters) == 3
    store.unload("over_adapters")
    store.sweep()
    assert not emptied.adapters


def test_broken_folders_are_told_of_and_harm_nobody(emptied, folder, tokens):
    for name in ("cut", "words", "list", "other"):
        saying(tokens[3], folder / name)
    weights = (folder / "cut" / "adapter_model.safetensors").read_bytes()
    (folder / "cut" / "adapter_model.safetensors").write_bytes(weights[:-9])
    (folder / "words" / "adapter_config.json").write_text("{")
    (folder / "list" / "adapter_config.json").write_text("[]")
    notes = json.loads((folder / "other" / "inlay.json").read_text())
    (folder / "other" / "inlay.json").write_text(json.dumps(notes | {"fingerprint": "another"}))
    store = store_of(emptied, folder)
    assert len(store.known()) == 7
    for name in ("cut", "words", "list", "other"):
        for _ in range(2):
            with pytest.raises(InlayError):
                store.resolve(name)
        assert store.info(name).error
    assert not emptied.adapters and store.resolve("one")
    assert "words" in store.info("words").error
    (folder / "cut" / "adapter_model.safetensors").write_bytes(weights)
    assert store.resolve("cut") and store.info("cut").error is None


def test_an_adapter_that_cannot_answer_is_not_served(emptied, folder):
    store = store_of(emptied, folder)

    def check(name):
        raise RuntimeError("planted")

    store.bind(lambda do: do(), check, lambda: None)
    with pytest.raises(InlayError, match=r"'one' does not load \(RuntimeError\)"):
        store.resolve("one")
    assert not emptied.adapters
    checked = []
    store.bind(lambda do: do(), checked.append, lambda: None)
    store.load("one", "one")
    assert store.info("one").loaded and store.info("one").error is None
    store.resolve("two")
    assert len(checked) == 1  # another of its kind needs no forward


def test_what_does_not_load_leaves_the_version_before_in_place(folder, tokens):
    with serving(folder) as engine:
        assert answer(engine, "one") == [tokens[0]] * 6
        (folder / "two" / "adapter_model.safetensors").write_bytes(b"nothing")
        with pytest.raises(FormatError):
            engine.adapters.load("one", "two")
        assert answer(engine, "one") == [tokens[0]] * 6


def test_files_that_have_just_changed_are_waited_for(folder, tokens):
    with serving(folder) as engine:
        engine.adapters.settle = 0.4
        saying(tokens[3], folder / "new")
        Watcher(engine.adapters).look()
        begun = time.monotonic()
        assert answer(engine, "new") == [tokens[3]] * 6 and time.monotonic() - begun > 0.2


def test_files_that_change_meanwhile_are_not_taken_for_whole(emptied, folder, monkeypatch):
    store = store_of(emptied, folder)
    load = type(emptied).load

    def touched(bank, name, path):
        os.utime(folder / "one" / "adapter_config.json")
        return load(bank, name, path)

    monkeypatch.setattr(type(emptied), "load", touched)
    with pytest.raises(NotSettled):
        store.load("one", "one")
    assert not emptied.adapters


def test_asks_that_came_before_an_unload_are_answered(folder, tokens):
    with serving(folder, most=1) as engine:
        go = threading.Event()
        engine.call(lambda bank: go.wait(20))
        tickets = [engine.submit(ask("one")) for _ in range(3)]
        unloading = threading.Thread(target=engine.adapters.unload, args=("one",))
        unloading.start()
        until(lambda: "one" not in [info.name for info in engine.adapters.known()])
        with pytest.raises(UnknownAdapter):
            engine.submit(ask("one"))
        go.set()
        assert [read(ticket) for ticket in tickets] == [[tokens[0]] * 6] * 3
        unloading.join(20)
        until(lambda: not engine.bank.adapters)
        Watcher(engine.adapters).look()
        assert "one" not in [info.name for info in engine.adapters.known()]  # its folder is there still
        engine.adapters.load("one", "one")
        assert answer(engine, "one") == [tokens[0]] * 6


def test_rows_in_flight_end_on_the_version_they_began_with(folder, tokens):
    with serving(folder) as engine:
        ticket = engine.submit(ask("one", new=50))
        first = next(ticket.tokens())
        engine.adapters.load("one", "two")
        assert answer(engine, "one") == [tokens[1]] * 6
        assert {first.id, *read(ticket)} == {tokens[0]}
        assert engine.adapters.info("one").version == 2
        until(lambda: len(engine.bank.adapters) == 1)


def test_the_watcher_serves_what_comes_and_changes_and_drops_what_goes(folder, tokens):
    with serving(folder) as engine:
        watcher = Watcher(engine.adapters)
        saying(tokens[3], folder / "later" / "adapter")
        watcher.look()
        assert answer(engine, "later") == [tokens[3]] * 6 and answer(engine, "one") == [tokens[0]] * 6
        saying(tokens[4], folder / "one")
        os.utime(folder / "later" / "adapter" / "adapter_config.json", (1, 1))
        for _ in range(3):
            watcher.look()
        assert answer(engine, "one") == [tokens[4]] * 6
        assert [engine.adapters.info(name).version for name in ("one", "later")] == [2, 1]
        shutil.rmtree(folder / "two")
        watcher.look()
        assert "two" in [info.name for info in engine.adapters.known()]  # it may be on its way back
        watcher.look()
        with pytest.raises(UnknownAdapter):
            engine.submit(ask("two"))


def test_the_watcher_runs_by_itself(folder, tokens):
    with serving(folder) as engine:
        watcher = Watcher(engine.adapters, 0.02)
        watcher.start()
        saying(tokens[3], folder / "later")
        until(lambda: "later" in [info.name for info in engine.adapters.known()])
        assert answer(engine, "later") == [tokens[3]] * 6
        (folder / "later" / "adapter_model.safetensors").write_bytes(b"nothing")
        until(lambda: engine.adapters.info("later").error is not None)
        assert answer(engine, "later") == [tokens[3]] * 6
        watcher.stop()


def test_an_adapter_with_a_head_writes_no_text(folder, tokens):
    notes = json.loads((folder / "two" / "inlay.json").read_text())
    template = {"kind": "label", "task": "classify", "verbalizer": {"a": ["a"], "b": ["b"]}}
    (folder / "two" / "inlay.json").write_text(json.dumps(notes | {"template": template}))
    with serving(folder) as engine:
        error = answer(engine, "two")
        assert isinstance(error, UsageError) and "writes no text" in str(error)
        assert engine.adapters.opened("two") and answer(engine, "one") == [tokens[0]] * 6
