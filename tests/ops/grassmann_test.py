"""The op grassmann_mix: the collapsed form against the definition and published vectors, what its
norms do with parallel vectors, and how its memory grows."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops
from pallas_kernels.grassmann.cases import CASES
from pallas_kernels.grassmann.reference import plucker

TOLERANCE = 1e-10  # that of the golden folder for float64


@functools.partial(jax.jit, static_argnames=("offsets", "normalization", "implementation"))
def everything(arrays, memory, length, ids, cotangents, *, offsets, normalization, implementation):
  """y, the state after, and the gradients of their weighted sum by every array."""

  def run(arrays, memory):
    y, state = ops.grassmann_mix(
      **arrays,
      offsets=offsets,
      state={"memory": memory, "length": length},
      segment_ids=ids,
      normalization=normalization,
      implementation=implementation,
    )
    return (y, state["memory"]), state["length"]

  results, pull, length = jax.vjp(run, arrays, memory, has_aux=True)
  return results, length, pull(cotangents)


@pytest.fixture
def tolerance(rounding) -> float:
  """What rounding leaves of sums over at most 8,128 pairs of channels or 300 tokens."""
  return rounding(jnp.float64, 8128)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_definition(case, float64, close, tolerance):
  """One wedge product with the mean rejection is the mean of all wedge products: values, gradients,
  the state, in rows that go on from states of which not all tokens exist."""
  random = np.random.default_rng(2)
  memory = random.normal(size=(case.batch, max(case.offsets), case.heads, case.rank))
  length = np.array([max(case.offsets) // 2, 1000], np.int32)[: case.batch]
  y = random.normal(size=(case.batch, case.length, case.channels))
  found, expected = (
    everything(
      case.inputs(),
      memory,
      length,
      case.segment_ids(),
      (y, memory),
      implementation=implementation,
      **case.options(),
    )
    for implementation in ("xla", "reference")
  )
  close(found, expected, tolerance=tolerance)


def coordinates(z, offsets, **options):
  """[B, T, R] -> [B, T, R (R - 1) / 2], what the op projects."""
  pairs = z.shape[-1] * (z.shape[-1] - 1) // 2
  eye, zeros = np.eye(pairs, dtype=z.dtype), np.zeros(pairs, z.dtype)
  return ops.grassmann_mix(z, eye, zeros, offsets=offsets, **options)[0]


@pytest.mark.parametrize("name", ["plucker_generic", "plucker_stress", "plucker_degenerate"])
def test_golden_coordinates(name, golden, float64, errors):
  """Pairs of vectors, generic, nearly parallel, of sizes from 1e-5 to 1e3, and degenerate."""
  data = np.load(golden / "grassmann" / f"{name}.npz")
  u, v = (data[key].astype(np.float64) for key in "uv")

  def run(u, v):  # the two as a row of two tokens
    rows = jnp.stack([v, u], 2).reshape(-1, 2, u.shape[-1])
    p = coordinates(rows, (1,), normalization="clamp", eps=float(data["cfg/eps"]))
    return p[:, 1].reshape(*u.shape[:2], -1)

  p, pull = jax.vjp(run, u, v)
  gradients = pull(data["cot"].astype(np.float64))
  # Of parallel vectors the rejection is what rounding leaves, 1e-16, over eps.
  tolerance = 1e-7 if name == "plucker_degenerate" else TOLERANCE
  np.testing.assert_allclose(p, data["out64"], atol=tolerance, rtol=0)
  assert all(np.isfinite(gradient).all() for gradient in gradients)
  if name != "plucker_degenerate":  # there gradients are what the clamp makes of rounding
    for gradient, key in zip(gradients, "uv", strict=True):
      for row, expected in zip(gradient[0], data[f"grad64/{key}"][0], strict=True):
        assert max(errors(row, expected)[:2]) < 1e-6  # 1e-16 amplified by parallel vectors, 1e-4


def test_golden_smooth_norm(golden, float64, close):
  """The mean of p / sqrt(|p|^2 + eps^2), as two public programs have it."""
  data = np.load(golden / "grassmann" / "variant_sqrt_eps_then_avg.npz")
  offsets, eps = tuple(map(int, data["cfg/offsets"])), float(data["cfg/eps"]) ** 0.5
  run = functools.partial(coordinates, offsets=offsets, normalization="smooth", eps=eps)
  p, pull = jax.vjp(run, data["z"].astype(np.float64))
  close(p, data["out64"], tolerance=TOLERANCE)
  close(pull(data["cot"].astype(np.float64))[0], data["grad64/z"], tolerance=TOLERANCE)


def test_not_the_norm_of_the_mean(golden, float64, errors):
  """A public kernel takes the mean of the wedge products first and normalises it once: another
  function, the same only for one offset."""
  data = np.load(golden / "grassmann" / "variant_avg_then_normalize.npz")
  offsets, z = tuple(map(int, data["cfg/offsets"])), data["z"].astype(np.float64)
  assert errors(coordinates(z, offsets, normalization="smooth"), data["out64"])[0] > 0.1
  single = coordinates(z, (1,), normalization="smooth", eps=1e-4)[:, 1:]
  expected = plucker(z[:, 1:], z[:, :-1], eps=1e-4, normalization="smooth")
  np.testing.assert_allclose(single, expected, atol=1e-13)


@pytest.mark.parametrize("normalization", ["safe", "smooth", "clamp"])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_degenerate_planes(normalization, size, rounding):
  """In float32: repeated tokens, opposite ones and zero vectors give finite gradients. The safe
  norm gives coordinates near 0, whatever their size, and gradients of at most 1e3 / |z|."""
  random = np.random.default_rng(0)
  v = random.normal(size=(1, 1, 16))
  rows = np.concatenate([v, v, -2 * v, 0 * v, v, v + 1e-7 * random.normal(size=v.shape)], 1)
  z = jnp.asarray(size * rows, jnp.float32)
  run = functools.partial(coordinates, offsets=(1, 2), normalization=normalization)
  p, pull = jax.vjp(run, z)
  (dz,) = pull(jnp.asarray(random.normal(size=p.shape), jnp.float32))
  assert np.isfinite(p).all() and np.isfinite(dz).all()
  if normalization == "safe":
    assert np.abs(p).max() <= 1e3 * rounding(jnp.float32, 16)
    assert np.abs(dz).max() * size <= 1e3 * p.shape[-1]
  assert not np.asarray(dz)[0, 3].any()  # the zero vector


def test_later_tokens(float64, close, tolerance):
  """Offsets below 0: a row read backwards."""
  random = np.random.default_rng(1)
  z, ids = random.normal(size=(2, 40, 6)), np.repeat([[1, 0, 2, 2]], 10, axis=1).repeat(2, 0)
  back = coordinates(z, (1, 3), segment_ids=ids)
  ahead = coordinates(z[:, ::-1], (-1, -3), segment_ids=ids[:, ::-1])[:, ::-1]
  close(ahead, back, tolerance=tolerance)
  y, state = ops.grassmann_mix(
    z, random.normal(size=(15, 4)), np.zeros(4), offsets=(-2, 2), implementation="xla"
  )
  assert state is None and y.shape == (2, 40, 4)


def test_memory_does_not_grow_with_offsets():
  """Temporary memory of both passes, as XLA counts it: that of sixteen offsets is at most that of
  two."""
  z, weight, bias = jnp.ones((2, 512, 16)), jnp.ones((120, 32)), jnp.zeros(32)

  def temporary(offsets):
    def both(z, weight, bias):
      y, pull = jax.vjp(lambda *a: ops.grassmann_mix(*a, offsets=offsets)[0], z, weight, bias)
      return pull(y)

    compiled = jax.jit(both).lower(z, weight, bias).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # But for the tokens before the row, which the largest offset is the number of.
  assert temporary(tuple(range(1, 17))) <= temporary((1, 16)) * 1.01


@pytest.mark.parametrize(
  ("options", "text"),
  [
    (
      {"z": (2, 8)},
      "z, weight and bias have shapes (2, 8), (28, 16), (16,), expected [B, T, R] or",
    ),
    ({"weight": (27, 16)}, "weight has 27 rows, expected 28, one for each pair of the 8 channels"),
    ({"bias": (8,)}, "have shapes (2, 12, 8), (28, 16), (8,)"),
    ({"offsets": ()}, "offsets=(), expected whole numbers other than 0: a token spans no plane"),
    ({"offsets": (1, 0)}, "offsets=(1, 0), expected whole numbers other than 0"),
    ({"normalization": "l2"}, "normalization='l2' is unknown; expected one of safe, smooth, clamp"),
    ({"segment_ids": (2, 11)}, "segment_ids is int32[2, 11], expected int32[2, 12]"),
    ({"state": (3,)}, "the state has memory [2, 3, 1, 8] and length [2], expected [2, 2, 1, 8]"),
    ({"state": (2,), "offsets": (-1, 2)}, "offsets=(-1, 2) point to later tokens too"),
    ({"implementation": "cuda"}, "implementation='cuda' is unknown"),
  ],
)
def test_errors(options, text):
  options = dict(options)
  shapes = {"z": (2, 12, 8), "weight": (28, 16), "bias": (16,)}
  arrays = [jnp.zeros(options.pop(name, shape)) for name, shape in shapes.items()]
  if "segment_ids" in options:
    options["segment_ids"] = jnp.ones(options["segment_ids"], jnp.int32)
  if "state" in options:
    options["state"] = ops.grassmann_state(2, options["state"], (8,))
  with pytest.raises(ValueError, match="grassmann_mix: .*" + re.escape(text)):
    ops.grassmann_mix(*arrays, **{"offsets": (1, 2), **options})
