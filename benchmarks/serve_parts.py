"""What benchmarks of the server share: a server in a process of its own, and adapters that each say one word."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["Planted", "Running", "drawn_loras", "planted", "replace_folder", "running", "tiny_base"]

LAUNCH = "from inlay.cli.app import app; app(prog_name='inlay')"
COLLECTS = """
import gc, signal

def collect(*_):
    gc.collect()
    gc.get_freeze_count() or gc.freeze()

signal.signal(signal.SIGUSR1, collect)
"""
"""What the server does at SIGUSR1. Libraries and base are looked through once: that takes most of a second."""
SCALE = 1e6
"""So much larger than what the base adds is the state that an adapter plants behind the last layer."""
TRIAL = 4
console = Console(stderr=True, highlight=False)


def tiny_base(folder: Path) -> Path:
    """A tiny random language model with its tokenizer, for a try of a minute."""
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=letters)
    inner.train_from_iterator(["one good film and another bad film were shown to a friendly audience"] * 9, trainer)
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )  # fmt: skip
    tf.set_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=0, pad_token_id=0, bos_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- adapters


@dataclass(frozen=True)
class Planted:
    """Adapters that each say one word, whatever they read: their folders by their words."""

    words: dict[str, Path]

    def right(self, word: str, text: str, tokens: int) -> bool:
        """Whether an answer's text is the word and nothing else, `tokens` times."""
        return text.replace(" ", "") == word * tokens


def planted(base: str, dtype: str, folder: Path, most: int) -> Planted:
    """Write up to `most` adapters that each say a word of their own. Each is a bias behind the last layer, which
    points where the head has its word, beside a second method with drawn values: those of `_beside` in turn. What
    does not say its word in a trial is left out.
    """
    import torch

    import inlay
    from inlay.bases.load import load_base

    opened = load_base(base, dtype)
    bank, tokenizer = inlay.attach(opened.model), opened.tokenizer
    model: Any = bank.model
    table = model.get_output_embeddings().weight
    last = model.config.num_hidden_layers - 1
    words = _words(tokenizer, len(table), most)
    for seed, ((word, token), other) in enumerate(zip(words.items(), cycle(_beside()), strict=False)):
        bias = inlay.BitFit(add_bias=True, targets=["down_proj"], layers=f"{last}")
        bank.add(word, [*other, bias], seed=seed)
        parts = bank.adapters[word].parts
        with torch.no_grad():
            for parameter in (p for part in parts[:-1] for own in part.params.values() for p in own.values()):
                parameter.add_(torch.randn_like(parameter) * 0.01)
            for own in parts[-1].params.values():
                own["bias"].copy_(SCALE * table[token])
    kept = _that_say_it(bank, tokenizer, list(words))[:most]
    for word in kept:
        notes = {"template": _template(word)} if len(word) % 2 else None
        bank.save(word, folder / word, notes=notes)
    return Planted({word: folder / word for word in kept})


def _beside() -> list[list[Any]]:
    import inlay

    return [
        [inlay.LoRA(r=8)], [], [inlay.IA3()], [inlay.PrefixTuning(4)], [inlay.LoRA(r=16)], [inlay.PromptTuning(4)],
        [inlay.DoRA(r=4)], [inlay.Pfeiffer()],
    ]  # fmt: skip


def _template(word: str) -> dict[str, Any]:
    """A template of labels, so that /v1/classify takes the adapter too."""
    from inlay.data.template import Template

    labels = {"no": [" no"], "yes": [" yes"]}
    return Template("label", "Review: {text}\nSentiment:", "label", labels, text="text").to_dict()


def _words(tokenizer: Any, vocabulary: int, most: int) -> dict[str, int]:
    """Tokens that are words of plain letters, long ones of the vocabulary's first; some more than `most`."""
    found: dict[str, int] = {}
    for token in range(min(vocabulary, 20_000)):
        word = tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()
        if word.isascii() and word.isalpha() and word not in found:
            found[word] = token
    best = sorted(found, key=lambda word: (-min(len(word), 6), found[word]))
    return {word: found[word] for word in best[: most + most // 4 + 4]}


def _that_say_it(bank: Any, tokenizer: Any, words: Sequence[str]) -> list[str]:
    from inlay.runtime.generating import generate
    from inlay.runtime.requests import Request
    from inlay.runtime.sampling import Sampling

    sampling = Sampling(max_new_tokens=TRIAL, ignore_eos=True)
    said = dict.fromkeys(words, "")
    asks = [Request(word, [3 + n % 50, 5, 6, 7], sampling) for n, word in enumerate(words)]
    for token in generate(bank, asks, tokenizer):
        said[words[token.request]] += token.text
    return [word for word, text in said.items() if text.replace(" ", "") == word * TRIAL]


def drawn_loras(bank: Any, count: int) -> list[str]:
    """Add `count` LoRAs whose values are drawn."""
    import torch

    import inlay

    names = [f"lora-{number}" for number in range(count)]
    for number, name in enumerate(names):
        bank.add(name, inlay.LoRA(r=8, alpha=16), seed=number)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return names


def replace_folder(folder: Path, source: Path) -> None:
    """Put a copy of an adapter in place of another, by renames."""
    beside, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    shutil.copytree(source, beside)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ---- the server


@dataclass(frozen=True)
class Running:
    """A server that runs: its address, the number of its process, its folder of adapters, and its file of keys."""

    url: str
    pid: int
    folder: Path
    keys: Path


@contextmanager
def running(work: Path, base: str, dtype: str, *, collects: bool = False, **flags: Any) -> Iterator[Running]:
    """`inlay serve` over work/adapters in a process of its own, its log in work/serve.log, with keys of work/keys. With
    `collects` it collects garbage at SIGUSR1. Raises: SystemExit where it does not start."""
    folder, keys = work / "adapters", work / "keys.sqlite"
    folder.mkdir(exist_ok=True)
    given = {"adapters": folder, "base": base, "base-name": "base", "dtype": dtype, "port": 0, "keys": keys, **flags}
    code = (COLLECTS if collects else "") + LAUNCH
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # or the server would outlive the benchmark
    command = [sys.executable, "-c", code, "serve", "--json", *(f"--{k}={v}" for k, v in given.items())]
    with (work / "serve.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield Running(_url(process, work), process.pid, folder, keys)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _url(process: Any, work: Path) -> str:
    """What the server says when it takes requests."""
    said = ""
    for line in process.stdout:
        said += line
        try:
            return json.loads(said)["url"]
        except ValueError:
            continue
    raise SystemExit(f"the server has not started; see {work / 'serve.log'}")
