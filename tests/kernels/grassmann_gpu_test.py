"""The GPU kernels of Grassmann mixing: their values in interpret mode, and what the compilers of
absent chips make of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import compile_ahead, ops
from jaxmix.ops.segments import document_positions, over_padding
from pallas_kernels.grassmann import gpu
from pallas_kernels.grassmann.cases import BENCHMARKS, CASES, Case

HEADS = Case("heads", 2, 40, 20, 24, offsets=(1, 3), heads=3)  # an odd number of groups
NAMED = {case.name: case for case in (*CASES, HEADS)}
EPS = 1e-8


def by_kernels(case, z, weight, bias, before, count, segment_ids, dy):
  """y and the gradients, by the kernels on rows in order."""
  options = {**case.options(), "eps": EPS, "interpret": True}

  def reach(segment_ids):
    back = document_positions(segment_ids, count)
    return jnp.where(segment_ids != 0, back, -1)

  def forward(segment_ids, z):
    return gpu.forward(z, before, weight, bias, reach(segment_ids), **options)

  def backward(segment_ids, z, dy):
    return gpu.backward(z, before, weight, reach(segment_ids), dy, **options)

  y = over_padding(forward, segment_ids, z)
  dz, dbefore, dweight, dbias = over_padding(backward, segment_ids, z, dy)
  dweight, dbias = dweight.astype(weight.dtype), dbias.astype(bias.dtype)
  return {"y": y, "z": dz, "before": dbefore, "weight": dweight, "bias": dbias}


def by_op(implementation, case, z, weight, bias, before, count, segment_ids, dy):
  """The same by a form of the op."""

  def run(z, weight, bias, before):
    return ops.grassmann_mix(
      z,
      weight,
      bias,
      state={"memory": before, "length": count},
      segment_ids=segment_ids,
      eps=EPS,
      implementation=implementation,
      **case.options(),
    )[0]

  y, pull = jax.vjp(run, z, weight, bias, before)
  return {"y": y, **dict(zip(("z", "weight", "bias", "before"), pull(dy), strict=True))}


def inputs_of(case, dtype):
  """z, weight, bias, before, count, segment_ids, dy; NaN at padding."""
  random, arrays = np.random.default_rng(2), case.inputs()
  earlier, shape = max(case.offsets), (case.batch, case.length, case.channels)
  ids = case.segment_ids()
  ids = np.ones(shape[:2], np.int32) if ids is None else ids
  z, dy = arrays["z"].astype(np.float32), random.normal(size=shape).astype(dtype)
  z[ids == 0] = dy[ids == 0] = np.nan
  before = random.normal(size=(case.batch, earlier, case.heads, case.rank)).astype(np.float32)
  count = np.array([earlier, 3][: case.batch], np.int32)  # the rest of `before` is no document's
  return z, arrays["weight"].astype(dtype), arrays["bias"].astype(dtype), before, count, ids, dy


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("one_token", np.float32),
    ("packed", jnp.bfloat16),
    ("packed_clamp", np.float32),
    ("padded", np.float32),
    ("odd_rank", jnp.bfloat16),
    ("repeated_offsets", np.float32),
    ("heads", np.float32),
  ],
)
def test_definition(name, dtype, no_worse):
  """In interpret mode the kernels are as near to the definition in float64 as the form that XLA
  compiles is, within a factor of two; what stands at padding is inert."""
  case, arrays = NAMED[name], inputs_of(NAMED[name], dtype)
  found = jax.jit(functools.partial(by_kernels, case))(*arrays)
  by_xla = jax.jit(functools.partial(by_op, "xla", case))(*arrays)
  with jax.enable_x64(True):
    exact = [
      np.nan_to_num(x.astype(np.float64)) if x.dtype != np.int32 else x
      for x in map(np.array, arrays)
    ]
    exact = jax.jit(functools.partial(by_op, "reference", case))(*exact)
  no_worse(found, by_xla, exact, name, segment_ids=arrays[5], operands=dtype)


def test_vectors_without_a_plane():
  """Zero and parallel vectors give finite values and gradients, and zero vectors none."""
  case = Case("", 1, 24, 4, 8, offsets=(1, 2))
  z, weight, bias, before, *_, dy = inputs_of(case, np.float32)
  z[0, 8:12], z[0, 16:] = 0, 1e-3 * z[0, 16]
  for normalization in ("safe", "clamp"):
    options = {"offsets": case.offsets, "eps": EPS, "normalization": normalization}
    reach = np.arange(case.length, dtype=np.int32)[None]
    y = gpu.forward(z, before, weight, bias, reach, **options, interpret=True)
    gradients = gpu.backward(z, before, weight, reach, dy, **options, interpret=True)
    assert all(np.isfinite(x).all() for x in (y, *gradients))
    np.testing.assert_array_equal(gradients[0][0, 8:12], 0)
    np.testing.assert_array_equal(y[0, 8:12], np.broadcast_to(bias, (4, 8)))


def test_refusals():
  """What the kernels cannot run is said, with the values."""

  def refusal(dtype=jnp.float32, weight=jnp.bfloat16, rank=32, offsets=(1, 2)):
    z = jax.ShapeDtypeStruct((2, 64, rank), dtype)
    return gpu.refusal(z, jax.ShapeDtypeStruct((rank * (rank - 1) // 2, 8), weight), offsets)

  assert refusal() is None
  assert refusal(dtype=jnp.bfloat16) == "z is bfloat16, expected float32"
  assert refusal(weight=jnp.float16) == "weight is float16, expected float32 or bfloat16"
  assert refusal(rank=129) == "rank 129 is above 128"
  assert refusal(offsets=(4, -1)) == "offset -1 points to a later token"


def both_directions(z, before, weight, bias, reach, dy):
  """The kernels forward and backward, to be compiled for a chip."""
  options = {"offsets": (1, 2, 4, 8, 12, 16), "eps": EPS, "normalization": "safe"}
  y = gpu.forward(z, before, weight, bias, reach, **options)
  return y, gpu.backward(z, before, weight, reach, dy, **options)


PRODUCTS = ("forward", "backward_planes", "backward_weight")
VECTORS = ("directions", "backward_tokens")


TENSOR_CORES = {
  "a100": "mma.sync",
  "a6000": "mma.sync",
  "rtx4090": "mma.sync",
  "h100": "wgmma",
  "b200": "tcgen05",
}


@pytest.mark.parametrize(
  ("chip", "name"),
  [*((chip, "train") for chip in TENSOR_CORES), ("a6000", "train_r64"), ("h100", "train_r64")],
)
def test_gpu_kernels(chip, name):
  """At the sizes of training no kernel spills a register, those that multiply do it on tensor
  cores, and a multiprocessor has room for one block at least."""
  if (reason := compile_ahead.installed("cuda")) is not None:
    pytest.skip(reason)
  case = next(case for case in BENCHMARKS if case.name == name)
  rows, weight = (case.batch, case.length), case.shapes()["weight"]
  shapes = {
    "z": (*rows, case.rank),
    "before": (case.batch, max(case.offsets), case.rank),
    "weight": weight,
    "bias": weight[1:],
    "reach": rows,
    "dy": (*rows, case.channels),
  }
  dtypes = {"z": jnp.float32, "before": jnp.float32, "reach": jnp.int32}
  arrays = [
    jax.ShapeDtypeStruct(shape, dtypes.get(array, jnp.bfloat16)) for array, shape in shapes.items()
  ]
  kernels = compile_ahead.gpu_kernels(both_directions, arrays, chip)
  assert sorted(kernel.name for kernel in kernels) == sorted(
    f"grassmann_{kernel}" for kernel in (*PRODUCTS, *VECTORS)
  )
  for kernel in kernels:
    assert kernel.spill_bytes == 0, f"{kernel.name}: {kernel.spill_bytes} bytes spilled"
    assert kernel.blocks_per_core >= 1, kernel.name
    if kernel.name.removeprefix("grassmann_") in PRODUCTS:
      assert kernel.tensor_core.get(TENSOR_CORES[chip], 0) > 0, (
        f"{kernel.name}: {kernel.tensor_core}"
      )
