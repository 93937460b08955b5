"""`python -m inlay`."""

from __future__ import annotations

from inlay.cli.app import app

if __name__ == "__main__":
    app(prog_name="inlay")
