"""The op delta_rule where its inverse is hardest, and where it writes nothing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops
from jaxmix.ops.products import invert_unit_lower


@pytest.mark.parametrize(("beta", "decay"), [(0.5, 0.1), (1.0, 0.1), (1.0, 0.0), (2.0, 0.0)])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_repeated_keys(size, beta, decay, errors):
  """One key at every token, where series in powers of M lose all digits: the inverse keeps
  float32's."""
  row, column = np.indices((size, size))
  m = np.where(row > column, beta * np.exp(-decay * np.maximum(row - column, 0)), 0)
  exact = np.linalg.inv(np.eye(size) + m)
  (found,) = invert_unit_lower(jnp.asarray(m, jnp.float32)[None, None, None, None])[0, 0, 0]
  rms, largest, worst = errors(found, exact)
  # Entries are sums of products of at most four numbers of order one in each of log2(C) levels.
  assert max(rms, largest) <= 4 * np.log2(size) * np.finfo(np.float32).eps, (rms, largest, worst)


@pytest.mark.parametrize("chunk_size", [64, 256])
def test_repeated_keys_in_chunks(chunk_size, close):
  """The whole op on one key repeated, beta 1: what is read is the newest value."""
  random = np.random.default_rng(0)
  key = random.normal(size=16)
  k = np.broadcast_to(key / np.linalg.norm(key), (1, 300, 2, 16)).astype(np.float32)
  v = random.normal(size=(1, 300, 2, 8)).astype(np.float32)
  beta = np.ones((1, 300, 2), np.float32)
  y, _ = ops.delta_rule(k, k, v, beta, scale=1.0, chunk_size=chunk_size)
  # The lengths of the keys are off by rounding, and each token of a chunk adds that much.
  close(y, v, tolerance=chunk_size * np.finfo(np.float32).eps)


def test_write_strength_of_zero(close, rounding):
  """With beta 0 nothing is written: the state only decays."""
  random = np.random.default_rng(0)
  q, k, v = (random.normal(size=(1, 70, 2, 8)).astype(np.float32) for _ in range(3))
  g = -random.uniform(0, 0.1, (1, 70, 2)).astype(np.float32)
  state = random.normal(size=(1, 2, 8, 8)).astype(np.float32)
  _, after = ops.delta_rule(q, k, v, np.zeros_like(g), g=g, state=state)
  close(after, np.exp(g.sum(1))[..., None, None] * state, tolerance=rounding(jnp.float32, 70))
