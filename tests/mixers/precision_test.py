"""Dtypes, drift and extreme values: what a mixer gives in float32 and bfloat16 against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BATCH, LENGTH = 2, 107


def rows(batch: int, length: int, dtype=np.float32) -> np.ndarray:
  return np.random.default_rng(0).normal(size=(batch, length, 32)).astype(dtype)


def exact(subject, x) -> np.ndarray:
  """The reference in float64, with the very parameters and inputs."""
  mixer = subject.make("reference")
  with jax.enable_x64(True):
    mixer, x = jax.tree.map(lambda z: z.astype(np.float64), (mixer, x))
    return np.asarray(jax.jit(lambda mixer, x: mixer(x)[0])(mixer, x))


STATE_DTYPES = {
  "memory": jnp.float32,
  "pending": jnp.float32,
  "modes": jnp.complex64,
  "length": jnp.int32,
  "pending_from": jnp.int32,
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_dtype(subject, dtype):
  """Outputs have the dtype of the inputs; memories are float32, caches are as their inputs."""
  y, state = subject(rows(BATCH, 9, dtype))
  assert y.dtype == dtype
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    names = [key.key for key in path if hasattr(key, "key")] or ["memory"]
    wanted = next((STATE_DTYPES[name] for name in names if name in STATE_DTYPES), dtype)
    assert leaf.dtype == wanted, path


def test_drift(subject, errors, rounding):
  """A long bfloat16 sequence is as exact at its end as at its beginning."""
  x = rows(1, 1024, jnp.bfloat16)
  y, expected = np.asarray(subject(x)[0]), exact(subject, x)
  quarters = [
    errors(y[:, start : start + 256], expected[:, start : start + 256])[0]
    for start in range(0, 1024, 256)
  ]
  # q, k, v, phi(q), phi(k), the weights, the state as it is read, y, its norm and the output are
  # rounded to bfloat16.
  assert max(quarters) <= rounding(jnp.bfloat16, 10)
  assert quarters[-1] <= 2 * quarters[0]


# Linear attention without a sum of weights is cubic in x, and its norm squares that: 1e4 ** 6 is
# within float32.
@pytest.mark.parametrize("size", [1e-6, 1e4], ids=["tiny", "huge"])
def test_extremes(subject, size, errors, rounding):
  """Tiny and huge inputs give finite outputs that are right, and finite gradients."""
  x = np.float32(size) * rows(BATCH, LENGTH)
  rms, largest, worst = errors(subject(x)[0], exact(subject, x))
  assert max(rms, largest) <= rounding(jnp.float32, 4 * 32 + LENGTH), (
    f"{rms:.1e}, {largest:.1e} at {worst}"
  )
  gradients = jax.jit(jax.grad(lambda mixer, x: mixer(x)[0].mean(), argnums=(0, 1)))(
    subject.mixer, x
  )
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
