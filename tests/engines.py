"""What tests of the engine share: adapters that each say one token, and an engine over a folder of them."""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import inlay
from inlay.runtime.sampling import Sampling
from inlay.runtime.token_bytes import token_bytes
from inlay.serve.adapters import AdapterStore
from inlay.serve.engine import Ask, Engine
from zoo import make


def sayable(bank):
    """Tokens that an adapter can be made to say whatever it reads: those whose own column of the head gives them the
    largest logit."""
    table = bank.model.get_output_embeddings().weight
    return [token for token in range(3, len(table)) if int((table @ table[token]).argmax()) == token]


def saying(token, folder, base="llama", name="own"):
    """Write an adapter that says one token always; it is there at once, by a rename."""
    bank = inlay.attach(make(base))
    last = f"model.layers.{bank.model.config.num_hidden_layers - 1}.mlp.down_proj"
    bank.add(name, inlay.BitFit(add_bias=True, targets=["down_proj"]))
    table = bank.model.get_output_embeddings().weight
    with torch.no_grad():
        for path, own in bank.adapters[name].params.items():
            for value in own.values():
                value.copy_(1e6 * table[token]) if path == last else value.zero_()
    folder = Path(folder)
    beside, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    bank.save(name, beside)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def serving(folder, base="llama", store=None, most=8, waiting=256, **settings):
    """An engine over a folder of adapters, started."""
    bank = inlay.attach(make(base))
    adapters = AdapterStore(bank, [Path(folder)], **{"settle": 0.0, **settings})
    store = 64 * 32 * (token_bytes(bank) if bank.packs else 1) if store is None else store
    engine = Engine(bank, None, adapters, store=store, most=most, waiting=waiting)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(0.0)


def ask(route, ids=(5, 6, 7), new=6, **settings):
    own = {key: settings.pop(key) for key in ("tenant", "scope", "place", "name") if key in settings}
    return Ask(route, list(ids), Sampling(max_new_tokens=new, ignore_eos=True, **settings), **own)


def read(ticket):
    """The ids of the only answer, or its error."""
    tokens = list(ticket.tokens())
    error = next((token.error for token in tokens if token.error), None)
    return [token.id for token in tokens] if error is None else error


def answer(engine, *given, **settings):
    return read(engine.submit(ask(*given, **settings)))


def until(true, seconds=20.0):
    """Wait for what must come; fails where it does not."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
