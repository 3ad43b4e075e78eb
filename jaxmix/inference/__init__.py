"""Inference: prefill, decoding with carried state, sampling."""

from jaxmix.inference.generate import generate
from jaxmix.inference.sampling import sample

__all__ = ["generate", "sample"]
