"""The sayings that folklore.py puts to the test: what each claims, and how anybody can see it on rows of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SAYINGS", "Saying"]


@dataclass(frozen=True)
class Saying:
    """Of each of the `pairs` the first one should be the better one, if what is `said` holds. `stream` names that of
    folklore.py, `space` the entries of a race on other rows."""

    key: str
    title: str
    said: str
    pairs: Sequence[tuple[str, str]]
    stream: str
    space: str

    def yourself(self) -> list[str]:
        """The commands, for these rows and for others."""
        script = (
            f"python benchmarks/folklore.py --only {self.stream}" if self.stream else "python benchmarks/methods.py"
        )
        entries = [f"    {line}" for line in self.space.strip().splitlines()]
        return ["See it yourself, on these rows and on your own:", "", f"    {script}",
                f"    inlay race --data FILE --out runs/{self.key} --space {self.key}.yaml", "",
                f"where {self.key}.yaml is", "", *entries]  # fmt: skip


SAYINGS = (
    Saying(
        "rank", "A higher rank is better",
        "People say: one begins with r=8, and more rank is more quality; some say that beyond 8 nothing changes. Each "
        "rank below has the best of three rates.",
        [("r=8", "r=4"), ("r=16", "r=8"), ("r=32", "r=8"), ("r=64", "r=8")], "rank",
        "entries:\n  - {method: lora, r: [4, 8, 16, 32, 64], alpha: {times: r, by: 2}, lr: [3.3e-4, 1.0e-3, 3.0e-3]}",
    ),
    Saying(
        "alpha", "alpha is to be 2r",
        "People say: set alpha to twice the rank. Others say r, or 16 whatever the rank. alpha only multiplies what "
        "LoRA adds, so that it acts much as the rate does; all here have the rate that was best for their rank at 2r.",
        [("r=8", "r=8 alpha=8"), ("r=32", "r=32 alpha=32"), ("r=32", "r=32 alpha=16"), ("r=4", "r=4 alpha=16")],
        "rank,alpha",
        "entries:\n"
        "  - {method: lora, r: [8, 32], alpha: {times: r, by: 2}, lr: [3.3e-4, 1.0e-3]}\n"
        "  - {method: lora, r: [8, 32], alpha: {times: r, by: 1}, lr: [3.3e-4, 1.0e-3]}\n"
        "  - {method: lora, r: 32, alpha: 16, lr: [3.3e-4, 1.0e-3]}",
    ),
    Saying(
        "targets", "Adapt all linear layers",
        "People say: all linear layers beat queries and values alone (as in LoRA's paper), also at equal numbers of "
        "trained parameters: qv at r=42 has about as many as all linear layers at r=8. Each has the best of the rates "
        "3.3e-4 and 1e-3, all linear layers of 3e-3 too.",
        [("r=8", "qv r=8"), ("r=8", "qkv r=8"), ("r=8", "attention r=8"), ("r=8", "mlp r=8"), ("r=8", "qv r=42")],
        "rank,targets",
        "entries:\n"
        "  - {method: lora, targets: [all-linear, qv, qkv, attention, mlp], lr: [3.3e-4, 1.0e-3]}\n"
        "  - {method: lora, targets: qv, r: 42, alpha: 84, lr: [3.3e-4, 1.0e-3]}",
    ),
    Saying(
        "prefix", "LoRA is better than prefix tuning",
        "People say: LoRA scores higher than a prefix, and a prefix is slower. LoRA has the best of three rates, "
        "prefixes the one that was best of three for 20 virtual tokens.",
        [("r=8", "prefix 20"), ("r=8", "prefix 50")], "rank,prefix,time",
        "entries:\n"
        "  - {method: lora, lr: [3.3e-4, 1.0e-3, 3.0e-3]}\n"
        "  - {method: prefix, num_virtual_tokens: 20, lr: [3.3e-3, 1.0e-2, 3.0e-2]}",
    ),
    Saying(
        "tokens", "More virtual tokens are better",
        "People say: 20 virtual tokens rather than 10. All lengths have the rate that was best for 20.",
        [("prefix 10", "prefix 5"), ("prefix 20", "prefix 10"), ("prefix 50", "prefix 20")], "prefix",
        "entries:\n  - {method: prefix, num_virtual_tokens: [5, 10, 20, 50], lr: 1.0e-2}",
    ),
    Saying(
        "network", "A prefix needs its network",
        "People say: prefixes train badly without reparameterisation by a small network (as in prefix tuning's paper). "
        "Those without it begin here as the base's own keys and values of random tokens. Each has the best of three "
        "rates.",
        [("prefix 20, network", "prefix 20")], "prefix",
        "entries:\n"
        "  - {method: prefix, prefix_projection: true, lr: [3.3e-4, 1.0e-3, 3.0e-3]}\n"
        "  - {method: prefix, prefix_projection: false, lr: [3.3e-3, 1.0e-2, 3.0e-2]}",
    ),
    Saying(
        "dropout", "Few rows want dropout",
        "People say: with few rows, a dropout of 0.05 to 0.1 keeps LoRA from learning them by heart. 200 rows, twice, "
        "at the rate that was best for r=8 on 480.",
        [("dropout 0.05", "dropout 0"), ("dropout 0.1", "dropout 0"), ("dropout 0.2", "dropout 0")], "rank,dropout",
        "entries:\n  - {method: lora, dropout: [0.0, 0.05, 0.1, 0.2], lr: [3.3e-4, 1.0e-3]}",
    ),
    Saying(
        "rate", "The learning rate decides more than the method",
        "People compare methods at one rate each. Here is how far rates move one method, and methods one another.",
        [], "",
        "entries:\n"
        "  - {method: [lora, dora, houlsby, ia3, prefix, prompt, norm]}\n"
        "  - {method: [lora, dora, houlsby, ia3, prefix, prompt, norm], lr: {times: usual, by: 0.333}}\n"
        "  - {method: [lora, dora, houlsby, ia3, prefix, prompt, norm], lr: {times: usual, by: 3}}",
    ),
)  # fmt: skip
