"""Adapters that are broken or malicious, made by number: `attack(n, folder)` breaks the sound adapter in `folder`."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TENSORS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "inlay.json"
MARK = "INLAY_TEST_EXECUTED"
"""The environment variable that every payload would set."""


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return exec, (f"import os; os.environ[{MARK!r}] = '1'",)


PICKLE = b"cbuiltins\nexec\n(S'import os; os.environ[\"" + MARK.encode() + b'"] = "1"\'\ntR.'
"""A pickle that runs code, by hand."""


def truncated(rng: random.Random, folder: Path) -> None:
    """A tensor file cut inside of its length, its header, at a tensor's end, or anywhere."""
    file = folder / TENSORS
    data = file.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    ends = [header + t["data_offsets"][1] for t in json.loads(data[8:header]).values() if "data_offsets" in t]
    ends.remove(len(data))
    places = [
        rng.randrange(8),
        rng.randrange(8, header),
        rng.choice(ends),
        rng.randrange(len(data)),
        len(data) - 1,
        header,
    ]
    file.write_bytes(data[: rng.choice(places)])


def truncated_text(rng: random.Random, folder: Path) -> None:
    file = folder / rng.choice([CONFIG, NOTES])
    data = file.read_bytes().rstrip()
    file.write_bytes(data[: rng.randrange(len(data))])


def flipped(rng: random.Random, folder: Path) -> None:
    """One to eight bits of a file turned round: in the header, in the values, or in the config."""
    file = folder / rng.choice([TENSORS, TENSORS, CONFIG, NOTES])
    data = bytearray(file.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0] if file.name == TENSORS else len(data)
    first, last = rng.choice([(0, 8), (8, header), (0, len(data))]) if file.name == TENSORS else (0, len(data))
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))


def changed(edit: Callable[[random.Random, dict], None]) -> Callable[[random.Random, Path], None]:
    def attack(rng: random.Random, folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        edit(rng, tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / TENSORS)

    attack.__qualname__ = edit.__name__
    return attack


def poisoned(rng: random.Random, tensors: dict) -> None:
    value = tensors[rng.choice(sorted(tensors))].flatten()
    value[rng.randrange(len(value))] = rng.choice([float("nan"), float("inf"), -float("inf")])


def retyped(rng: random.Random, tensors: dict) -> None:
    """Whole numbers, truth values and eight bits where numbers belong."""
    key = rng.choice(sorted(tensors))
    kinds = [torch.int64, torch.int8, torch.bool, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.complex64]
    tensors[key] = tensors[key].to(rng.choice(kinds))


def reshaped(rng: random.Random, tensors: dict) -> None:
    key = rng.choice([key for key in sorted(tensors) if tensors[key].ndim == 2])
    value = tensors[key]
    tensors[key] = rng.choice([
        value.t(), value.flatten(), value[:0], value[:-1], value[:, :-1], value[None], torch.zeros(()),
        value.repeat(2, 1),
    ])  # fmt: skip


def renamed(rng: random.Random, tensors: dict) -> None:
    """A tensor lost, doubled, or of a name that is a path, a property of Python's, or nothing."""
    key = rng.choice(sorted(tensors))
    value = tensors.pop(key)
    names = ["", ".", "..", "../../etc/passwd", "base_model.model.", "__class__.__init__", "base_model.model.model"]
    names += ["a" * 5000, key + ".", "." + key, key + "\0", "\u202e" + key]
    names += [key.replace("layers.0", "layers.-1"), key.replace("layers.", "layers.9")]
    other = rng.choice([*names, None])
    if other is not None:
        tensors[other] = value


def enlarged(rng: random.Random, folder: Path) -> None:
    """A header that claims more than there is: bytes, dimensions, offsets, another's bytes, names given twice."""
    file = folder / TENSORS
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    way = rng.randrange(8)
    if way == 0:
        file.write_bytes(struct.pack("<Q", rng.choice([2**63, 2**64 - 1, 2**40, size + 1, size - 1, 0])) + data[8:])
        return
    if way == 1:
        header[name]["shape"] = [2**62, 2**62]
    elif way == 2:
        header[name]["data_offsets"] = rng.choice([[0, 2**60], [2**60, 0], [-8, 0], [8, 0], ["0", "8"], None])
    elif way == 3:
        header[name]["shape"] = rng.choice([[-2, -16], [1] * 70, "2, 16", [2.0, 16.0], None])
    elif way == 4:
        header[name]["dtype"] = rng.choice(["F3", "object", "", None, "F64"])
    elif way == 5:
        other = rng.choice([key for key in header if key not in ("__metadata__", name)])
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif way == 6:
        header["__metadata__"] = rng.choice([{"format": 5}, [], {"x": "y" * 200_000}, None])
    text = json.dumps(header).encode()
    if way == 7:  # the same key twice
        text = text[:-1] + b", " + json.dumps(name).encode() + b": " + json.dumps(header[name]).encode() + b"}"
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def pickled(rng: random.Random, folder: Path) -> None:
    """Files that would run code, or hold anything but tensors, under the name of PEFT's .bin."""
    tensors, file = load_file(folder / TENSORS), folder / "adapter_model.bin"
    way = rng.randrange(6)
    (folder / TENSORS).unlink()
    if way == 0:
        file.write_bytes(PICKLE)
    elif way == 1:
        torch.save({**tensors, "x": Payload()}, file)
    elif way == 2:
        torch.save(Payload(), file, _use_new_zipfile_serialization=False)
    elif way == 3:
        torch.save(rng.choice([[*tensors.values()], 5, {"a": "b"}, torch.nn.Linear(2, 2)]), file)
    elif way == 4:
        torch.save(tensors, file)
        data = file.read_bytes()
        file.write_bytes(data[: rng.randrange(len(data))])
    else:
        (folder / TENSORS).write_bytes(PICKLE)  # under the name that is never unpickled


def linked(rng: random.Random, folder: Path) -> None:
    """Files that are links out of the folder, to themselves, to folders or devices, or are folders."""
    file = folder / rng.choice([TENSORS, CONFIG])
    file.unlink()
    target = rng.choice(["/etc/passwd", "/", file.name, "../missing", "/dev/null", "/proc/self/environ", None])
    file.mkdir() if target is None else os.symlink(target, file)


VALUES = [
    None,
    5,
    -1,
    0,
    2**70,
    1e400,
    float("nan"),
    "",
    "x",
    "[(",
    "(a+)+$",
    [],
    {},
    [1],
    {"a": 1},
    True,
    False,
    [[]],
    "../..",
    "\0",
]


def misconfigured(rng: random.Random, folder: Path) -> None:
    """A field of a config that is lost, unknown, or of another kind; at times two."""
    file = folder / rng.choice([CONFIG, CONFIG, CONFIG, NOTES])
    config = json.loads(file.read_text())
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([*config, "unknown", "__class__", "", "parts"])
        if rng.random() < 0.2:
            config.pop(name, None)
        else:
            config[name] = rng.choice(VALUES)
    file.write_text(json.dumps(config))


def deep(rng: random.Random, folder: Path) -> None:
    """JSON that is deep, long, no object, no text, or of numbers beyond all bounds."""
    file = folder / rng.choice([CONFIG, NOTES])
    n = rng.choice([500, 2_000, 100_000])
    ways = [
        b"[" * n + b"]" * n, b'{"r":' * n + b"1" + b"}" * n,
        b'{"peft_type": "LORA", "r": ' + b"[" * n + b"]" * n + b"}",
        b'{"r": 1' + b"0" * n + b"}", b"null", b"5", b'"LORA"', b"", b"\xff\xfe\0", b"\0" * n,
        b'{"peft_type": "PARTS", "parts": [' + b'{"peft_type": "PARTS", "parts": [' * 50,
        b'{"peft_type": "PARTS", "parts": [{"peft_type": "LORA"}]}', b'{"peft_type": ["LORA"]}', b'{"peft_type": {}}',
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": "(.*)*$"}',
    ]  # fmt: skip
    file.write_bytes(rng.choice(ways))


KINDS = (
    truncated, truncated_text, flipped, flipped, changed(poisoned), changed(retyped), changed(reshaped),
    changed(renamed), enlarged, pickled, linked, misconfigured, deep,
)  # fmt: skip


def attack(number: int, folder: Path) -> str:
    """Break the adapter in `folder` in the way of `number`; the name of the kind."""
    rng = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    kind(rng, folder)
    return kind.__qualname__
