"""One short call of every command in an environment of the plain dependencies: python .ci/bare_commands.py BIN FOLDER

BIN holds that environment's `inlay`; FOLDER is empty and takes what is made. Exit codes must be 0, with --json standard
output is one object, and standard error holds no notice of a library.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

NOTICE = re.compile(
    r"Warning\b|warnings\.warn|\bWARNING\b|deprecated|site-packages|Traceback|Failed to load|shards:|it/s\]|^W\d{4} "
    r"|\[transformers\]|huggingface/tokenizers",
    re.MULTILINE,
)
"""What libraries say when nobody asked; no command of ours says any of it."""
SAID = {"good": "a warm and funny film", "bad": "a dull and noisy film"}
TRAIN = ["train", "--data", "rows.csv", "--limit", "24", "--batch-size", "8", "--heldout", "0.25", "--json"]
RACE = ["race", "--data", "rows.csv", "--space", "quick", "--contenders", "3", "--batch-size", "2", "--heldout", "0.5"]
ASKED = ["--prompt", "A film to forget.", "--max-new-tokens", "4"]
COMMANDS = [
    ["--version"],
    ["methods"],
    ["doctor", "--json"],
    ["pull", "smollm2", "--json"],
    ["preview", "--data", "rows.csv", "--rows", "1"],
    [*TRAIN, "--out", "runs/lora"],
    [*TRAIN, "--out", "runs/prefix", "--method", "prefix", "--set", "num_virtual_tokens=4"],
    [*TRAIN, "--out", "runs/less", "--method", "ia3", "--gradient-checkpointing"],
    ["train", "--resume", "--out", "runs/lora", "--json"],
    ["eval", "--data", "rows.csv", "--adapter", "runs/lora/adapter", "--limit", "8", "--json"],
    ["predict", "--data", "rows.csv", "--adapter", "runs/lora/adapter", "--limit", "8", "--out", "said.csv", "--json"],
    ["inspect", "--adapter", "runs/lora/adapter", "--data", "rows.csv", "--limit", "8", "--json"],
    ["plan", "--data", "rows.csv", "--seconds", "10", "--json"],
    ["generate", "--adapter", "runs/lora/adapter", *ASKED, "--json"],
    ["generate", "--adapter", "runs/prefix/adapter", *ASKED],
    ["chat", "--adapter", "runs/lora/adapter", "--max-new-tokens", "4"],
    ["convert", "--adapter", "runs/lora/adapter", "--to", "lora", "--rank", "4", "--out", "as_lora", "--json"],
    [*TRAIN, "--out", "runs/chosen", "--method", "selective", "--set", "select=heads 0-2 of last 1"],
    [*RACE, "--out", "runs/race", "--json"],
    ["eval", "--data", "rows.csv", "--adapter", "runs/race", "--limit", "8", "--json"],
    ["combine", "--adapter", "runs/lora/adapter", "--adapter", "runs/lora/last", "--out", "both", "--json"],
    ["merge", "--adapter", "runs/lora/adapter", "--out", "merged", "--json"],
    ["generate", "--base", "merged", *ASKED, "--json"],
]


def write_rows(folder: Path) -> None:
    with open(folder / "rows.csv", "w", encoding="utf8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(40):
            label = ("good", "bad")[number % 2]
            writer.writerow([f"{SAID[label]}, number {number}", label])


def problems(command: list[str], done: subprocess.CompletedProcess[str]) -> list[str]:
    found = []
    if done.returncode:
        found.append(f"exit code {done.returncode}")
    if notice := NOTICE.search(done.stderr):
        found.append(f"standard error has {notice[0]!r}")
    if "--json" in command:
        try:
            told = json.loads(done.stdout)
        except ValueError as error:
            found.append(f"standard output is not one JSON object ({error})")
        else:
            found += [] if isinstance(told, dict) else ["standard output is JSON, but no object"]
    return found


def main() -> None:
    program, folder = Path(sys.argv[1]).absolute() / "inlay", Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder)
    known = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    failed = 0
    for command in COMMANDS:
        if not command[0].startswith("-") and not re.search(rf"\b{command[0]}\b", known):
            print(f"       {command[0]} is not there")
            continue
        start = time.perf_counter()
        done = subprocess.run(
            [program, *command], cwd=folder, capture_output=True, text=True, timeout=600, check=False,
            input="Hello\n/quit\n" if command[0] == "chat" else "", env=os.environ | {"COLUMNS": "100"},
        )  # fmt: skip
        wrong = problems(command, done)
        print(
            f"{time.perf_counter() - start:5.1f} s  {'WRONG' if wrong else 'fine '}  inlay {' '.join(command)!r}",
            flush=True,
        )
        if wrong:
            failed += 1
            print("; ".join(wrong), done.stdout[-2000:], done.stderr[-4000:], sep="\n", flush=True)
    if failed:
        sys.exit(f"{failed} commands failed in the bare environment")


if __name__ == "__main__":
    main()
