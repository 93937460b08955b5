"""Runs an opponent's script as it is, and keeps the adapter it starts from, so that all contestants start alike.

python benchmarks/with_initial.py FOLDER SCRIPT ARGUMENTS...
"""

from __future__ import annotations

import runpy
import sys

import trl

folder, script = sys.argv[1:3]
plain = trl.SFTTrainer.train


def train(self, *args, **kwargs):
    self.model.save_pretrained(folder)
    return plain(self, *args, **kwargs)


trl.SFTTrainer.train = train
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
