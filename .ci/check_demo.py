"""Hold the numbers that `make demo` wrote against bounds: python .ci/check_demo.py [demo/result.json]

Seen: 73.6 % and 83.4 % of 1,000 reviews, whose standard errors are 1.4 % and 1.2 %. The bounds lie about three of them
away, so that other reviews, or another processor's rounding, do not break them.
"""

from __future__ import annotations

import json
import sys

BOUNDS = {
    "base_accuracy": (0.69, 0.8),
    "adapter_accuracy": (0.8, 1.0),
    "gain": (0.05, 0.2),
    "merged_max_difference": (0.0, 1e-3),
    "tokens_per_second": (20.0, 1e9),
    "peak_memory_mb": (200.0, 4000.0),
}
"""The least and the most that is taken for sound."""


def main() -> None:
    file = sys.argv[1] if len(sys.argv) > 1 else "demo/result.json"
    with open(file, encoding="utf8") as opened:
        result = json.load(opened)
    result["gain"] = result["adapter_accuracy"] - result["base_accuracy"]
    wrong = []
    for name, (least, most) in BOUNDS.items():
        value = result[name]
        inside = least <= value <= most
        print(f"{name:22} {value:12.6g}   {least:g} to {most:g}   {'fine' if inside else 'WRONG'}")
        if not inside:
            wrong.append(name)
    if wrong:
        sys.exit(f"the demonstration did not do what it promises: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
