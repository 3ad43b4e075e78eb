"""What the kernels of chunked recurrences share on every chip: the dtypes that they take, and
log-decays as they stand inside."""

from __future__ import annotations

import math

import jax.numpy as jnp

DTYPES = ("float32", "bfloat16")

LOG2E = 1 / math.log(2)
# Bits of decay in one token. What is left after more is 0 in float32 all the same. So bounded, sums
# of 409 multiples of 1 / GRAIN are exact in float32; no chunk has as many tokens.
STRONGEST = -160.0
GRAIN = 256.0
HIDDEN = -1e4  # exponent of a pair of tokens that do not see each other


def mixed_dtypes(**arrays) -> str | None:
  """Why arrays of these dtypes are not taken, or None."""
  dtypes = [str(x.dtype) for x in arrays.values()]
  if dtypes[0] in DTYPES and len(set(dtypes)) == 1:
    return None
  return f"{', '.join(arrays)} are {', '.join(dtypes)}, expected all float32 or all bfloat16"


def to_bits(g):
  """Natural log-decays as logarithms to base two, whose powers are one instruction."""
  return jnp.maximum(g * LOG2E, STRONGEST)


def in_two(g):
  """Log-decays from `to_bits` as sums of two: a difference of sums would lose the digits that the
  larger sum lacks, but those of the first parts are exact and those of the second small."""
  coarse = jnp.floor(g * GRAIN) / GRAIN
  return coarse, g - coarse
