"""Linear layers over a row or a few: the base's own numbers, by other ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from inlay.kernels.few_rows import FewRows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "width"), [(6, 5), (2050, 7), (1024, 64), (2 * 1031, 3)])
def test_rows_have_the_layers_own_outputs(dtype, bias, out, width):
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias=bias).to(dtype).requires_grad_(False)
    quick = FewRows(layer, copies=True)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for rows in (1, 2, 3, 8):
        x = torch.randn(1, rows, width).to(dtype)
        made = quick(x)
        if rows > 2 and dtype == torch.bfloat16:
            assert made is None
            continue
        assert made is not None and made.is_contiguous()
        torch.testing.assert_close(made, F.linear(x, layer.weight, layer.bias), rtol=near, atol=near)


def test_what_is_not_quicker_is_left_alone():
    layer = nn.Linear(8, 7).requires_grad_(False)
    assert FewRows(layer, copies=True)(torch.randn(1, 9, 8)) is None
    assert FewRows(layer, copies=True)(torch.randn(1, 8)) is None  # an odd number of outputs has no two halves
    assert FewRows(layer, copies=True)(torch.randn(1, 8).double()) is None
    assert FewRows(nn.Linear(8, 6), copies=False)(torch.randn(1, 8)) is None


def test_a_changed_weight_is_seen():
    layer = nn.Linear(8, 6).requires_grad_(False)
    quick, x = FewRows(layer, copies=True), torch.randn(1, 8)
    quick(x)
    layer.weight.copy_(torch.randn(6, 8))
    torch.testing.assert_close(quick(x), layer(x))
    layer.weight.data = torch.randn(6, 8)
    torch.testing.assert_close(quick(x), layer(x))
