"""Filters of long convolutions that are sums of decaying waves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class ModalFilter(nnx.Module):
  """Poles and residues of filters for `jaxmix.ops.modal_convolution`.

      k_n = Re sum_m residue_m exp(n (i angle_m - exp(log_rate_m)))

  so that all waves decay, whatever the parameters are.

  Args:
    shape: logical name -> size of the channel axes, such as {"mlp": 768}.
    modes: waves of a filter.
    max_length: the slowest waves fall to 1 / e after so many lags at first.
    rngs: gives the initial parameters: rates spread evenly on a logarithmic scale, angles over a
      half-turn, and residues such that filters have a norm of about 1.
  Source: Massaroli et al. 2023 (arXiv 2310.18780), section 3; parameters and their first values
    after Orvieto et al. 2023 (arXiv 2303.06349), section 3.3.
  """

  def __init__(self, shape: Mapping[str, int], *, modes: int, max_length: int, rngs: nnx.Rngs):
    sizes, axes = (*shape.values(), modes), (*shape, "modes")
    lowest = -math.log(max_length)
    log_rates = jax.random.uniform(rngs.params(), sizes, minval=lowest, maxval=0)
    self.log_rates = nnx.Param(log_rates, axes=axes, inputs=0)
    angles = jax.random.uniform(rngs.params(), sizes, maxval=math.pi)
    self.angles = nnx.Param(angles, axes=axes, inputs=0)
    # The squares of a wave's lags add up to about size^2 / 2 / (1 - exp(-2 rate)).
    norm = jnp.sqrt(-jnp.expm1(-2 * jnp.exp(log_rates)) / modes)
    residues = norm * jax.random.normal(rngs.params(), (2, *sizes))
    self.residues = nnx.Param(residues, axes=("complex", *axes), inputs=0)
    self.channels, self.modes = math.prod(shape.values()), modes

  def __call__(self) -> tuple[jax.Array, jax.Array]:
    """The logarithms of the poles and the residues, both [channels, modes] complex."""
    rates, angles = -jnp.exp(self.log_rates[...]), self.angles[...]
    log_poles = jax.lax.complex(rates, angles).reshape(self.channels, self.modes)
    residues = jax.lax.complex(*self.residues[...]).reshape(self.channels, self.modes)
    return log_poles, residues

  def set_modes(self, log_poles: np.ndarray, residues: np.ndarray) -> None:
    """Takes these, as of `jaxmix.ops.fit_modes`, for its parameters."""
    for parameter, value in (
      (self.log_rates, np.log(-log_poles.real)),
      (self.angles, log_poles.imag),
      (self.residues, np.stack([residues.real, residues.imag])),
    ):
      parameter.set_value(jnp.asarray(value.reshape(parameter.shape), parameter.dtype))
