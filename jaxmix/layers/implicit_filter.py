"""Filters of long convolutions that a small network of sines makes from the lag."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

CHUNK = 512  # lags whose filters are made at a time
TARGET = 1e-2  # what the window falls to
FASTEST, SLOWEST = (
  0.3,
  1.5,
)  # after these parts of the longest filter, in the last and first channel


class ImplicitFilter(nnx.Module):
  """Filters of any length up to `max_length`, whose parameters do not grow with it, but for the
  features of the lags.

      features:  n / (L - 1); cos and -sin of 2 pi f n / L for frequencies f, at first
      k_n = W_out sin(w s * (W_i h + b_i))...  exp(-|delta| n / (L - 1))

  with as many sine layers as `sines`, their frequencies w, learnt, the same in all of them, and a
  window that falls slowly in the first channel and fast in the last.

  Args:
    shape: logical name -> size of the channel axes, such as {"mlp": 768}.
    max_length: L, the longest filter.
    directions: 1; or 2, with a network for later tokens too.
    features: of a lag, an odd number from 3 on. Of 3, the last two hardly change: their frequency
      is 1e-4.
    hidden: width of the network.   sines: its sine layers.
    frequency: of the sines at first.   slope: s, a factor of them.
    rngs: gives the initial parameters, uniform within 1 / sqrt(inputs).
  Raises:
    ValueError: `features` is even or below 3.
  Source: Poli et al. 2023 (arXiv 2302.10866), section 3.3; sizes as in Fu et al. 2023 (arXiv
    2310.12109).
  """

  def __init__(
    self,
    shape: Mapping[str, int],
    *,
    max_length: int,
    directions: int = 1,
    features: int = 5,
    hidden: int = 64,
    sines: int = 3,
    frequency: float = 10.0,
    slope: float = 1.0,
    rngs: nnx.Rngs,
  ):
    if features < 3 or features % 2 == 0:
      raise ValueError(
        f"ImplicitFilter: features={features}, expected an odd number from 3 on: the lag, and "
        "pairs of cosines and sines"
      )
    self.positions = nnx.Param(
      jnp.asarray(lag_features(max_length, features), jnp.float32),
      axes=("lag", "features"),
      inputs=0,
    )
    self.frequency = nnx.Param(jnp.full(hidden, float(frequency)), axes=("hidden",), inputs=0)
    self.networks = nnx.List(
      [_Sines(features, hidden, sines, shape, rngs=rngs) for _ in range(directions)]
    )
    self.channels, self.max_length, self.slope = math.prod(shape.values()), max_length, slope

  def __call__(self, length: int | None = None) -> tuple[jax.Array, ...]:
    """The first `length` lags of the filters of each direction, [channels, length] float32; None
    means all.

    Raises:
      ValueError: there are fewer.
    """
    length = self.max_length if length is None else length
    if length > self.max_length:
      raise ValueError(
        f"ImplicitFilter: {length} lags of filters whose longest is max_length={self.max_length}; "
        "make rows shorter, or the model with a greater max_length"
      )
    positions = self.positions[...]
    scale = self.slope * self.frequency[...]
    time = jnp.linspace(0, 1, self.max_length, dtype=positions.dtype)
    fall = jnp.abs(
      jnp.linspace(
        math.log(TARGET) / SLOWEST, math.log(TARGET) / FASTEST, self.channels, dtype=time.dtype
      )
    )

    def of(lags):
      positions, time = lags
      window = jnp.exp(-fall * time[:, None])
      return tuple(network(positions, scale) * window for network in self.networks)

    return tuple(k.T for k in _in_chunks(of, (positions[:length], time[:length])))

  def flops(self, length: int) -> int:
    """Floating-point operations of filters of that length, a multiply-add counted as two."""
    return length * sum(network.flops_per_lag for network in self.networks)


def _in_chunks(function, arrays):
  """function(arrays) of rows that do not know one another, CHUNK at a time: of thousands at once
  XLA makes a program for TPU that takes many minutes to compile."""
  length = len(arrays[0])
  if length <= CHUNK:
    return function(arrays)
  count = -(-length // CHUNK)

  def cut(x):
    x = jnp.pad(x, [(0, count * CHUNK - length)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(count, CHUNK, *x.shape[1:])

  results = jax.lax.map(function, jax.tree.map(cut, arrays))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], results)


class _Sines(nnx.Module):
  """The network of one direction: lag features [L, E] -> [L, channels]."""

  def __init__(self, features: int, hidden: int, sines: int, shape: Mapping, *, rngs: nnx.Rngs):
    widths = [features, *(hidden,) * sines]

    def uniform(inputs: int, *shape):
      bound = inputs**-0.5
      return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)

    pairs = list(itertools.pairwise(widths))
    self.weights = nnx.List(
      [
        nnx.Param(uniform(i, i, o), axes=("features", "hidden"), inputs=1, std=(3 * i) ** -0.5)
        for i, o in pairs
      ]
    )
    self.biases = nnx.List([nnx.Param(uniform(i, o), axes=("hidden",), inputs=0) for i, o in pairs])
    self.weights.append(
      nnx.Param(
        uniform(hidden, hidden, *shape.values()),
        axes=("hidden", *shape),
        inputs=1,
        std=(3 * hidden) ** -0.5,
      )
    )
    self.flops_per_lag = 2 * sum(weight.size for weight in self.weights)

  def __call__(self, h, scale):
    # Sines of steep slope enlarge what is lost in a product of rounded operands.
    *weights, out = (weight[...] for weight in self.weights)
    for weight, bias in zip(weights, self.biases, strict=True):
      h = jnp.sin(scale * (jnp.matmul(h, weight, precision="highest") + bias[...]))
    return jnp.matmul(h, out.reshape(out.shape[0], -1), precision="highest")


def lag_features(length: int, features: int) -> np.ndarray:
  """[length, features] float64: the lag from 0 to 1, cosines, and sines with their sign turned, at
  (features - 1) / 2 frequencies from 1e-4 to one less than their number, in turns of the length."""
  bands = (features - 1) // 2
  frequencies = np.linspace(1e-4, bands - 1, bands)
  angles = 2 * np.pi * np.arange(length)[:, None] / length * frequencies
  return np.concatenate(
    [np.linspace(0, 1, length)[:, None], np.cos(angles), -np.sin(angles)], axis=1
  )
