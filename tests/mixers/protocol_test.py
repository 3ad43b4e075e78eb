"""The protocol of a mixer: a pytree that plain transforms take, that no call writes to, and that
counts its work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

BATCH, LENGTH = 2, 9


@pytest.fixture(scope="module")
def x() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(BATCH, LENGTH, 32)).astype(np.float32)


def test_streaming(subject, x):
  """init_state has the shapes and dtypes of the states that calls return, for any length from 0."""
  state = subject.init_state(BATCH, x.dtype)
  for length in (0, 1, LENGTH):
    y, after = jax.eval_shape(subject.call, subject.mixer, x[:, :length], state, None)
    assert y.shape == (BATCH, length, 32)
    assert jax.tree.map(lambda z: (z.shape, z.dtype), after) == jax.tree.map(
      lambda z: (z.shape, z.dtype), state
    )


def test_nothing_is_written(subject, x):
  """A call leaves the mixer as it was, also where it is no argument of the program."""
  graph, before = nnx.split(subject.mixer)
  jax.eval_shape(lambda x: subject.mixer(x), x)
  graph_after, after = nnx.split(subject.mixer)
  assert graph == graph_after
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_plain_transforms(subject, x, close, rounding):
  """jit, grad, vmap and scan of jax take the mixer as an argument."""
  doubled = jax.tree.map(lambda leaf: np.float32(2) * leaf, jax.device_get(subject.mixer))
  two = jax.tree.map(lambda *leaves: np.stack(leaves), jax.device_get(subject.mixer), doubled)

  @jax.jit
  def in_one_program(two, x):
    mapped = jax.vmap(lambda mixer: mixer(x)[0])(two)
    last, _ = jax.lax.scan(lambda x, mixer: (mixer(x)[0], None), x, two)
    return mapped, last

  mapped, last = in_one_program(two, x)
  y, _ = subject(x)
  expected = (
    np.stack([y, subject.call(doubled, x, None, None)[0]]),
    subject.call(doubled, y, None, None)[0],
  )
  close((mapped, last), expected, tolerance=rounding(jnp.float32, 8 * 32))
  gradient = jax.jit(jax.grad(lambda mixer: jnp.sum(mixer(x)[0] ** 2)))(subject.mixer)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_parameters_declare_their_axes(subject):
  """Each parameter names every axis that it has."""
  for path, parameter in nnx.to_flat_state(nnx.state(subject.mixer)):
    assert len(parameter.get_metadata()["axes"]) == parameter[...].ndim, path


def test_flops(subject):
  """flops is a positive int, the count by hand, and grows with the square of the length only where
  all pairs are seen."""
  case, mixer = subject.case, subject.mixer
  for batch, length in ((1, 1), (2, 70), (3, 1000)):
    count = mixer.flops(batch, length)
    assert type(count) is int and count == case.flops(batch, length) > 0
  bend = mixer.flops(1, 3000) - 2 * mixer.flops(1, 2000) + mixer.flops(1, 1000)
  # A transform, T log T, and a Monarch matrix, T^1.5, bend by less than half of their cost.
  quadratic = case.name.startswith("attention") and mixer.window is None
  assert (bend > mixer.flops(1, 1000) / 2) == quadratic


def test_positions_count_from_zero(subject, x):
  """positions that count from 0 are what None means."""
  positions = np.arange(LENGTH, dtype=np.int32)[None].repeat(BATCH, 0)
  y, _ = jax.jit(lambda mixer, x: mixer(x, positions=positions))(subject.mixer, x)
  np.testing.assert_array_equal(y, subject(x)[0])
