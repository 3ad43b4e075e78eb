"""Causal Monarch maps against golden vectors, the definition in streams and packed rows, and with
identity coefficients the convolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops

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
    y, _ = ops.causal_monarch(u[..., None], k[None], low, high)
    return y[..., 0]

  y, pull = jax.vjp(run, *(data[name] for name in ("u", "k", "lam", "rho")))
  expected = data["y"], tuple(data[f"d{name}"] for name in ("u", "k", "lam", "rho"))
  close((y, pull(data["dy"])), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("case", ["causal0", "causal1", "causal2"])
def test_golden_transform(case, golden, float64, close):
  """The basis, and the values of a row's polynomial at the roots of unity, which the published
  factors of a Monarch matrix make from its coefficients."""
  data = load(golden, case)
  u, low, high = data["u"], data["lam"], data["rho"]
  one = np.eye(len(u[0]))[:1]
  powers, _ = ops.causal_monarch(u[..., None], one, low, high)
  basis = data["Q"]
  # The filter is q_0.
  expected, _ = ops.long_convolution((u @ basis.T)[..., None], basis[:, :1].T)
  close(powers, expected, tolerance=TOLERANCE)
  values = np.fft.fft(u @ basis.T, 2 * len(u[0]))
  close(values, data["analysis_u"], tolerance=TOLERANCE)
  factors = data["R_blocks"], data["L_blocks"]
  found = ops.monarch_multiply(u.astype(complex), factors, leading_permutation=True)
  close(found, values, tolerance=TOLERANCE)


def test_stream_of_documents(golden, float64, close):
  """Packed rows with padding, whole, in pieces and token by token, with gates and skip, against
  each document by itself."""
  data = load(golden, "causal1")
  random = np.random.default_rng(0)
  ids = np.array([[3] * 9 + [0] * 2 + [3] * 4 + [1] * 10, [0] + [2] * 5 + [4] * 6 + [0] * 13])
  ids = ids.astype(np.int32)
  rows = {name: random.normal(size=(2, 25, 3)) for name in ("u", "pre_gate", "post_gate")}
  kernel, skip = random.normal(size=(3, 20)), random.normal(size=3)

  @jax.jit
  def run(rows, state=None, ids=None):
    return ops.causal_monarch(
      **rows, kernel=kernel, low=data["lam"], high=data["rho"], skip=skip, state=state,
      segment_ids=ids,
    )  # fmt: skip

  expected = np.zeros((2, 25, 3))
  for row in range(2):
    for document in set(ids[row]) - {0}:
      at = np.flatnonzero(ids[row] == document)
      apart = {name: x[row : row + 1, at] for name, x in rows.items()}
      expected[row, at] = run(apart)[0][0]
  close(run(rows, None, ids)[0], expected, tolerance=1e-12)
  for pieces in ((7, 1, 12, 5), (3, 15, *[1] * 7)):
    state, found, at = ops.causal_monarch_state(2, 8, 3, jnp.float64), [], 0
    for piece in pieces:
      part = {name: x[:, at : at + piece] for name, x in rows.items()}
      y, state = run(part, state, ids[:, at : at + piece])
      found.append(y)
      at += piece
    close(np.concatenate(found, 1), expected, tolerance=1e-12)


@pytest.mark.parametrize(("length", "lags"), [(32, 32), (19, 32), (32, 5), (1, 1)])
def test_identity_is_the_convolution(length, lags, float64, close):
  random = np.random.default_rng(0)
  u, kernel = random.normal(size=(2, length, 3)), random.normal(size=(3, lags))
  y, _ = ops.causal_monarch(u, kernel, *identity(8))
  close(y, ops.long_convolution(u, kernel)[0], tolerance=1e-13)


def test_causality(float64):
  """Random coefficients, also below the diagonals, where they do not count."""
  random = np.random.default_rng(0)
  low, high = random.normal(size=(8, 8)), random.normal(size=(8, 4, 4))
  kernel = random.normal(size=(1, 32))

  def run(u):
    return ops.causal_monarch(u[None, :, None], kernel, low, high)[0][0, :, 0]

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
  with pytest.raises(ValueError, match="make it by causal_monarch_state"):
    ops.causal_monarch(u, kernel, *identity(4), state=ops.causal_monarch_state(2, 6, 3))
