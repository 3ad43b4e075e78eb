"""Splash attention behind this project's layout: its values in interpret mode, and where programs
hold it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops
from pallas_kernels.attention import tpu
from pallas_kernels.attention.cases import CASES


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(attention, arrays, weights):
  """y, and the gradients of its weighted sum with respect to q, k and v."""

  def weighted(arrays):
    y = attention(**arrays)
    return jnp.sum(y * weights), y

  gradients, y = jax.grad(weighted, has_aux=True)(arrays)
  return {"y": y, **gradients}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_definition(case, no_worse):
  """In interpret mode the kernel is as near to the definition in float64 as jax's form is, within a
  factor of two."""
  inputs = {name: x.astype(np.float32) for name, x in case.inputs().items()}
  ids, scale = case.segment_ids(), case.key_dim**-0.5
  options = {"visibility": "causal" if case.causal else "full", "window": case.window}
  weights = np.random.default_rng(1).normal(
    size=(case.batch, case.length, case.heads, case.value_dim)
  )
  if ids is not None:
    weights *= (ids != 0)[..., None, None]  # what a kernel gives at padding is the op's to clear
  weights = weights.astype(np.float32)
  documents = None if ids is None else np.where(ids != 0, ops.document_indices(ids) + 1, 0)

  def op(implementation):
    return lambda **arrays: ops.attention(
      **arrays, segment_ids=ids, implementation=implementation, **options
    )[0]

  def kernel(**arrays):
    y = tpu.attention(
      **arrays,
      documents=documents,
      scale=scale,
      causal=case.causal,
      window=case.window,
      interpret=True,
    )
    return y if ids is None else jnp.where((ids != 0)[..., None, None], y, 0)

  found = outputs_and_gradients(kernel, inputs, weights)
  by_xla = outputs_and_gradients(op("xla"), inputs, weights)
  with jax.enable_x64(True):
    double = jax.tree.map(lambda x: x.astype(np.float64), (inputs, weights))
    exact = outputs_and_gradients(op("reference"), *double)
  no_worse({"y": found.pop("y")}, by_xla, exact, case.name)
  # The kernel's backward takes the difference of two sums of V products that jax's form rounds as
  # one.
  no_worse(found, by_xla, exact, case.name, units=case.value_dim)


@pytest.mark.parametrize(
  ("causal", "window"), [(True, None), (True, 200), (False, None)], ids=["causal", "window", "full"]
)
def test_parts_of_the_queries(causal, window, close, rounding):
  """Parts of a row against all of its keys give what the row gives, forward and backward."""
  random = np.random.default_rng(0)
  q, weights = random.normal(size=(2, 1, 512, 2, 16)).astype(np.float32)
  k, v = random.normal(size=(2, 1, 512, 1, 16)).astype(np.float32)
  documents = np.repeat([[0, 1, 1, 2]], 128, axis=1).astype(np.int32)
  attend = functools.partial(
    tpu.attention, documents=documents, scale=0.3, causal=causal, window=window, interpret=True
  )

  def in_parts(q, k, v):
    parts = enumerate(jnp.split(q, 2, axis=1))
    return jnp.concatenate([attend(q, k, v, part=(jnp.int32(i), 2)) for i, q in parts], axis=1)

  def run(attend):
    weighted = jax.value_and_grad(lambda *arrays: jnp.sum(attend(*arrays) * weights), (0, 1, 2))
    return jax.jit(weighted)(q, k, v)

  close(run(in_parts), run(attend), tolerance=rounding("float32", 512))


@pytest.mark.parametrize("length", [1, 127])
def test_refusal(length):
  assert tpu.refusal(length) == f"length {length} is shorter than one block of 128"
  assert tpu.refusal(128) is None
  assert tpu.refusal(1024, 16) == "16 parts of length 1024 are not of whole blocks of 128"


@pytest.mark.parametrize(("platform", "holds"), [("tpu", True), ("cpu", False), ("cuda", False)])
def test_chosen_when_lowered(platform, holds):
  """implementation=None gives the kernel to programs lowered for TPU and to no others, forward and
  backward."""
  q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)

  def loss(q, k, v):
    return ops.attention(q, k, v, window=100)[0].sum()

  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, q, q)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("tpu_custom_call" in text) == holds
  assert (
    not holds or text.count("tpu_custom_call") >= 3
  )  # forward, and backward for q and for k and v


def test_demand_is_lowered_everywhere():
  """implementation="tpu" puts the kernel into a program for any platform: one that has no TPU
  refuses it."""
  q = jax.ShapeDtypeStruct((1, 128, 1, 8), jnp.float32)
  program = jax.jit(lambda q: ops.attention(q, q, q, implementation="tpu")[0])
  with pytest.raises(ValueError, match="Only interpret mode is supported on CPU backend"):
    program.trace(q).lower(lowering_platforms=("cpu",))
