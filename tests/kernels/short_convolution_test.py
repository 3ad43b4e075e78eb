"""The kernels of the short convolution: their values in interpret mode, where programs hold them,
and what the compilers of absent chips make of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmix import compile_ahead, ops, sharding
from pallas_kernels.short_convolution import gpu, tpu
from pallas_kernels.short_convolution.cases import CASES

NAMED = {case.name: case for case in CASES}


@functools.partial(jax.jit, static_argnames=("implementation", "activation"))
def by_op(arrays, cotangents, segment_ids, *, implementation, activation):
  """y, the state after, and the gradients with respect to every array."""

  def run(arrays):
    return ops.short_convolution(
      **arrays, segment_ids=segment_ids, activation=activation, implementation=implementation
    )

  (y, state), pull = jax.vjp(run, arrays)
  (gradients,) = pull(cotangents)
  return {"y": y, "last": state, **gradients}


@pytest.fixture
def interpreted(monkeypatch):
  """The op's kernels run their programs on the CPU, in blocks that are small enough for several in
  every case."""
  for name in ("forward", "backward"):
    kernel = functools.partial(getattr(tpu, name), tokens=128, interpret=True)
    monkeypatch.setattr(tpu, name, kernel)
  monkeypatch.setattr(gpu, "backward", functools.partial(gpu.backward, interpret=True))


def inputs_of(case, dtype):
  """The arrays of a case, and cotangents of y and of the state; NaN at padding."""
  arrays, weights, ids = case.inputs(), case.inputs(seed=1), case.segment_ids()
  dtypes = {"x": dtype, "state": dtype, "weight": np.float32, "bias": np.float32}
  for rows in (arrays, weights):
    if ids is not None:
      rows["x"][ids == 0] = np.nan
  cast = {name: np.asarray(x, dtypes[name]) for name, x in arrays.items()}
  return cast, (np.asarray(weights["x"], dtype), np.asarray(weights["state"], dtype))


@pytest.mark.parametrize(
  ("implementation", "name", "dtype"),
  [
    ("tpu", "one_token", np.float32),
    ("tpu", "above_a_block", jnp.bfloat16),
    ("tpu", "one_block", np.float32),
    ("tpu", "eight_taps", jnp.bfloat16),
    ("tpu", "padded", np.float32),
    ("gpu", "below_the_width", np.float32),
    ("gpu", "above_a_block", jnp.bfloat16),
    ("gpu", "one_tap", np.float32),
    ("gpu", "padded", np.float32),
  ],
)  # fmt: skip
def test_definition(implementation, name, dtype, interpreted, no_worse):
  """In interpret mode the kernels are as near to the definition in float64 as the form by shifts
  is, within a factor of two; what stands at padding is inert."""
  case = NAMED[name]
  arrays, cotangents = inputs_of(case, dtype)
  run = functools.partial(by_op, segment_ids=case.segment_ids(), activation=case.activation)
  found = run(arrays, cotangents, implementation=implementation)
  by_xla = run(arrays, cotangents, implementation="xla")
  with jax.enable_x64(True):
    double = lambda x: np.nan_to_num(np.asarray(x, np.float64))  # noqa: E731
    exact = run(*jax.tree.map(double, (arrays, cotangents)), implementation="reference")
  no_worse(found, by_xla, exact, case.name)


def test_only_what_is_there_is_read():
  """The TPU kernels read nothing outside their arrays and nothing that is not written before: NaN
  there and the values of `test_definition` agree."""
  case = NAMED["packed"]
  arrays, (dy, _) = jax.tree.map(np.nan_to_num, inputs_of(case, np.float32))
  reach = np.where(case.segment_ids() != 0, np.minimum(np.arange(case.length), 3), -1)
  strict = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")

  @functools.partial(jax.jit, static_argnames="interpret")
  def run(arrays, reach, dy, interpret):
    options = {"activation": "silu", "tokens": 256, "interpret": interpret}
    forward = tpu.forward(**arrays, reach=reach, **options)
    return forward, tpu.backward(**arrays, reach=reach, dy=dy, **options)

  found, expected = (run(arrays, reach, dy, interpret) for interpret in (strict, True))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_op_on_a_mesh(interpreted, close, rounding):
  """The op by its kernels, with batch and channels cut over 8 devices, is the form by shifts on
  one."""
  case = NAMED["packed"]
  twice = lambda x: np.concatenate([x, x])  # noqa: E731 — 4 rows, for 4 devices
  arrays, cotangents = inputs_of(case, np.float32)
  arrays |= {name: twice(arrays[name]) for name in ("x", "state")}
  cotangents, ids = tuple(map(twice, cotangents)), twice(case.segment_ids())
  run = functools.partial(by_op, activation=case.activation)
  expected = run(arrays, cotangents, ids, implementation="xla")
  with jax.set_mesh(sharding.make_mesh(data=4, tensor=2)):
    found = run(arrays, cotangents, ids, implementation="tpu")
  close(found, expected, tolerance=rounding(jnp.float32, 4 * case.length))
  assert tuple(found["y"].sharding.spec) == ("data", None, "tensor")


@pytest.mark.parametrize(("platform", "holds"), [("tpu", True), ("cpu", False)])
def test_chosen_when_lowered(platform, holds):
  """implementation=None gives the kernels to programs lowered for TPU, and none to those for a
  CPU."""
  x, weight = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 64, 8), (8, 4)))

  def loss(x, weight):
    return ops.short_convolution(x, weight)[0].sum()

  traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(x, weight)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("short_convolution_forward" in text) == holds
  assert ("short_convolution_backward" in text) == holds


def test_refusals():
  """A call that no kernel takes is left to the form by shifts unless a kernel is demanded."""

  def shaped(length, width, dtype):
    shapes = ((1, length, 8), (8, width))
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

  def run(x, weight, implementation=None):
    return ops.short_convolution(x, weight, implementation=implementation)

  (line,) = ops.explain_implementation(run, *shaped(1, 4, jnp.float32))
  assert line == (
    "short_convolution: gpu -> gpu kernel; elsewhere -> xla (tpu: length 1 is below 64)"
  )
  for arrays, text in (
    (shaped(64, 9, jnp.float32), "width 9 is above 8"),
    (shaped(64, 4, jnp.float16), "x is float16, expected float32 or bfloat16"),
  ):
    for name in ("tpu", "gpu"):
      with pytest.raises(ValueError) as error:
        jax.eval_shape(functools.partial(run, implementation=name), *arrays)
      assert str(error.value) == (
        f'short_convolution: implementation="{name}" cannot run this call: {text}; '
        'use implementation="xla"'
      )
    assert run(*(jnp.ones(x.shape, x.dtype) for x in arrays))[0].shape == (1, 64, 8)


def program(x, weight, bias, state, segment_ids):
  """The op forward and backward, to be compiled for a chip."""

  def run(x, weight, bias, state):
    return ops.short_convolution(
      x, weight, bias=bias, state=state, segment_ids=segment_ids, activation="silu"
    )

  results, pull = jax.vjp(run, x, weight, bias, state)
  return results, pull(results)


def compiled(chip: str, batch, length, channels, width, dtype, *, packed: bool, schedule="kernels"):
  reason = compile_ahead.installed(compile_ahead.target(chip).platform)
  if reason is not None:
    pytest.skip(reason)
  shapes = ((batch, length, channels), (channels, width), (channels,), (batch, width - 1, channels))
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  arrays.append(jax.ShapeDtypeStruct((batch, length), jnp.int32) if packed else None)
  return compile_ahead.report(program, tuple(arrays), chip, schedule=schedule)


# The backward pass takes 37 operations of the vector unit on every 1024 numbers. Four are issued a
# cycle; HBM needs 11 cycles for these numbers on v5e, and 7 on v6e.
@pytest.mark.parametrize(("chip", "ratio"), [("v5e", 1.02), ("v6e", 1.6)])
def test_schedule(chip, ratio):
  """Each kernel is held up by HBM, or stays near it."""
  schedule = compiled(chip, 1, 1024, 1024, 4, jnp.bfloat16, packed=False).schedule
  for name in ("short_convolution_forward", "short_convolution_backward"):
    piece = schedule.kernel(name)
    assert piece.calls == 1 and piece.ratio <= ratio, f"{name}: {piece.ratio:.2f}"


def test_odd_shapes_compile():
  """On the chip with the least memory: no length or width that suits it, packed, in float32."""
  report = compiled("v4", 2, 601, 1160, 8, jnp.float32, packed=True, schedule=None)
  assert report.pallas_kernels.keys() >= {"short_convolution_forward", "short_convolution_backward"}


@pytest.mark.parametrize("chip", ["a100", "h100", "b200"])
def test_gpu_kernel(chip):
  """A program for GPU holds one kernel, that of the backward pass, and it spills no register."""
  (kernel,) = compiled(chip, 2, 1000, 1000, 4, jnp.bfloat16, packed=True).gpu_kernels
  assert kernel.name == "short_convolution_backward" and kernel.spill_bytes == 0
