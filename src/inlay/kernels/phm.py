"""Products with sums of Kronecker products, as hypercomplex layers have for weights.

    y = x H        H = sum_s rule_s (x) W_s, (in, out), for s = 1 to n        W_s = L_s R_s

A rule_s is (n, n), L_s (in / n, r), R_s (r, out / n). Entry (i, k), (j, l) of a Kronecker product is rule_s[i, j]
W_s[k, l], so x is read as (n, in / n) and y made as (n, out / n).

Paper: Zhang et al. 2021, "Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex
Multiplications with 1/n Parameters" (arXiv:2102.08597).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["phm_matrix", "phm_product"]


def phm_matrix(rule: Tensor, weight: Tensor) -> Tensor:
    """H (in, out), of rule (n, n, n) and W (n, in / n, out / n)."""
    n, small_in, small_out = weight.shape
    return torch.einsum("sij,skl->ikjl", rule, weight).reshape(n * small_in, n * small_out)


def phm_product(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x H (t, out), of x (t, in), rule (n, n, n), L (n, in / n, r) and R (n, r, out / n), without forming H.

    Where forming it is no more work, H is formed.
    """
    n, small_in, r = left.shape
    small_out = right.shape[2]
    if r * (small_in + small_out + n) >= small_in * small_out:  # both times n^2 products for each of x's vectors
        return x @ phm_matrix(rule, left @ right)
    low = x.reshape(-1, small_in) @ left.transpose(0, 1).reshape(small_in, n * r)  # (t n, n r)
    mixed = torch.einsum("tisr,sij->tjsr", low.view(-1, n, n, r), rule)
    return (mixed.reshape(-1, n * r) @ right.reshape(n * r, small_out)).view(len(x), n * small_out)
