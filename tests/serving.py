"""A server with real adapters on a tiny base, in a thread of the tests, and the same adapters to compare with."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import inlay
from inlay.bases.load import load_base
from inlay.data.template import Template
from inlay.runtime.generating import generate
from inlay.runtime.requests import Request
from inlay.runtime.sampling import Sampling
from inlay.serve.http.app import make_routes
from inlay.serve.http.run import open_service
from inlay.serve.http.server import Server, bound
from inlay.serve.http.settings import ServeSettings

REVIEW = Template(
    "label", "Review: {text}\nSentiment:", "label", {"bad": ["negative"], "good": ["positive"]}, text="text"
)
ADAPTERS = {
    "plain": (lambda: inlay.LoRA(r=2), None),
    "reviews": (lambda: inlay.LoRA(r=4), REVIEW),
    "chats": (lambda: inlay.PrefixTuning(3), Template("messages", answer="messages", chat=True)),
    "asks": (lambda: inlay.IA3(), Template("completion", "Question: {prompt}\nAnswer:", "completion")),
}
"""The adapters: their methods and templates."""


def make_adapters(base: Path, folder: Path, names=tuple(ADAPTERS), seed: int = 3) -> None:
    """Adapters with drawn parameters, each in its own folder."""
    bank = inlay.attach(load_base(str(base), "float32").model)
    torch.manual_seed(seed)
    for name in names:
        method, template = ADAPTERS[name]
        bank.add(name, method(), seed=seed)
        with torch.no_grad():
            for part in bank.adapters[name].parts:
                for own in part.params.values():
                    for parameter in own.values():
                        parameter.add_(torch.randn_like(parameter) * 0.4)
        notes: dict[str, Any] = {"dtype": "float32"}
        bank.save(name, folder / name, notes=notes | ({"template": template.to_dict()} if template else {}))


@dataclass
class Running:
    """A server under way: where it is, what it serves, and a bank of its own to compare with."""

    url: str
    service: Any
    server: Any
    folder: Path
    bank: Any = None
    tokenizer: Any = None
    _alone: dict[Any, Any] = field(default_factory=dict)

    def client(self, key: str = "none", **more: Any) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **more)

    def alone(self, route: Any, ids: list[int], place: int = 0, **sampling: Any) -> tuple[str, list[int]]:
        """What `generate` writes: text and ids."""
        request = Request(route, ids, Sampling(**sampling), place)
        tokens = list(generate(self.bank, [request], self.tokenizer))
        return "".join(token.text for token in tokens), [token.id for token in tokens]


@contextlib.contextmanager
def serving(base: Path, folder: Path, keys: Any = None, compare: bool = False, **settings: Any):
    """A server over the adapters in `folder`, which ends with the block."""
    given = ServeSettings(adapters=[str(folder)], base=str(base), base_name="tiny", dtype="float32", port=0, **settings)
    service = open_service(given)
    opened, ready = bound(given.host, 0), threading.Event()
    server = Server(make_routes(service), service, keys, given.allow_host, ready.set)
    service.engine.start()
    thread = threading.Thread(target=server.serve_on, args=(opened,))
    thread.start()
    try:
        assert ready.wait(60)
        running = Running(f"http://127.0.0.1:{opened.getsockname()[1]}", service, server, folder)
        if compare:
            own = load_base(str(base), "float32")
            running.bank, running.tokenizer = inlay.attach(own.model), own.tokenizer
            for path in folder.iterdir():
                running.bank.load(path.name, path)
        yield running
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
