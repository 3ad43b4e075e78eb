"""Inference: prefill, decoding with carried state, sampling; long convolutions as recurrences."""

from jaxmix.inference.distill import distill_filters
from jaxmix.inference.generate import generate
from jaxmix.inference.sampling import sample

__all__ = ["distill_filters", "generate", "sample"]
