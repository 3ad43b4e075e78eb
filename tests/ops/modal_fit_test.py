"""Modes fitted to filters: exact where there are as few, near the optimum elsewhere, and errors
that bound what a stream is off."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops


def waves(log_poles, residues, length: int) -> np.ndarray:
  n = np.arange(length)
  return (residues[..., None] * np.exp(log_poles[..., None] * n)).sum(1).real


def smooth_filters(channels: int, length: int) -> np.ndarray:
  """Sums of more waves than will be fitted, of falling size, under a window."""
  random = np.random.default_rng(0)
  n = np.arange(length) / length
  turns = np.arange(1, 30)
  parts = random.normal(size=(channels, 29)) / turns
  return (parts[..., None] * np.cos(2 * np.pi * turns[:, None] * n)).sum(1) * np.exp(-4 * n)


@pytest.mark.parametrize("length", [70, 333])
def test_few_waves_are_found(length, close):
  """Complex poles, real ones of both signs, and fewer waves than modes."""
  random = np.random.default_rng(0)
  angles = random.uniform(0, np.pi, size=(4, 5))
  angles[1, :2], angles[2, :2] = (0, np.pi), 0
  log_poles = -random.uniform(1e-3, 0.3, size=angles.shape) + 1j * angles
  residues = random.normal(size=angles.shape) + 1j * random.normal(size=angles.shape)
  residues[3, 2:] = 0
  filters = waves(log_poles, residues, length)
  found = ops.fit_modes(filters, 5)
  assert (found[0].real < 0).all()
  close(waves(*found, length), filters, tolerance=1e-8)


@pytest.mark.parametrize("modes", [3, 8])
def test_near_the_optimum(modes):
  """No filters of so many modes have a Hankel matrix nearer to the given one than its singular
  value decomposition; these are as near within a factor of three."""
  length = 128
  index = np.arange(length // 2)
  for k in smooth_filters(4, length):
    found = waves(*ops.fit_modes(k[None], modes), length)[0]
    exact, fitted = (each[index[:, None] + index] for each in (k, found))
    best = np.linalg.norm(np.linalg.svd(exact, compute_uv=False)[2 * modes :])
    assert best <= np.linalg.norm(exact - fitted) <= 3 * best


@pytest.mark.parametrize(
  "filter_", [np.zeros(40), np.eye(40)[0], np.ones(40), 1.2 ** np.arange(40)]
)
def test_odd_filters(filter_):
  """Nothing, one tap, no decay and growth: finite modes that decay."""
  log_poles, residues = ops.fit_modes(filter_[None], 3)
  assert np.isfinite(log_poles).all() and np.isfinite(residues).all()
  assert (log_poles.real < 0).all()
  if filter_.max() <= 1:
    assert np.abs(waves(log_poles, residues, 40) - filter_).max() < 1e-4


def test_errors_bound_streams(float64, close):
  """A recurrence differs from the stream with the filters themselves by the bound at most, and by
  as much where an input has the signs of the differences."""
  length, modes = 96, 4
  filters = smooth_filters(3, length)
  poles = ops.fit_modes(filters, modes)
  found = waves(*poles, length)
  errors = ops.FilterErrors.of(found, filters)
  difference = found - filters
  close(errors.largest, np.abs(difference).max(1), tolerance=1e-15)
  close(errors.relative**2 * (filters**2).sum(1), (difference**2).sum(1), tolerance=1e-12)
  worst = np.sign(difference)[:, ::-1].T  # the last token is off by all lags
  u = np.stack([worst, np.random.default_rng(1).uniform(-1, 1, size=worst.shape)])

  def stream(convolve, state):
    """A prompt and tokens behind it."""
    step = jax.jit(lambda u, state: convolve(u, state=state))
    found = []
    for start, end in ((0, 60), *((t, t + 1) for t in range(60, length))):
      y, state = step(u[:, start:end], state)
      found.append(y)
    return np.concatenate(found, 1)

  exact = stream(
    lambda u, state: ops.long_convolution(u, filters, state=state),
    ops.convolution_state(2, length, 3, jnp.float64),
  )
  fitted = stream(
    lambda u, state: ops.modal_convolution(u, *poles, state=state),
    ops.modal_state(2, 3, modes, jnp.float64),
  )
  off = np.abs(fitted - exact)
  assert (off <= errors.bound * (1 + 1e-9)).all()
  close(off[0, -1], errors.bound, tolerance=1e-9)


def test_refusals():
  with pytest.raises(ValueError, match=r"10 modes for filters of shape \(3, 40\)"):
    ops.fit_modes(np.zeros((3, 40)), 10)
  with pytest.raises(ValueError, match=r"expected \[D, L\]"):
    ops.fit_modes(np.zeros(40), 2)
