"""The Monarch mixer with a learnt basis: the convolution at first, and what training changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.mixers import MonarchMixer


def make(**options) -> MonarchMixer:
  return MonarchMixer(
    8, max_length=30, hidden=8, sines=2, order=3, rngs=nnx.Rngs(params=0), **options
  )


def test_at_first_it_is_the_convolution(close, rounding):
  x = np.random.default_rng(0).normal(size=(2, 30, 8)).astype(np.float32)
  found, expected = (make(basis=basis)(x)[0] for basis in ("monarch", "powers"))
  close(found, expected, tolerance=rounding(jnp.float32, 100))


def test_it_learns_the_basis_of_another():
  """By gradient descent on all parameters; what is below the diagonals does not count and stays."""
  x = np.random.default_rng(0).normal(size=(4, 30, 8)).astype(np.float32)
  mixer, teacher = (make(basis="monarch") for _ in range(2))
  random = np.random.default_rng(1)
  for name in ("low", "high"):
    parameter = getattr(teacher.gated, name)
    parameter[...] += 0.3 * random.normal(size=parameter.shape).astype(np.float32)

  @jax.jit
  def train(mixer, teacher):
    target = teacher(x)[0]

    def step(mixer, _):
      loss, slope = jax.value_and_grad(lambda mixer: jnp.mean((mixer(x)[0] - target) ** 2))(mixer)
      return jax.tree.map(lambda p, d: p - 0.1 * d, mixer, slope), loss

    return jax.lax.scan(step, mixer, length=200)

  trained, losses = train(mixer, teacher)
  assert losses[-1] < losses[0] / 3
  for name in ("low", "high"):
    moved = np.abs(getattr(trained.gated, name)[...] - getattr(mixer.gated, name)[...])
    assert np.triu(moved).max() > 1e-3
    assert not np.tril(moved, -1).any()


def test_errors():
  for options in ({"visibility": "full"}, {"modes": 4}):
    with pytest.raises(
      ValueError, match=r'basis="monarch" with visibility=.*, but it is of causal'
    ):
      make(basis="monarch", **options)
  with pytest.raises(ValueError, match="basis='chebyshev' is unknown; expected one of powers, mon"):
    make(basis="chebyshev")
  with pytest.raises(ValueError, match="distilled with visibility='causal', basis='monarch'"):
    make(basis="monarch").distilled(4)
