"""The TPU kernels of the delta rule: their values in interpret mode, the inverse inside them, and
what the compilers of absent chips make of them."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmix import ops, sharding
from pallas_kernels.delta_rule import blocks, cases, reference, tpu
from pallas_kernels.delta_rule.tiles_tpu import unit_lower_inverses

# The op gives its kernels one decay a token at least.
CASES = [case for case in cases.CASES if case.decay != "constant"]
NAMED = {case.name: case for case in CASES}
# Reads outside an array raise, and memory that nothing has written yet is NaN.
INTERPRET = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
NAMES = ("dq", "dk", "dv", "dbeta", "dg", "dS_0")


def blocks_of(case) -> blocks.Blocks:
  """Several blocks and chunks even in small cases; two chunks a tile and two tiles where one case
  of each kind needs them."""
  group = case.heads // (case.key_heads or case.heads)
  if case.name in ("scalar", "shared_keys"):
    return blocks.Blocks(chunk=16, tile=32, tiles=2, heads=group)
  return blocks.Blocks(chunk=16, tile=16, tiles=1, heads=group)


@functools.partial(jax.jit, static_argnames=("scale", "blocks", "interpret"))
def by_kernel(rows, state, cotangents, documents, *, scale, blocks, interpret=INTERPRET):
  """y, S_T, and the gradients of q, k, v, beta, g and S_0, by the kernels themselves."""
  options = {"scale": scale, "blocks": blocks, "interpret": interpret}
  v = rows[2]
  y, state, saved = tpu.forward(*rows, state, documents, dtype=v.dtype, save=True, **options)
  gradients = tpu.backward(*rows, saved, documents, *cotangents, **options)
  return name_all(y, state, gradients)


@jax.jit
def by_xla(rows, state, cotangents, segment_ids):
  """The same by the op in the form of matrix products."""

  def run(q, k, v, beta, g, state):
    ids = {"segment_ids": segment_ids, "implementation": "xla"}
    return ops.delta_rule(q, k, v, beta, g=g, state=state, **ids)

  (y, after), pull = jax.vjp(run, *rows, state)
  return name_all(y, after, pull(cotangents))


@jax.jit
def by_definition(rows, state, cotangents, segment_ids):
  """The same token by token."""
  ids = jnp.ones(rows[0].shape[:2], jnp.int32) if segment_ids is None else segment_ids
  scale = rows[0].shape[-1] ** -0.5
  run = functools.partial(reference.delta_rule, segment_ids=ids, scale=scale)
  (y, after), pull = jax.vjp(run, *rows, state)
  return name_all(y, after, pull(cotangents))


def name_all(y, state, gradients):
  named = dict(zip(NAMES, gradients, strict=True))
  return {"y": y, "S_T": state, **{name: x for name, x in named.items() if x is not None}}


def inputs_of(case, dtype):
  """q, k, v, beta, g with zeros at padding, as the op gives them to its kernels; S_0; cotangents of
  y and S_T."""
  arrays, weights, ids = case.inputs(), case.inputs(seed=1), case.segment_ids()

  def row(x, dtype=np.float32):
    live = np.ones(x.shape[:2], bool) if ids is None else ids != 0
    return np.asarray(x * live.reshape(*live.shape, *(1,) * (x.ndim - 2)), dtype)

  g = arrays.get("g")
  rows = (*(row(arrays[name], dtype) for name in "qkv"), row(arrays["beta"]))
  cotangents = row(weights["v"], dtype), weights["state"].astype(np.float32)
  return (*rows, None if g is None else row(g)), arrays["state"].astype(np.float32), cotangents


def documents_of(case):
  ids = case.segment_ids()
  return None if ids is None else np.asarray(ops.document_indices(ids))


@pytest.fixture
def as_good_as_xla(errors, rounding):
  """Asserts that arrays are as near to the definition in float64 as the matmul form is, within a
  factor of two.

  Where decay is so strong that the gradient of g is next to nothing, it is held to the rounding of
  the terms whose difference it is: q * dq and k * dk, summed over the rest of the chunk.
  """

  def check(found, inputs, segment_ids, what, *, strong=False):
    xla = by_xla(*inputs, segment_ids)
    assert {name: x.dtype for name, x in found.items()} == {n: x.dtype for n, x in xla.items()}
    with jax.enable_x64(True):
      double = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
      exact = by_definition(*double, segment_ids)
    if strong:
      q, k = inputs[0][:2]
      terms = (np.abs(x * dx).sum(-1).max() for x, dx in ((q, exact["dq"]), (k, exact["dk"])))
      error = np.abs(found.pop("dg") - exact["dg"]).max()
      allowed = rounding(np.float32, 16 * q.shape[-1]) * sum(terms)
      assert error <= allowed, f"{what}, dg: error {error:.1e}, allowed {allowed:.1e}"
    for name in found:
      expected, live = exact[name], 1
      if segment_ids is not None and expected.shape[:2] == segment_ids.shape:
        live = (segment_ids != 0).reshape(*segment_ids.shape, *(1,) * (expected.ndim - 2))
      # What stands at padding is the op's to clear.
      *of_kernel, worst = errors(np.asarray(found[name], np.float64) * live, expected * live)
      of_xla = errors(np.asarray(xla[name], np.float64) * live, expected * live)[:2]
      # One unit in the last place; of a float32 result of bfloat16 products, as much as rounding
      # one operand changes it.
      dtype, of_inputs = found[name].dtype, inputs[0][0].dtype
      unit = rounding(dtype, 2) if dtype == of_inputs else rounding(of_inputs, 1)
      for kernel_error, xla_error in zip(of_kernel, of_xla, strict=True):
        assert kernel_error <= 2 * xla_error + unit, (
          f"{what}, {name}: error {kernel_error:.1e}, xla {xla_error:.1e}, worst at {worst}"
        )

  return check


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_definition(case, dtype, as_good_as_xla):
  """In interpret mode the kernels are as near to the definition as the matmul form is."""
  inputs = inputs_of(case, dtype)
  scale, cut = case.key_dim**-0.5, blocks_of(case)
  found = by_kernel(*inputs, documents_of(case), scale=scale, blocks=cut)
  as_good_as_xla(found, inputs, case.segment_ids(), case.name)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_extremes(decay, as_good_as_xla):
  """Decay from none to all in one token, write strengths from 0 to 2, values of any size: finite,
  and right."""
  shape = (1, 40, 1, 8)
  random = np.random.default_rng(0)
  q, k, v, dy = (random.normal(size=shape) for _ in range(4))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  state, dstate = (random.normal(size=(1, 1, 8, 8)) for _ in range(2))
  once = np.full(shape, -0.1)
  once[:, 20] = -1e4
  mixed = random.choice([0.0, -0.1, -80.0, -1e4], size=shape)
  for name, g, beta, size in (
    ("no decay", 0.0, 2.0, 1.0),
    ("-80", -80.0, 1.0, 1.0),
    ("-1e4", -1e4, 1.0, 1.0),
    ("once", once, 1.0, 1.0),
    ("mixed", mixed, 2.0, 1.0),
    ("nothing written", once, 0.0, 1.0),
    ("huge", once, 1.0, 1e15),
    ("tiny", once, 1.0, 1e-15),
  ):
    g = np.broadcast_to(g, shape)[..., : 8 if decay == "vector" else 1]
    g = g if decay == "vector" else g[..., 0]
    rows = (q, k, v * size, np.full(shape[:3], beta), g)
    inputs = jax.tree.map(np.float32, (rows, state * size, (dy / size, dstate / size)))
    cut = blocks.Blocks(chunk=16, tile=16, tiles=1, heads=1)
    found = by_kernel(*inputs, None, scale=8**-0.5, blocks=cut)
    assert all(np.isfinite(x).all() for x in found.values()), name
    as_good_as_xla(found, inputs, None, name, strong=name in ("-80", "-1e4"))


@pytest.mark.parametrize("exact", [True, False], ids=["float32", "three passes"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_repeated_keys(size, exact):
  """The inverse keeps its digits where all keys of a chunk are one, and powers of the matrix would
  overflow."""

  def run(matrix):
    task = unit_lower_inverses(matrix, exact=exact)
    while True:
      try:
        next(task)
      except StopIteration as end:
        return end.value

  invert = jax.jit(run)
  lower = np.tril(np.ones((size, size)), -1)
  row, column = np.indices((size, size))
  beside = max(128 // size, 1)
  for beta in (1.0, 2.0):
    # An error made in one row is multiplied by 1 - beta in the next: it stays, when beta is 2.
    allowed = (5e-7 if exact else 1e-5) * (10 if beta == 2 else 1)
    for g in (0.0, -0.1):
      matrix = (beta * lower * np.exp(g * (row - column) * lower)).astype(np.float32)
      expected = np.linalg.inv(np.eye(size) + matrix.astype(np.float64))
      found = np.asarray(invert(np.concatenate([matrix] * beside, axis=1)), np.float64)
      for part in np.split(found, beside, axis=1):
        error = np.abs(part - expected).max() / np.abs(expected).max()
        assert error <= allowed, f"beta={beta}, g={g}: {error:.1e}"


def test_tail_is_not_read():
  """What memory holds beyond the length changes nothing: NaN there or zeros, bit for bit."""
  case = NAMED["above_a_chunk"]
  cut, scale = blocks_of(case), case.key_dim**-0.5
  assert case.length % cut.tokens
  zeros = pltpu.InterpretParams(uninitialized_memory="zero")
  run = functools.partial(by_kernel, *inputs_of(case, np.float32), None, scale=scale, blocks=cut)
  jax.tree.map(np.testing.assert_array_equal, run(), run(interpret=zeros))
  assert all(np.isfinite(x).all() for x in run().values())


def test_op_on_a_mesh(errors, rounding):
  """The op by its kernels, with batch and heads cut over 8 devices, is the op in the matmul form on
  one."""
  batch, length, heads, dim = 4, 40, 2, 8
  random = np.random.default_rng(0)
  rows = [random.normal(size=(batch, length, heads, dim)).astype(np.float32) for _ in range(4)]
  q, k, v, dy = rows
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  beta, g = (random.uniform(size=(batch, length, heads)).astype(np.float32) for _ in range(2))

  def run(implementation, *arrays):
    def loss(q, k, v, beta, g):
      return (ops.delta_rule(q, k, v, beta, g=-g, implementation=implementation)[0] * dy).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*arrays)

  arrays = (q, k, v, beta, g)
  expected = jax.jit(functools.partial(run, "xla"))(*arrays)
  mesh = sharding.make_mesh(data=4, tensor=2)
  with pltpu.force_tpu_interpret_mode(INTERPRET), jax.set_mesh(mesh):
    axes = ("batch", None, "heads", None)
    placed = (
      jax.device_put(x, sharding.named_sharding(axes[: x.ndim], x.shape, mesh)) for x in arrays
    )
    found = jax.jit(functools.partial(run, "tpu"))(*placed)
  for name, x, y in zip(NAMES, found, expected, strict=False):
    rms, largest, worst = errors(x, y)
    assert max(rms, largest) <= rounding(jnp.float32, length + dim), f"{name}: {rms} at {worst}"
  assert found[0].sharding.spec[:3] == ("data", None, "tensor")


@pytest.mark.parametrize(("platform", "holds"), [("tpu", True), ("cpu", False)])
def test_chosen_when_lowered(platform, holds):
  """implementation=None gives the kernels to programs lowered for TPU and to no others."""
  q = jax.ShapeDtypeStruct((1, 64, 1, 8), jnp.float32)
  beta = jax.ShapeDtypeStruct((1, 64, 1), jnp.float32)

  def loss(q, beta):
    return ops.delta_rule(q, q, q, beta, g=-beta)[0].sum()

  traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(q, beta)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("delta_rule_forward" in text) == holds
  assert ("delta_rule_backward" in text) == holds


def test_refusals():
  """A kernel that cannot run says why, and what can."""

  def refused(queries=2, keys=2, values=2, dim=8, dtype=jnp.float32):
    q, k, v = (
      jax.ShapeDtypeStruct((1, 128, heads, dim), dtype) for heads in (queries, keys, values)
    )
    beta = jax.ShapeDtypeStruct((1, 128, max(keys, values)), jnp.float32)
    return tpu.refusal(q, k, v, beta, None)

  assert refused() is None
  assert refused(dtype=jnp.float16) == (
    "q, k, v are float16, float16, float16, expected all float32 or all bfloat16"
  )
  assert refused(queries=4) == "q has 4 heads and there are 2 states, expected at most as many"
  needed = blocks.vmem_bytes(blocks.Blocks(64, 128, 1, 1), 2048, 2048, jnp.float32, None)
  assert needed > 6 * 2048 * 2048 * 4  # a state, those within a block, and their cotangents
  assert refused(dim=2048) == (
    f"a head with key_dim=2048, value_dim=2048 in float32 need {needed:,} bytes of VMEM and "
    "14,680,064 are available; a head of 384 x 384 fits"
  )
  text = refused(queries=1, keys=1, values=32, dim=128)
  assert re.fullmatch(
    r"32 heads that share rows with key_dim=128, value_dim=128 in float32 need [\d,]+ bytes of "
    r"VMEM and 14,680,064 are available; \d heads may share",
    text,
  )


@pytest.mark.parametrize("length", [1, 63, 200, 100_000])
@pytest.mark.parametrize(
  ("size", "groups"), [(4, (1, 3)), (64, (1, 3)), (128, (1, 2)), (256, (1,))]
)
def test_blocks(length, size, groups):
  """Blocks divide the heads into whole groups, and fit the smallest chip."""
  for dtype in (jnp.float32, jnp.bfloat16):
    for decay in (None, "row", "channel"):
      for group in groups:
        chosen = blocks.choose_blocks(length, 6, group, size, size, dtype, decay)
        assert 6 % chosen.heads == 0 and chosen.heads % group == 0
        assert chosen.tokens < length + 128
        needed = blocks.vmem_bytes(chosen, size, size, dtype, decay)
        assert needed <= blocks.SMALLEST_VMEM


# Runs in a process of its own: libtpu reads its settings once, before jax is imported.
PROGRAM = """
import functools, json, re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels.delta_rule import tpu

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2",
         "tpu7x": "tpu7x:2x2x1"}
CASES = {
  "train": ((1, 128, 1, 1, 128, 128), "bfloat16", "row", False),
  "odd": ((2, 72, 1, 2, 24, 20), "float32", None, True),
  "channel": ((1, 128, 1, 1, 128, 128), "bfloat16", "channel", False),
}

def both(q, k, v, beta, g, documents):
  y, state, saved = tpu.forward(
    q, k, v, beta, g, None, documents, scale=1.0, dtype=v.dtype, save=True)
  return tpu.backward(q, k, v, beta, g, saved, documents, y, state, scale=1.0)

for chip, topology in CHIPS.items():
  mesh = Mesh(topologies.get_topology_desc(topology, platform="tpu").devices[:1], ("x",))
  place = NamedSharding(mesh, PartitionSpec())
  for name, ((B, T, L, H, K, V), dtype, decay, packed) in CASES.items():
    if name == "odd" and chip != "v4" or name == "channel" and chip not in ("v4", "v6e"):
      continue  # the others lower alike
    shaped = lambda shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    q, v, beta = shaped((B, T, L, K)), shaped((B, T, H, V)), shaped((B, T, H), "float32")
    g = {None: None, "row": beta, "channel": shaped((B, T, H, K), "float32")}[decay]
    ids = shaped((B, T), "int32") if packed else None
    with jax.set_mesh(mesh):
      program = jax.jit(both).lower(q, q, v, beta, g, ids).compile()
    calls = [line for line in program.as_text().splitlines() if "tpu_custom_call" in line]
    kernels = re.findall("delta_rule_(?:forward|backward)", " ".join(
      line.split(" = ")[0] for line in calls))
    print("RESULT", json.dumps([chip, name, kernels]), flush=True)
"""


@pytest.fixture(scope="module")
def compiled(repository) -> dict:
  """(chip, case) -> names of the kernels in the program."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install 'jaxmix[tpu]' to compile for TPUs from here")
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environment |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "PYTHONPATH": str(repository),
  }
  command = [sys.executable, "-c", PROGRAM]
  run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert run.returncode == 0, run.stderr[-4000:]
  found = map(json.loads, re.findall("^RESULT (.*)$", run.stdout, re.MULTILINE))
  return {(chip, name): kernels for chip, name, kernels in found}


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_ahead(compiled, chip):
  """One kernel a direction, by name, for training shapes, odd ones, and decay of channels."""
  names = [name for of_chip, name in compiled if of_chip == chip]
  assert "train" in names
  for name in names:
    assert sorted(compiled[chip, name]) == ["delta_rule_backward", "delta_rule_forward"], name
