"""Offsets between tokens that are learnt, by interpolation."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops

WIDTH = 0.23  # of a Gaussian at first, beyond the least
LEAST_WIDTH = 0.27  # narrower ones would pass no gradient from one token to the next


class LearnedOffsets(nnx.Module):
  """Dilated convolution with learnable spacings (Khalfaoui-Hassani et al. 2023, arXiv 2112.03740).

  Args:
    offsets: in tokens, where they begin.
    reach: the largest offset.
    window: of the interpolation: "triangle", between two tokens, or "gauss", whose width is learnt
      too.
  Raises:
    ValueError: an offset is not from 1 to reach.
  """

  def __init__(self, offsets: Sequence[int], *, reach: int, window: str):
    self.reach, self.window = reach, window
    self.centers = nnx.Param(jnp.zeros(len(offsets)), axes=("offsets",))
    learns = window == "gauss"
    self.width = nnx.Param(jnp.full(len(offsets), WIDTH), axes=("offsets",)) if learns else None
    self.begin_at(offsets)

  def begin_at(self, offsets: Sequence[int]) -> None:
    """Sets the offsets; called once."""
    if any(not 1 <= offset <= self.reach for offset in offsets):
      raise ValueError(
        f"learned offsets begin at {tuple(offsets)}, expected all from 1 to reach={self.reach}; "
        f"set the reach to {max(1, *offsets)} or more, or begin at others"
      )
    self.centers[...] = jnp.asarray(offsets, self.centers.dtype)

  def __call__(self) -> jax.Array:
    """[offsets, reach], how much of each earlier token is in a partner."""
    centers = jnp.clip(self.centers[...], 1, self.reach)
    width = 1.0 if self.width is None else jnp.abs(self.width[...]) + LEAST_WIDTH
    return ops.offset_taps(centers, self.reach, window=self.window, width=width)
