"""Tensor code that knows no method: fused modules, and tensors made again in the backward."""
