"""Linear layers over as many rows as are written at once: the base's own numbers, by every way there is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from inlay.kernels import decode_linear
from inlay.kernels.decode_linear import LARGE, TURNED, DecodeLinear
from inlay.kernels.processor import has_onednn


@pytest.fixture
def machine(monkeypatch):
    """Sets what is read of the machine: AVX-512, an AMD processor, threads."""

    def become(wide: bool, amd: bool = False, threads: int = 2) -> None:
        monkeypatch.setattr(decode_linear, "wide_vectors", lambda: wide)
        monkeypatch.setattr(decode_linear, "amd", lambda: amd)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    become(True)
    return become


def ways(monkeypatch) -> list[str]:
    """Which of the quick ways are gone, in turn."""
    gone: list[str] = []
    bags, large = DecodeLinear._bags, decode_linear._onednn_is_quicker
    monkeypatch.setattr(DecodeLinear, "_bags", lambda *a: gone.append("bags") or bags(*a))
    monkeypatch.setattr(decode_linear, "_onednn_is_quicker", lambda *a: large(*a) and (gone.append("onednn") or True))
    return gone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "width"), [(6, 5), (2050, 7), (1024, 64), (2 * 1031, 3)])
def test_rows_have_the_layers_own_outputs(dtype, bias, out, width, machine):
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias=bias).to(dtype).requires_grad_(False)
    quick = DecodeLinear(layer, copies=True)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for rows in (1, 2, 3, 8):
        x = torch.randn(1, rows, width).to(dtype)
        made = quick(x)
        if rows > 2 and dtype == torch.bfloat16:
            assert made is None
            continue
        assert made is not None and made.is_contiguous()
        torch.testing.assert_close(made, F.linear(x, layer.weight, layer.bias), rtol=near, atol=near)


def test_what_is_not_quicker_is_left_alone(machine):
    layer = nn.Linear(8, 7).requires_grad_(False)
    assert DecodeLinear(layer, copies=True)(torch.randn(1, 9, 8)) is None
    assert DecodeLinear(layer, copies=True)(torch.randn(1, 8)) is None  # an odd number of outputs has no two halves
    assert DecodeLinear(layer, copies=True)(torch.randn(1, 8).double()) is None
    assert DecodeLinear(nn.Linear(8, 6), copies=False)(torch.randn(1, 8)) is None


def test_a_changed_weight_is_seen(machine):
    layer = nn.Linear(8, 6).requires_grad_(False)
    quick, x = DecodeLinear(layer, copies=True), torch.randn(1, 8)
    quick(x)
    layer.weight.copy_(torch.randn(6, 8))
    torch.testing.assert_close(quick(x), layer(x))
    layer.weight.data = torch.randn(6, 8)
    torch.testing.assert_close(quick(x), layer(x))


@pytest.mark.parametrize(("wide", "dtype", "threads", "rows"), [
    (True, torch.float32, 1, {1: ["bags"], 2: ["bags"]}), (True, torch.bfloat16, 2, {1: ["bags"], 2: ["bags"]}),
    (False, torch.float32, 2, {1: ["bags"], 2: []}), (False, torch.float32, 1, {1: [], 2: []}),
    (False, torch.bfloat16, 2, {1: [], 2: []}), (False, torch.float16, 2, {1: [], 2: []}),
])  # fmt: skip
def test_bags_where_they_are_quicker(machine, monkeypatch, wide, dtype, threads, rows):
    machine(wide, threads=threads)
    gone, layer = ways(monkeypatch), nn.Linear(16, 6).to(dtype).requires_grad_(False)
    for count, expected in rows.items():
        gone.clear()
        DecodeLinear(layer, copies=True)(torch.randn(1, count, 16).to(dtype))
        assert gone == expected, count


@pytest.mark.skipif(not has_onednn(), reason="torch without oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_large_weights_go_through_onednn_on_amd(machine, monkeypatch, bias):
    machine(False, amd=True)
    torch.manual_seed(0)
    layer = nn.Linear(256, LARGE // 256, bias=bias).requires_grad_(False)
    small = nn.Linear(256, LARGE // 256 - 2, bias=bias).requires_grad_(False)
    gone = ways(monkeypatch)
    for rows in (1, TURNED + 1, 40):
        gone.clear()
        x = torch.randn(2, rows, 256)[:1] if rows == 1 else torch.randn(rows, 2, 256)[:, 0][None]  # not contiguous
        made = DecodeLinear(layer, copies=True)(x)
        assert gone == ["onednn"] and made is not None
        assert made.is_contiguous() and made.shape == (1, rows, LARGE // 256)
        torch.testing.assert_close(made, layer(x), rtol=1e-5, atol=1e-5)
        assert rows == 1 or (DecodeLinear(small, copies=True)(x) is not None and gone == ["onednn"])  # as W x^T
    machine(True, amd=True)
    assert DecodeLinear(small, copies=True)(torch.randn(TURNED + 1, 256)) is None
    machine(False, amd=True, threads=1)
    assert DecodeLinear(small, copies=True)(torch.randn(TURNED + 1, 256)) is None
    assert DecodeLinear(layer, copies=False)(torch.randn(1, 256)) is None
    machine(False, amd=False)
    assert DecodeLinear(layer, copies=True)(torch.randn(40, 256)) is None
    layer.weight.data = layer.weight.data.t().contiguous().t()
    machine(False, amd=True)
    assert DecodeLinear(layer, copies=True)(torch.randn(80, 256)) is None
