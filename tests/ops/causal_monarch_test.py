"""Causal Monarch maps against golden vectors, and with identity coefficients the convolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops
from jaxmix.ops.causal_monarch import monarch_factors

TOLERANCE = 1e-10  # that of the golden folder for float64


def load(golden, case):
  data = np.load(golden / "monarch" / "causal_monarch.npz")
  return {key[len(case) + 1 :]: data[key] for key in data.files if key.startswith(f"{case}/")}


def identity(base: int):
  return np.eye(base), np.broadcast_to(np.eye(base // 2), (base, base // 2, base // 2))


@pytest.mark.parametrize("case", ["causal0", "causal1", "causal2"])
def test_golden(case, golden, float64, close):
  """Values, and gradients of rows, kernel and coefficients."""
  data = load(golden, case)

  def run(u, k, low, high):
    y = ops.causal_monarch(u[..., None], k[None], low, high)
    return y[..., 0]

  y, pull = jax.vjp(run, *(data[name] for name in ("u", "k", "lam", "rho")))
  expected = data["y"], tuple(data[f"d{name}"] for name in ("u", "k", "lam", "rho"))
  close((y, pull(data["dy"])), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("case", ["causal0", "causal1", "causal2"])
def test_golden_transform(case, golden, float64, close):
  """It is a Monarch matrix of these factors; and in front of the convolution stands that of the
  basis, which is triangular."""
  data = load(golden, case)
  factors = monarch_factors(data["lam"], data["rho"])
  close(factors, (data["R_blocks"], data["L_blocks"]), tolerance=TOLERANCE)
  u, k, basis = data["u"], data["k"], data["Q"]
  values = ops.monarch_multiply(u.astype(complex), factors, leading_permutation=True)
  close(values, data["analysis_u"], tolerance=TOLERANCE)
  convolved, _ = ops.long_convolution((u @ basis.T)[..., None], (basis @ k)[None])
  found = ops.causal_monarch(u[..., None], k[None], data["lam"], data["rho"])
  close(found, convolved, tolerance=TOLERANCE)


@pytest.mark.parametrize(("length", "lags"), [(32, 32), (19, 32), (32, 5), (1, 1)])
def test_identity_is_the_convolution(length, lags, float64, close):
  random = np.random.default_rng(0)
  u, kernel = random.normal(size=(2, length, 3)), random.normal(size=(3, lags))
  y = ops.causal_monarch(u, kernel, *identity(8))
  close(y, ops.long_convolution(u, kernel)[0], tolerance=1e-13)


def test_causality(float64):
  """Random coefficients, also below the diagonals, where they do not count."""
  random = np.random.default_rng(0)
  low, high = random.normal(size=(8, 8)), random.normal(size=(8, 4, 4))
  kernel = random.normal(size=(1, 32))

  def run(u):
    return ops.causal_monarch(u[None, :, None], kernel, low, high)[0, :, 0]

  jacobian = jax.jacobian(run)(random.normal(size=32))
  assert np.abs(np.triu(jacobian, 1)).max() < 1e-12 * np.abs(jacobian).max()
  assert np.abs(np.diag(jacobian)).min() > 0


def test_base():
  for length in (1, 2, 3, 7, 8, 9, 32, 33, 128, 1000):
    base = ops.monarch_base(length)
    assert base % 2 == 0 and base**2 >= 2 * length > (base - 2) ** 2


def test_errors():
  u, kernel = jnp.zeros((2, 8, 3)), jnp.zeros((3, 8))
  with pytest.raises(ValueError, match="for an even b"):
    ops.causal_monarch(u, kernel, jnp.zeros((5, 5)), jnp.zeros((5, 2, 2)))
  with pytest.raises(ValueError, match=r"expected at most 2, .* take b=4"):
    ops.causal_monarch(u, kernel, *identity(2))
  with pytest.raises(ValueError, match=r"expected \[B, T, D\] and \[D, L\]"):
    ops.causal_monarch(u, kernel.T, *identity(4))
