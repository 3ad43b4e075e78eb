"""Offsets between tokens: windows against published kernels, and what remains of them at whole
numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops


@pytest.mark.parametrize(
  ("name", "window", "least_width"),
  [("v1", "triangle", None), ("max", "triangle", 1.0), ("gauss", "gauss", 0.27)],
)
def test_golden_kernels(name, window, least_width, golden, float64, close):
  """Dense kernels built of weights at learnt places, and the gradients of weights, places and
  widths."""
  data = np.load(golden / "grassmann" / f"dcls1d_kernel_{name}.npz")
  weight, places = data["param/weight"].astype(np.float64), data["param/P"][0].astype(np.float64)
  reach = int(data["cfg/K"])
  widths = data["param/SIG"][0].astype(np.float64) if least_width else np.zeros_like(places)

  def kernel(weight, places, widths):
    centers = places.reshape(-1) + reach // 2 + 1  # taps are counted from 1
    width = jnp.abs(widths.reshape(-1)) + least_width if least_width else 1.0
    taps = ops.offset_taps(centers, reach, window=window, width=width)
    return jnp.einsum("oim,oimk->oik", weight, taps.reshape(*weight.shape, reach))

  found, pull = jax.vjp(kernel, weight, places, widths)
  dweight, dplaces, dwidths = pull(data["cot"].astype(np.float64))
  close(found, data["out64"], tolerance=1e-10)
  close(dweight, data["grad64/param/weight"], tolerance=1e-10)
  close(dplaces, data["grad64/param/P"][0], tolerance=1e-10)
  if least_width:
    close(dwidths, data["grad64/param/SIG"][0], tolerance=1e-10)


def test_whole_offsets(float64, close, rounding):
  """Triangles at whole numbers are the op with these offsets: values, states and gradients, in
  packed rows that go on."""
  random = np.random.default_rng(0)
  z, weight, bias = random.normal(size=(2, 40, 8)), random.normal(size=(28, 12)), np.ones(12)
  ids = np.repeat([[1, 1, 2, 0, 3], [4, 0, 4, 4, 0]], 8, axis=1)
  memory = random.normal(size=(2, 5, 1, 8))
  state = {"memory": memory, "length": np.array([2, 9], np.int32)}
  taps = ops.offset_taps(jnp.array([1.0, 3.0, 5.0]), 5)

  def run(op, *options):
    return jax.vjp(
      lambda z, weight, bias: op(z, weight, bias, *options, state=state, segment_ids=ids),
      z, weight, bias,
    )  # fmt: skip

  def whole(z, weight, bias, **options):
    return ops.grassmann_mix(z, weight, bias, offsets=(1, 3, 5), **options)

  (expected, pull), (found, pull_found) = run(whole), run(ops.fractional_grassmann_mix, taps)
  cotangent = jax.tree.map(
    lambda x: np.zeros(x.shape, jax.dtypes.float0) if x.dtype == np.int32 else np.cos(x), expected
  )
  # Windows are divided by their sum and 1e-7.
  close(found, expected, tolerance=1e-6)
  close(pull_found(cotangent), pull(cotangent), tolerance=1e-6)


def test_offsets_move(float64):
  """A centre between two tokens has a gradient, which moves it to the one that helps."""
  random = np.random.default_rng(1)
  z, weight, bias = random.normal(size=(4, 60, 8)), random.normal(size=(28, 12)), np.zeros(12)
  target, _ = ops.grassmann_mix(z, weight, bias, offsets=(3,))

  @jax.jit
  def step(center):
    def loss(center):
      y, _ = ops.fractional_grassmann_mix(z, weight, bias, ops.offset_taps(center, 8))
      return jnp.mean((y - target)[:, 8:] ** 2)

    return center - 0.01 * jax.grad(loss)(center)

  center = jnp.array([3.6])
  for _ in range(60):
    center = step(center)
  np.testing.assert_allclose(center, 3, atol=0.1)  # the loss has a kink there, which it steps over


def test_unknown_window():
  with pytest.raises(ValueError) as error:
    ops.offset_taps(jnp.ones(1), 4, window="box")
  assert str(error.value) == "offset_taps: window='box' is unknown; expected one of triangle, gauss"
