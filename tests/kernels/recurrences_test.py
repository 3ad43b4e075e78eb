"""The kernels of linear attention and of the delta rule: their values in interpret mode, and where
programs hold them."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmix import ops, sharding
from pallas_kernels import chunks_gpu
from pallas_kernels.delta_rule import blocks as delta_rule_blocks
from pallas_kernels.delta_rule import cases as delta_rule_cases
from pallas_kernels.delta_rule import gpu as delta_rule_gpu
from pallas_kernels.delta_rule import tpu as delta_rule_tpu
from pallas_kernels.linear_attention import blocks as linear_attention_blocks
from pallas_kernels.linear_attention import cases as linear_attention_cases
from pallas_kernels.linear_attention import gpu as linear_attention_gpu
from pallas_kernels.linear_attention import tpu as linear_attention_tpu

OPS = ("linear_attention", "delta_rule")
ROWS = {"linear_attention": ("q", "k", "v", "g"), "delta_rule": ("q", "k", "v", "beta", "g")}
KERNELS = {
  ("linear_attention", "tpu"): linear_attention_tpu,
  ("linear_attention", "gpu"): linear_attention_gpu,
  ("delta_rule", "tpu"): delta_rule_tpu,
  ("delta_rule", "gpu"): delta_rule_gpu,
}
CASES = {
  "linear_attention": {case.name: case for case in linear_attention_cases.CASES},
  "delta_rule": {case.name: case for case in delta_rule_cases.CASES},
}
# Reads outside an array raise, and memory that nothing has written yet is NaN.
STRICT = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")


class Call(NamedTuple):
  """What an op gives its kernels.

  Attributes:
    rows: those of ROWS; zeros at padding.   state: S_0.   cotangents: of y and of S_T.
    segment_ids: None where each row is one document.
  """

  rows: tuple
  state: np.ndarray
  cotangents: tuple
  segment_ids: np.ndarray | None = None


def call_of(op: str, case, dtype) -> Call:
  """A case with numbers."""
  arrays, random, ids = case.inputs(), np.random.default_rng(1), case.segment_ids()
  live = np.ones((case.batch, case.length), bool) if ids is None else ids != 0

  def clear(x, dtype):
    return np.asarray(x * live.reshape(*live.shape, *(1,) * (x.ndim - 2)), dtype)

  rows = (
    clear(arrays[name], np.float32 if name in case.float32 else dtype) if name in arrays else None
    for name in ROWS[op]
  )
  dy = clear(random.normal(size=case.outputs()["y"]), dtype)
  dstate = random.normal(size=arrays["state"].shape)
  return Call(tuple(rows), np.float32(arrays["state"]), (dy, np.float32(dstate)), ids)


def small_blocks(op: str, chip: str, call: Call):
  """Several blocks and chunks even in small cases; on TPU of as many heads as share others."""
  if chip == "gpu":
    return chunks_gpu.Blocks(chunk=32, keys=16, values=16)
  heads = [x.shape[2] for x in call.rows[:3]]
  if op == "delta_rule":
    group, g = max(heads) // min(heads), call.rows[-1]
    scalar = g is not None and g.ndim == 3
    # Two chunks a tile where one case of each kind needs them, and two tiles in one of these.
    tile, tiles = 32 if scalar or group > 1 else 16, 2 if scalar else 1
    return delta_rule_blocks.Blocks(chunk=16, tile=tile, tiles=tiles, heads=group)
  # Queries that share a state are read together; states that share queries a part at a time.
  return linear_attention_blocks.Blocks(chunk=32, chunks=2, heads=heads[0] // max(heads[1:]) or 1)


def by_kernels(op: str, chip: str, call: Call, blocks=None, interpret=True) -> dict:
  """y, S_T, and the gradients with respect to every array, by the kernels themselves."""
  ids = call.segment_ids
  documents = None if ids is None else np.asarray(ops.document_indices(ids))
  blocks = blocks or small_blocks(op, chip, call)
  arrays = call._replace(segment_ids=None)
  return _by_kernels(arrays, documents, op=op, chip=chip, blocks=blocks, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("op", "chip", "blocks", "interpret"))
def _by_kernels(call: Call, documents, *, op, chip, blocks, interpret):
  kernels, rows = KERNELS[op, chip], call.rows
  options = {"scale": rows[0].shape[3] ** -0.5, "blocks": blocks, "interpret": interpret}
  forward = functools.partial(kernels.forward, dtype=rows[2].dtype, save=True, **options)
  y, last, saved = forward(*rows, call.state, documents)
  gradients = kernels.backward(*rows, saved, documents, *call.cotangents, **options)
  return named(op, y, last, gradients)


@functools.partial(jax.jit, static_argnames=("op", "implementation", "normalize"))
def by_op(call: Call, *, op, implementation, normalize=False):
  """The same by the op."""

  def run(*arrays):
    *rows, g, state = arrays
    options = {"segment_ids": call.segment_ids, "implementation": implementation}
    options |= {"normalize": True} if normalize else {}
    return getattr(ops, op)(*rows, g=g, state=state, **options)

  (y, last), pull = jax.vjp(run, *call.rows, call.state)
  return named(op, y, last, pull(call.cotangents))


def named(op: str, y, last, gradients) -> dict:
  """Results by name, without those that there are none of."""
  names = ("y", "S_T", *(f"d{row}" for row in ROWS[op]), "dS_0")
  results = zip(names, (y, last, *gradients), strict=True)
  return {name: x for name, x in results if x is not None}


def by_xla_and_exactly(op: str, call: Call) -> tuple[dict, dict]:
  """The same in the matmul form, and by the definition in float64."""
  by_xla = by_op(call, op=op, implementation="xla")
  with jax.enable_x64(True):
    floats = call._replace(segment_ids=None)
    floats = jax.tree.map(lambda x: np.asarray(x, np.float64), floats)
    call = floats._replace(segment_ids=call.segment_ids)
    return by_xla, jax.tree.map(np.asarray, by_op(call, op=op, implementation="reference"))


@functools.cache
def known(op: str, name: str, dtype) -> tuple[Call, dict, dict]:
  """A case, and its results in the matmul form and by the definition: for the kernels of both
  chips."""
  call = call_of(op, CASES[op][name], dtype)
  return call, *by_xla_and_exactly(op, call)


# Every kind of decay in both dtypes, packed and not. One a head reaches kernels as one a token.
@pytest.mark.parametrize("chip", ["tpu", "gpu"])
@pytest.mark.parametrize(
  ("op", "name", "dtype"),
  [
    ("linear_attention", "one_chunk", jnp.bfloat16),
    ("linear_attention", "above_a_chunk", jnp.bfloat16),
    ("linear_attention", "more_queries", jnp.bfloat16),
    ("linear_attention", "vector", jnp.bfloat16),
    ("linear_attention", "two_tokens", np.float32),
    ("linear_attention", "scalar", np.float32),
    ("linear_attention", "shared_keys", np.float32),
    ("delta_rule", "many_documents", jnp.bfloat16),
    ("delta_rule", "scalar", jnp.bfloat16),
    ("delta_rule", "above_a_chunk", jnp.bfloat16),
    ("delta_rule", "repeated_keys", jnp.bfloat16),
    ("delta_rule", "vector", np.float32),
    ("delta_rule", "shared_keys", np.float32),
    ("delta_rule", "repeated_keys", np.float32),
  ],
)  # fmt: skip
def test_definition(op, name, dtype, chip, no_worse):
  """In interpret mode the kernels are as near to the definition in float64 as the matmul form is,
  within a factor of two."""
  call, by_xla, exact = known(op, name, dtype)
  found = by_kernels(op, chip, call)
  assert found.keys() == exact.keys()
  options = {"segment_ids": call.segment_ids, "operands": dtype}
  no_worse(found, by_xla, exact, f"{name} on {chip}", **options)


def test_chunks_as_long_as_chosen(no_worse):
  """The delta rule with vector decay in the chunks that models get, whose pairs meet at sizes that
  small blocks do not have."""
  call, by_xla, exact = known("delta_rule", "vector", np.float32)
  chosen = delta_rule_blocks.choose_blocks(130, 2, 1, 8, 12, np.float32, "channel")
  blocks = dataclasses.replace(chosen, heads=1, tiles=1)
  assert blocks.chunk == 64
  found = by_kernels("delta_rule", "tpu", call, blocks=blocks)
  no_worse(found, by_xla, exact, "vector", segment_ids=call.segment_ids, operands=np.float32)


@functools.cache
def extremes(op: str, decay: str) -> tuple[Call, dict, dict]:
  """Rows with decay from none to all in one token, write strengths from 0 to 2, and values of any
  size; results as of `known`."""
  random, shape = np.random.default_rng(0), (8, 64, 1, 8)
  q, k, v, dy = (random.normal(size=shape) for _ in range(4))
  state, dstate = (random.normal(size=(8, 1, 8, 8)) for _ in range(2))
  g, beta, size = np.full(shape, -0.1), np.ones(shape[:3]), np.ones((8, 1, 1, 1))
  g[:, 20] = -1e4  # between tokens that decay little
  g[:3] = np.array([0, -80, -1e4])[:, None, None, None]
  g[3] = random.choice([0, -0.1, -80, -1e4], size=shape[1:])
  beta[0] = beta[3] = 2
  beta[5] = 0
  size[6], size[7] = 1e15, 1e-15
  arrays = {
    "q": q,
    "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
    "v": v * size,
    "beta": beta,
    "g": g if decay == "vector" else g[..., 0],
  }
  rows = tuple(np.float32(arrays[name]) for name in ROWS[op])
  cotangents = np.float32(dy / size), np.float32(dstate / size)
  call = Call(rows, np.float32(state * size), cotangents)
  return call, *by_xla_and_exactly(op, call)


@pytest.mark.parametrize("chip", ["tpu", "gpu"])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("op", OPS)
def test_extremes(op, decay, chip, no_worse):
  """Finite, and right in every row."""
  call, *expected = extremes(op, decay)
  results = by_kernels(op, chip, call), *expected
  assert all(np.isfinite(x).all() for x in results[0].values())
  # What is smaller counts as 0: tensor cores take float32 as three bfloat16, of which the last, 16
  # digits further down, is not normal there.
  least = np.finfo(np.float32).tiny * 2**16
  results = [{n: np.where(np.abs(x) < least, 0, x) for n, x in y.items()} for y in results]
  # Gradients of decays that leave nothing are 0, and what is computed is of the others' rounding.
  no_worse(*({"dg": x["dg"]} for x in results), "all rows")
  for row in range(len(call.state)):
    of_row = ({n: x[row : row + 1] for n, x in of_all.items() if n != "dg"} for of_all in results)
    no_worse(*of_row, f"row {row}")


@pytest.mark.parametrize("op", OPS)
def test_tail_is_not_read(op):
  """What memory of a TPU holds beyond the length changes nothing: NaN there or zeros, bit for
  bit."""
  case = dataclasses.replace(CASES[op]["above_a_chunk"], batch=1, decay="vector")
  call = call_of(op, case, np.float32)
  assert case.length % small_blocks(op, "tpu", call).tokens
  zeros = pltpu.InterpretParams(uninitialized_memory="zero")
  found = by_kernels(op, "tpu", call, interpret=STRICT)
  jax.tree.map(np.testing.assert_array_equal, found, by_kernels(op, "tpu", call, interpret=zeros))
  assert all(np.isfinite(x).all() for x in found.values())


def test_parts_of_a_group(close, rounding):
  """Heads that share keys a part at a time are all of them at once."""
  case = dataclasses.replace(CASES["linear_attention"]["shared_keys"], decay="scalar")
  call = call_of("linear_attention", case, np.float32)
  cuts = (linear_attention_blocks.Blocks(chunk=32, chunks=1, heads=heads) for heads in (1, 2))
  apart, together = (by_kernels("linear_attention", "tpu", call, blocks=cut) for cut in cuts)
  close(apart, together, tolerance=rounding(jnp.float32, 4))


@pytest.mark.parametrize(
  ("op", "normalize"),
  [("linear_attention", False), ("linear_attention", True), ("delta_rule", False)],
)
def test_op_on_a_mesh(op, normalize, close, rounding):
  """The op by its kernels, with batch and heads cut over 8 devices, is the op in the matmul form on
  one."""
  segments = (((3, 5), (0, 2), (4, 33)), ((1, 40),))
  case = dataclasses.replace(CASES[op]["scalar"], length=40, segments=segments)
  twice = lambda x: np.concatenate([x, x])  # noqa: E731 — 4 rows, for 4 devices
  call = jax.tree.map(twice, call_of(op, case, np.float32))
  if normalize:  # weights above zero, and a column of the state for their sum
    more = lambda x: np.concatenate([x, np.abs(x[..., :1])], -1)  # noqa: E731
    q, k, *rest = call.rows
    rows = (np.abs(q) + 1, np.abs(k) + 1, *rest)
    dy, dstate = call.cotangents
    call = Call(rows, more(call.state), (dy, more(dstate)), call.segment_ids)
  run = functools.partial(by_op, op=op, normalize=normalize)
  expected = run(call, implementation="xla")
  mesh = sharding.make_mesh(data=4, tensor=2)

  def place(x):
    of_rows, of_states = ("batch", None, "heads", None), ("batch", "heads", None, None)
    axes = (of_rows if x.shape[1] == case.length else of_states)[: x.ndim]
    return jax.device_put(x, sharding.named_sharding(axes, x.shape, mesh))

  with pltpu.force_tpu_interpret_mode(STRICT), jax.set_mesh(mesh):
    found = run(jax.tree.map(place, call), implementation="tpu")
  sums = case.length + case.key_dim + case.value_dim
  close(found, expected, tolerance=rounding(jnp.float32, sums))
  assert found["y"].sharding.spec[:3] == ("data", None, "tensor")


def gradients(op: str, length: int, implementation=None):
  """(program, its arguments): the gradients of q, k and v."""
  q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
  beta = [jax.ShapeDtypeStruct((1, length, 2), jnp.float32)] * (op == "delta_rule")

  def loss(*arrays):
    return getattr(ops, op)(*arrays, implementation=implementation)[0].sum()

  return jax.grad(loss, argnums=(0, 1, 2)), (q, q, q, *beta)


@pytest.mark.parametrize(("platform", "holds"), [("tpu", True), ("cpu", False), ("cuda", False)])
@pytest.mark.parametrize("op", OPS)
def test_chosen_when_lowered(op, platform, holds):
  """implementation=None gives the kernels to programs lowered for TPU and to no others."""
  program, arguments = gradients(op, 64)
  text = jax.jit(program).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
  assert (f"{op}_forward" in text) == holds
  assert (f"{op}_backward" in text) == holds


@pytest.mark.parametrize("op", OPS)
def test_few_tokens(op):
  """A call of few tokens, as in decoding, is left to the matmul form unless the kernel is demanded
  by name."""

  def lowered(implementation):
    program, arguments = gradients(op, 1, implementation)
    return jax.jit(program).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()

  assert f"{op}_forward" not in lowered(None)
  assert f"{op}_forward" in lowered("tpu")
  program, arguments = gradients(op, 1)
  lines = ops.explain_implementation(program, *arguments)
  assert any("tpu: length 1 is below 64, one chunk of matmuls" in line for line in lines)
