"""Kernels in Triton's language; each has a form in torch beside it, outside of here."""
