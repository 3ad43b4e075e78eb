"""The GPU kernels of linear attention: their values in interpret mode, what they refuse, and what
NVIDIA's assembler makes of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import compile_ahead, ops
from pallas_kernels.chunks_gpu import Blocks, choose_blocks
from pallas_kernels.linear_attention import cases, gpu, reference
from pallas_kernels.linear_attention.cases import BENCHMARKS

# The op gives its kernels one decay a token at least.
CASES = [case for case in cases.CASES if case.decay != "constant"]
SMALL = Blocks(chunk=32, keys=16, values=16)  # several chunks even in small cases
NAMES = ("y", "S_T", "dq", "dk", "dv", "dg", "dS_0")


@functools.partial(jax.jit, static_argnames=("scale",))
def by_kernel(rows, state, cotangents, documents, *, scale):
  """y, S_T, and the gradients with respect to q, k, v, g and S_0, by the kernels themselves."""
  options = {"scale": scale, "blocks": SMALL, "interpret": True}
  y, last, saved = gpu.forward(*rows, state, documents, dtype=rows[2].dtype, save=True, **options)
  gradients = gpu.backward(*rows, saved, documents, *cotangents, **options)
  return dict(zip(NAMES, (y, last, *gradients), strict=True))


@functools.partial(jax.jit, static_argnames=("implementation",))
def by_op(rows, state, cotangents, segment_ids, *, implementation):
  """The same by the op."""

  def run(q, k, v, g, state):
    options = {"segment_ids": segment_ids, "implementation": implementation}
    return ops.linear_attention(q, k, v, g=g, state=state, **options)

  (y, last), pull = jax.vjp(run, *rows, state)
  return dict(zip(NAMES, (y, last, *pull(cotangents)), strict=True))


def inputs_of(case, dtype):
  """(q, k, v, g), S_0, and cotangents of y and S_T; zeros at padding, as the op gives them."""
  arrays, ids, random = case.inputs(), case.segment_ids(), np.random.default_rng(1)
  g = arrays.get("g")

  def clear(x, dtype):
    if ids is not None:
      x = x * (ids != 0).reshape(*ids.shape, *(1,) * (x.ndim - 2))
    return np.asarray(x, dtype)

  rows = (*(clear(arrays[name], dtype) for name in "qkv"), None if g is None else clear(g, "f4"))
  dy = clear(random.normal(size=case.outputs()["y"]), dtype)
  dstate = random.normal(size=arrays["state"].shape).astype(np.float32)
  return rows, arrays["state"].astype(np.float32), (dy, dstate)


IN_FLOAT32 = ("two_tokens", "many_documents", "scalar", "vector", "more_queries")


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
    one_ulp = rounding(found[name].dtype, 2)
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
    return reference.linear_attention(*arrays, ids, scale=0.5)

  (y, last), pull = jax.vjp(run, *rows, state)
  return dict(zip(NAMES, (y, last, *pull(cotangents)), strict=True))


def to_float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_blocks():
  """Blocks are powers of two, and a state of them fits the registers of its program."""
  for key_dim in (4, 64, 100, 128, 256):
    for value_dim in (8, 128, 129):
      for dtype in (jnp.float32, jnp.bfloat16):
        blocks = choose_blocks(64, key_dim, value_dim, dtype)
        for size in (blocks.chunk, blocks.keys, blocks.values):
          assert size >= 16 and size & (size - 1) == 0
        held = -(-key_dim // blocks.keys) * blocks.keys * blocks.values
        assert held <= 64 * 128  # 64 registers of each of 128 threads


def test_refusals():
  """A kernel that cannot run says why."""
  row = functools.partial(jax.ShapeDtypeStruct, (1, 128, 2, 8))
  assert gpu.refusal(row(jnp.float16), row(jnp.float16), row(jnp.float16)) == (
    "q, k, v are float16, float16, float16, expected all float32 or all bfloat16"
  )
  wide = jax.ShapeDtypeStruct((1, 128, 2, 512), jnp.bfloat16)
  assert gpu.refusal(wide, wide, wide) == (
    "key_dim=512: one program holds all channels of a key, and registers and shared memory have "
    "room for 256; split the heads"
  )
  assert gpu.refusal(row(jnp.float32), row(jnp.float32), row(jnp.float32)) is None


def program(q, k, v, g, state, documents, dy, dstate):
  """Forward and backward at a case's own scale."""
  scale = q.shape[3] ** -0.5
  y, last, saved = gpu.forward(q, k, v, g, state, documents, scale=scale, dtype=v.dtype, save=True)
  return y, last, gpu.backward(q, k, v, g, saved, documents, dy, dstate, scale=scale)


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
  g = shaped(shapes["g"], jnp.float32)
  state = shaped(shapes["state"], jnp.float32)
  documents = shaped(shapes["q"][:2], jnp.int32)
  arguments = (q, k, v, g, state, documents, v, state)
  kernels = {x.name: x for x in compile_ahead.gpu_kernels(program, arguments, target)}
  expected = {"pairs", "forward", "backward_states", "backward"}
  expected |= {"backward_pairs"} if name == "train_vector" else set()
  assert set(kernels) == {f"linear_attention_{x}" for x in expected}
  instruction = {"a6000": "mma.sync", "h100": "wgmma"}[target]
  for kernel in kernels.values():
    assert kernel.spill_bytes == 0, f"{kernel.name}: {kernel.spill_bytes} bytes spilled"
    assert kernel.tensor_core.get(instruction, 0) > 0, f"{kernel.name}: {kernel.tensor_core}"
    assert kernel.blocks_per_core >= 1, kernel.name
