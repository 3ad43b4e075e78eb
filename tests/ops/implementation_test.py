"""How an implementation is chosen, refused and explained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxmix import ops
from jaxmix.ops import implementation


def shaped(length: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)


def test_explanation():
  """One line an op and outcome, in order of first use; nothing is run."""

  def program(long, short):
    for _ in range(2):
      long = ops.attention(long, long, long)[0]
    return long, ops.attention(short, short, short)[0], ops.linear_attention(long, long, long)[0]

  assert ops.explain_implementation(program, shaped(128), shaped(4)) == [
    "attention: tpu -> tpu kernel; elsewhere -> xla (gpu: attention has no gpu kernel)",
    "attention: elsewhere -> xla (gpu: attention has no gpu kernel; tpu: length 4 is shorter "
    "than one block of 128)",
    "linear_attention: tpu -> tpu kernel; elsewhere -> xla (gpu: not yet timed against the matmuls "
    "on a GPU; it runs when named)",
  ]


def test_explanation_of_the_same_function_again():
  """An explanation is not lost because jax remembers the trace of a function."""

  def program(q):
    return ops.linear_attention(q, q, q)[0]

  first = ops.explain_implementation(program, shaped(4))
  assert len(first) == 1
  assert ops.explain_implementation(program, shaped(4)) == first


def test_demand():
  """A name gets that implementation, whatever the platform."""
  functions = {"reference": lambda x: x + 1, "xla": lambda x: x + 2, "gpu": lambda x: x + 3}
  for name, added in (("reference", 1), ("xla", 2), ("gpu", 3)):
    assert implementation.run("op", name, (1,), functions=functions, refusals={}) == 1 + added


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("cuda",
     "op: implementation='cuda' is unknown; expected None or one of reference, xla, tpu, gpu"),
    ("tpu",
     'op: implementation="tpu" cannot run this call: op has no tpu kernel; '
     'use implementation="xla"'),
    ("gpu",
     'op: implementation="gpu" cannot run this call: too wide; use implementation="xla"'),
  ],
)  # fmt: skip
def test_refusal(name, text):
  functions = {"reference": abs, "xla": abs, "gpu": abs}
  with pytest.raises(ValueError) as error:
    implementation.run("op", name, (1,), functions=functions, refusals={"gpu": "too wide"})
  assert str(error.value) == text


def test_platform_of_the_mesh():
  """Under a mesh only the branch of its devices is traced; without one, every branch is."""
  traced = []

  def branch(name, value):
    def run(x):
      traced.append(name)
      return x + value

    return run

  def program(x):
    functions = {"xla": branch("xla", 1), "tpu": branch("tpu", 2)}
    return implementation.run("op", None, (x,), functions=functions, refusals={})

  assert jax.jit(program)(1) == 2
  assert set(traced) == {"xla", "tpu"}
  traced.clear()
  with jax.set_mesh(jax.make_mesh((1,), ("x",))):
    assert jax.jit(lambda x: program(x))(1) == 2
  assert traced == ["xla"]
