"""The GPU kernels of the delta rule: their values in interpret mode, what they refuse, and what
NVIDIA's assembler makes of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import compile_ahead, ops
from pallas_kernels.chunks_gpu import Blocks
from pallas_kernels.delta_rule import cases, gpu, reference
from pallas_kernels.delta_rule.cases import BENCHMARKS

# The op gives its kernels one decay a token at least.
CASES = [case for case in cases.CASES if case.decay != "constant"]
SMALL = Blocks(chunk=32, keys=16, values=16)  # several chunks even in small cases
NAMES = ("y", "S_T", "dq", "dk", "dv", "dbeta", "dg", "dS_0")


@functools.partial(jax.jit, static_argnames=("scale",))
def by_kernel(rows, state, cotangents, documents, *, scale):
  """y, S_T, and the gradients for q, k, v, beta, g and S_0, by the kernels themselves."""
  options = {"scale": scale, "blocks": SMALL, "interpret": True}
  y, last, saved = gpu.forward(*rows, state, documents, dtype=rows[2].dtype, save=True, **options)
  gradients = gpu.backward(*rows, saved, documents, *cotangents, **options)
  return dict(zip(NAMES, (y, last, *gradients), strict=True))


@functools.partial(jax.jit, static_argnames=("implementation",))
def by_op(rows, state, cotangents, segment_ids, *, implementation):
  """The same by the op."""

  def run(q, k, v, beta, g, state):
    options = {"segment_ids": segment_ids, "implementation": implementation}
    return ops.delta_rule(q, k, v, beta, g=g, state=state, **options)

  (y, last), pull = jax.vjp(run, *rows, state)
  return dict(zip(NAMES, (y, last, *pull(cotangents)), strict=True))


def inputs_of(case, dtype):
  """(q, k, v, beta, g), S_0, cotangents of y and S_T; zeros at padding, as the op gives them."""
  arrays, ids, random = case.inputs(), case.segment_ids(), np.random.default_rng(1)
  g = arrays.get("g")

  def clear(x, dtype):
    if ids is not None:
      x = x * (ids != 0).reshape(*ids.shape, *(1,) * (x.ndim - 2))
    return np.asarray(x, dtype)

  rows = [clear(arrays[name], dtype) for name in "qkv"]
  rows = (*rows, clear(arrays["beta"], "f4"), None if g is None else clear(g, "f4"))
  dy = clear(random.normal(size=case.outputs()["y"]), dtype)
  dstate = random.normal(size=arrays["state"].shape).astype(np.float32)
  return rows, arrays["state"].astype(np.float32), (dy, dstate)


IN_FLOAT32 = ("two_tokens", "many_documents", "scalar", "vector", "repeated_keys")


@pytest.mark.parametrize(
  ("case", "dtype"),
  [(case, jnp.bfloat16) for case in CASES]
  + [(case, jnp.float32) for case in CASES if case.name in IN_FLOAT32],
  ids=lambda x: x.name if isinstance(x, cases.Case) else jnp.dtype(x).name,
)
def test_definition(case, dtype, errors, rounding):
  """In interpret mode the kernels are as near to the definition in float64 as the matmul form is,
  within a factor of two."""
  arrays, ids = inputs_of(case, dtype), case.segment_ids()
  documents = None if ids is None else np.asarray(ops.document_indices(ids))
  found = by_kernel(*arrays, documents, scale=case.key_dim**-0.5)
  by_xla = by_op(*arrays, ids, implementation="xla")
  with jax.enable_x64(True):
    exact = by_op(*to_float64(arrays), ids, implementation="reference")
  for name, expected in exact.items():
    if expected is None:
      assert found[name] is None
      continue
    assert found[name].dtype == by_xla[name].dtype and found[name].shape == expected.shape, name
    live = 1
    if ids is not None and expected.shape[:2] == ids.shape:
      live = (ids != 0).reshape(*ids.shape, *(1,) * (expected.ndim - 2))
    of_kernel = errors(np.asarray(found[name], np.float64) * live, expected * live)
    of_xla = errors(np.asarray(by_xla[name], np.float64) * live, expected * live)
    one_ulp = rounding(dtype, 2)  # float32 results are made of operands in this dtype, too
    for kind, kernel_error, xla_error in zip(
      ("RMS", "largest"), of_kernel[:2], of_xla[:2], strict=True
    ):
      assert kernel_error <= 2 * xla_error + one_ulp, (
        f"{case.name}, {name}: {kind} error {kernel_error:.1e}, xla {xla_error:.1e}, "
        f"worst at {of_kernel[2]}"
      )


@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("decay", [0.0, -80.0, -1e4, "mixed"])
def test_extremes(kind, decay, rounding):
  """Decays of any strength are finite and right, and one of -1e4 costs its neighbours no digit."""
  case = next(case for case in CASES if case.name == kind)
  (*rows, g), state, cotangents = inputs_of(dataclasses.replace(case, segments=None), jnp.float32)
  if decay == "mixed":
    g = np.full_like(g, -0.1)
    g[:, 20] = g[:, 50] = -1e4
  else:
    g = np.full_like(g, decay)
  found = by_kernel((*rows, g), state, cotangents, None, scale=0.5)
  with jax.enable_x64(True):
    expected = by_definition(*to_float64(((*rows, g), state, cotangents)))
  operations = 2 * SMALL.chunk + case.key_dim + case.value_dim
  for name, value in expected.items():
    assert np.isfinite(found[name]).all(), name
    # Where nothing is left of the state, some gradients are e ** -80 beside others of order one.
    size = max(np.abs(value).max(), np.finfo(np.float32).eps ** 2)
    worst = np.abs(np.asarray(found[name], np.float64) - value).max() / size
    assert worst <= rounding(jnp.float32, operations), f"{name}: {worst:.1e}"


@jax.jit
def by_definition(rows, state, cotangents):
  ids = jnp.ones(rows[0].shape[:2], jnp.int32)

  def run(*arrays):
    return reference.delta_rule(*arrays, ids, scale=0.5)

  (y, last), pull = jax.vjp(run, *rows, state)
  return dict(zip(NAMES, (y, last, *pull(cotangents)), strict=True))


def to_float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_refusals():
  """A kernel that cannot run says why."""
  row = functools.partial(jax.ShapeDtypeStruct, (1, 128, 2, 8))
  beta = jax.ShapeDtypeStruct((1, 128, 1), jnp.float32)
  assert gpu.refusal(*[row(jnp.float32)] * 3, beta) == (
    "q has 2 heads, expected no more than the 1 of the state"
  )
  both = jax.ShapeDtypeStruct((1, 128, 2), jnp.float32)
  assert gpu.refusal(*[row(jnp.float16)] * 3, both) == (
    "q, k, v are float16, float16, float16, expected all float32 or all bfloat16"
  )
  assert gpu.refusal(*[row(jnp.float32)] * 3, both) is None


def program(q, k, v, beta, g, state, documents, dy, dstate):
  """Forward and backward at a case's own scale."""
  scale = q.shape[3] ** -0.5
  options = {"scale": scale, "dtype": v.dtype, "save": True}
  y, last, saved = gpu.forward(q, k, v, beta, g, state, documents, **options)
  return y, last, gpu.backward(q, k, v, beta, g, saved, documents, dy, dstate, scale=scale)


@pytest.mark.parametrize("target", ["a6000", "h100"])
@pytest.mark.parametrize("name", ["train_scalar", "train_vector"])
def test_compiles_ahead(name, target):
  """At head size 128 in bfloat16 no kernel spills a register, all that multiply do it on tensor
  cores, and a multiprocessor has room for one block at least."""
  if (reason := compile_ahead.installed("cuda")) is not None:
    pytest.skip(reason)
  case = next(case for case in BENCHMARKS if case.name == name)
  shapes, shaped = case.shapes(), jax.ShapeDtypeStruct
  q, k, v = (shaped(shapes[x], jnp.bfloat16) for x in "qkv")
  beta, g = (shaped(shapes[x], jnp.float32) for x in ("beta", "g"))
  state = shaped(shapes["state"], jnp.float32)
  documents = shaped(shapes["q"][:2], jnp.int32)
  arguments = (q, k, v, beta, g, state, documents, v, state)
  kernels = {x.name: x for x in compile_ahead.gpu_kernels(program, arguments, target)}
  expected = {"pairs", "solve", "forward", "backward_states", "backward_pairs", "backward"}
  assert set(kernels) == {f"delta_rule_{x}" for x in expected}
  instruction = {"a6000": "mma.sync", "h100": "wgmma"}[target]
  for kernel in kernels.values():
    assert kernel.spill_bytes == 0, f"{kernel.name}: {kernel.spill_bytes} bytes spilled"
    assert kernel.tensor_core.get(instruction, 0) > 0, f"{kernel.name}: {kernel.tensor_core}"
    assert kernel.blocks_per_core >= 1, kernel.name
