"""The kernels of the short convolution: their values in interpret mode, where programs hold them,
and what the compilers of absent chips make of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmix import ops, sharding
from pallas_kernels.short_convolution import tpu
from pallas_kernels.short_convolution.cases import CASES

NAMED = {case.name: case for case in CASES}
# Reads outside an array raise, and memory that nothing has written yet is NaN.
INTERPRET = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")


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


def inputs_of(case, dtype):
  """The arrays of a case, and cotangents of y and of the state; NaN at padding."""
  arrays, weights = case.inputs(), case.inputs(seed=1)
  ids = case.segment_ids()
  for rows in (arrays, weights):
    if ids is not None:
      rows["x"][ids == 0] = np.nan
  cast = {name: np.asarray(x, dtype if name in ("x", "state") else np.float32)
          for name, x in arrays.items()}  # fmt: skip
  return cast, (np.asarray(weights["x"], dtype), np.asarray(weights["state"], dtype))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_definition(case, dtype, errors, rounding):
  """In interpret mode the kernels are as near to the definition in float64 as the form by shifts
  is, within a factor of two; what stands at padding is inert."""
  arrays, cotangents = inputs_of(case, dtype)
  run = functools.partial(by_op, segment_ids=case.segment_ids(), activation=case.activation)
  with pltpu.force_tpu_interpret_mode(INTERPRET):
    found = run(arrays, cotangents, implementation="tpu")
  by_xla = run(arrays, cotangents, implementation="xla")
  with jax.enable_x64(True):
    double = lambda x: np.nan_to_num(np.asarray(x, np.float64))  # noqa: E731
    exact = run(*jax.tree.map(double, (arrays, cotangents)), implementation="reference")
  assert {name: x.dtype for name, x in found.items()} == {n: x.dtype for n, x in by_xla.items()}
  for name, expected in exact.items():
    of_kernel, of_xla = errors(found[name], expected), errors(by_xla[name], expected)
    one_ulp = rounding(found[name].dtype, 2)
    for kernel_error, xla_error, kind in zip(
      of_kernel[:2], of_xla[:2], ("RMS", "largest"), strict=True
    ):
      assert kernel_error <= 2 * xla_error + one_ulp, (
        f"{case.name}, {name}: {kind} error {kernel_error:.1e}, xla {xla_error:.1e}, "
        f"worst at {of_kernel[2]}"
      )
