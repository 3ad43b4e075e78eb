"""The kernels of Grassmann mixing: their values in interpret mode, and what the compilers of absent
chips make of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmix import compile_ahead, ops, sharding
from pallas_kernels.grassmann import gpu, tpu
from pallas_kernels.grassmann.cases import BENCHMARKS, CASES, Case

NAMED = {case.name: case for case in (*CASES, *BENCHMARKS)}
EPS = 1e-8


@pytest.fixture
def interpreted(monkeypatch):
  """The op's kernels run their programs on the CPU, on TPU in blocks that are small enough for
  several in every case."""
  small = {"tokens": 128, "columns": 128}
  for kernels, blocks in ((tpu, small), (gpu, {})):
    for name in ("forward", "backward"):
      kernel = functools.partial(getattr(kernels, name), interpret=True, **blocks)
      monkeypatch.setattr(kernels, name, kernel)


def by_op(implementation, case, z, weight, bias, memory, length, segment_ids, dy):
  """y and the gradients."""

  def run(z, weight, bias, memory):
    return ops.grassmann_mix(
      z,
      weight,
      bias,
      state={"memory": memory, "length": length},
      segment_ids=segment_ids,
      eps=EPS,
      implementation=implementation,
      **case.options(),
    )[0]

  y, pull = jax.vjp(run, z, weight, bias, memory)
  return {"y": y, **dict(zip(("z", "weight", "bias", "memory"), pull(dy), strict=True))}


def inputs_of(case, dtype):
  """z, weight, bias, memory, length, segment_ids, dy; NaN at padding."""
  random, arrays = np.random.default_rng(2), case.inputs()
  earlier, shape = max(case.offsets), (case.batch, case.length, case.channels)
  ids = case.segment_ids()
  ids = np.ones(shape[:2], np.int32) if ids is None else ids
  z, dy = arrays["z"].astype(np.float32), random.normal(size=shape).astype(dtype)
  z[ids == 0] = dy[ids == 0] = np.nan
  memory = random.normal(size=(case.batch, earlier, case.heads, case.rank)).astype(np.float32)
  length = np.array([earlier, 3][: case.batch], np.int32)  # the rest of it is no document's
  return z, arrays["weight"].astype(dtype), arrays["bias"].astype(dtype), memory, length, ids, dy


@pytest.mark.parametrize(
  ("implementation", "name", "dtype"),
  [
    ("tpu", "packed", jnp.bfloat16),
    ("tpu", "packed_clamp", np.float32),
    ("tpu", "padded", np.float32),
    ("tpu", "odd_rank", jnp.bfloat16),
    ("tpu", "smallest_rank", np.float32),
    ("tpu", "repeated_offsets", np.float32),
    ("gpu", "one_token", np.float32),
    ("gpu", "packed", jnp.bfloat16),
    ("gpu", "packed_clamp", np.float32),
    ("gpu", "padded", np.float32),
    ("gpu", "odd_rank", jnp.bfloat16),
    ("gpu", "groups", np.float32),
  ],
)  # fmt: skip
def test_definition(implementation, name, dtype, interpreted, no_worse):
  """In interpret mode the kernels are as near to the definition in float64 as the form that XLA
  compiles is, within a factor of two; what stands at padding is inert."""
  case, arrays = NAMED[name], inputs_of(NAMED[name], dtype)
  found = jax.jit(functools.partial(by_op, implementation, case))(*arrays)
  by_xla = jax.jit(functools.partial(by_op, "xla", case))(*arrays)
  with jax.enable_x64(True):
    exact = [
      np.nan_to_num(x.astype(np.float64)) if x.dtype != np.int32 else x
      for x in map(np.array, arrays)
    ]
    exact = jax.jit(functools.partial(by_op, "reference", case))(*exact)
  no_worse(found, by_xla, exact, name, segment_ids=arrays[5], operands=dtype)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_vectors_without_a_plane(implementation, interpreted):
  """Zero and parallel vectors give finite values and gradients, and zero vectors none."""
  case = Case("", 1, 24, 4, 8, offsets=(1, 2), normalization="clamp")
  z, weight, bias, memory, *others = inputs_of(case, np.float32)
  z[0, 8:12], z[0, 16:] = 0, 1e-3 * z[0, 16]
  run = jax.jit(functools.partial(by_op, implementation, case))
  found = run(z, weight, bias, memory, *others)
  assert all(np.isfinite(x).all() for x in found.values())
  np.testing.assert_array_equal(found["z"][0, 8:12], 0)
  np.testing.assert_array_equal(found["y"][0, 8:12], np.broadcast_to(bias, (4, 8)))


def test_only_what_is_there_is_read(close, rounding):
  """The kernels read nothing outside their arrays and nothing that is not written before: NaN there
  changes no value."""
  case = NAMED["odd_rank"]
  z, weight, bias, before, count, _, dy = inputs_of(case, np.float32)
  z, before = z[:, :, 0], before[:, :, 0]
  reach = count[:, None] + np.arange(case.length, dtype=np.int32)
  strict = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")

  @functools.partial(jax.jit, static_argnames="interpret")
  def run(z, weight, bias, before, reach, dy, interpret):
    options = {**case.options(), "eps": EPS, "tokens": 128, "interpret": interpret}
    forward = tpu.forward(z, before, weight, bias, reach, **options)
    return forward, tpu.backward(z, before, weight, reach, dy, **options)

  found, expected = (run(z, weight, bias, before, reach, dy, how) for how in (strict, True))
  # The two interpreters differ in where they round.
  close(found, expected, tolerance=rounding(jnp.float32, 4))


def test_op_on_a_mesh(interpreted, close, rounding):
  """The op by its kernels, with the batch cut over 4 devices, is the XLA form on one."""
  case = NAMED["odd_rank"]
  z, weight, bias, before, count, ids, dy = inputs_of(case, np.float32)
  z, before, count, ids, dy = (np.concatenate([x, x[::-1]]) for x in (z, before, count, ids, dy))
  arrays = z, weight, bias, before, count, ids, dy
  expected = jax.jit(functools.partial(by_op, "xla", case))(*arrays)
  with jax.set_mesh(sharding.make_mesh(data=4, tensor=2)):
    found = jax.jit(functools.partial(by_op, "tpu", case))(*arrays)
  close(found, expected, tolerance=rounding(jnp.float32, 4 * case.length))
  assert tuple(found["y"].sharding.spec)[:1] == ("data",)


@pytest.mark.parametrize(("platform", "holds"), [("tpu", True), ("cpu", False)])
def test_chosen_when_lowered(platform, holds):
  """implementation=None gives the kernels to programs lowered for TPU, and none to those for a
  CPU."""
  shapes = ((1, 64, 8), (28, 16), (16,))

  def loss(*arrays):
    return ops.grassmann_mix(*arrays, offsets=(1, 2))[0].sum()

  traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(
    *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  )
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("grassmann_forward" in text) == holds
  assert ("grassmann_backward" in text) == holds


@pytest.mark.parametrize(
  ("shape", "options", "texts"),
  [
    ((2, 64, 32), {}, {"tpu": None, "gpu": None}),
    ((2, 64, 1, 32), {}, {"tpu": None, "gpu": None}),
    ((2, 64, 2, 32), {}, {"tpu": "z has 2 heads, expected one", "gpu": None}),
    ((2, 64, 129), {}, dict.fromkeys(("tpu", "gpu"), "rank 129 is above 128")),
    ((2, 64, 32), {"offsets": (4, -1)},
     dict.fromkeys(("tpu", "gpu"), "offset -1 points to a later token")),
    ((2, 64, 32), {"dtype": jnp.bfloat16},
     dict.fromkeys(("tpu", "gpu"), "z is bfloat16, expected float32")),
    ((2, 64, 32), {"weight": jnp.float16},
     dict.fromkeys(("tpu", "gpu"), "weight is float16, expected float32 or bfloat16")),
    ((2, 64, 128), {"offsets": (5000,), "weight": jnp.float32},
     {"tpu": "rank 128 with offsets up to 5000 and a weight in float32 needs 33,943,552 bytes of "
             "VMEM and 12,582,912 are available; rank 64 fits", "gpu": None}),
  ],
)  # fmt: skip
def test_refusals(shape, options, texts):
  """What the kernels cannot run is said, with the values."""
  z = jax.ShapeDtypeStruct(shape, options.get("dtype", jnp.float32))
  pairs = shape[-1] * (shape[-1] - 1) // 2
  weight = jax.ShapeDtypeStruct((pairs, 8), options.get("weight", jnp.bfloat16))
  for name, kernels in (("tpu", tpu), ("gpu", gpu)):
    assert kernels.refusal(z, weight, options.get("offsets", (1, 2))) == texts[name]


def both_directions(kernels, offsets, z, before, weight, bias, reach, dy):
  """The kernels forward and backward, to be compiled for a chip."""
  options = {"offsets": offsets, "eps": EPS, "normalization": "safe"}
  y = kernels.forward(z, before, weight, bias, reach, **options)
  return y, kernels.backward(z, before, weight, reach, dy, **options)


def compiled(chip: str, case, dtype, *, schedule="kernels"):
  """A report of the kernels of the chip's platform at the sizes of a case."""
  platform = compile_ahead.target(chip).platform
  reason = compile_ahead.installed(platform)
  if reason is not None:
    pytest.skip(reason)
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
  arrays = tuple(
    jax.ShapeDtypeStruct(shape, dtypes.get(array, dtype)) for array, shape in shapes.items()
  )
  kernels = tpu if platform == "tpu" else gpu
  program = functools.partial(both_directions, kernels, case.offsets)
  return compile_ahead.report(program, arrays, chip, schedule=schedule)


# On v6e the vector unit is busy for as long as the matrix units are, and the schedule lays no more
# than half of its work beside theirs in the backward pass.
@pytest.mark.parametrize(("chip", "forward", "backward"), [("v5e", 1.05, 1.15), ("v6e", 1.4, 2.1)])
def test_schedule(chip, forward, backward):
  """The matrix units hold up each kernel, or it stays near what they or HBM allow."""
  schedule = compiled(chip, NAMED["train"], jnp.bfloat16).schedule
  for name, ratio in (("grassmann_forward", forward), ("grassmann_backward", backward)):
    piece = schedule.kernel(name)
    assert piece.calls == 1 and piece.ratio <= ratio, f"{name}: {piece.ratio:.2f}"


def test_odd_shapes_compile():
  """On the chip with the least memory: no length, rank or width that suits it, an offset beyond a
  block, in float32; and the weight in parts."""
  case = Case("", 2, 601, 23, 1160, offsets=(1, 3, 300))
  report = compiled("v4", case, jnp.float32, schedule=None)
  assert report.pallas_kernels.keys() >= {"grassmann_forward", "grassmann_backward"}


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
  kernels = compiled(chip, NAMED[name], jnp.bfloat16).gpu_kernels
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
