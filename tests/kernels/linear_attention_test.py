"""The TPU kernels of linear attention: their values in interpret mode, where programs hold them,
and what the compilers of absent chips make of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmix import ops, sharding
from pallas_kernels.linear_attention import blocks, cases, tpu
from pallas_kernels.linear_attention.cases import Case

# The op gives its kernels one decay a token at least.
CASES = [case for case in cases.CASES if case.decay != "constant"]
NAMED = {case.name: case for case in CASES}
# Reads outside an array raise, and memory that nothing has written yet is NaN.
STRICT = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
RESULTS = ("y", "S_T", "dq", "dk", "dv", "dg", "dS_0")


def small_blocks(case) -> blocks.Blocks:
  """Several blocks and chunks even in small cases; of heads that share others, a part at a time
  where that can be."""
  together = (case.query_heads or case.heads) // case.heads
  return blocks.Blocks(chunk=32, chunks=2, heads=max(together, 1))


@functools.partial(jax.jit, static_argnames=("scale", "cut", "interpret"))
def by_kernel(arrays, cotangents, documents, *, scale, cut, interpret=True):
  """y, S_T, and the gradients with respect to q, k, v, g and S_0, by the kernels themselves."""
  *rows, state = arrays
  options = {"scale": scale, "blocks": cut, "interpret": interpret}
  y, state, starts = tpu.forward(*rows, state, documents, dtype=rows[0].dtype, save=True, **options)
  gradients = tpu.backward(*rows, starts, documents, *cotangents, **options)
  return dict(zip(RESULTS, (y, state, *gradients), strict=True))


@functools.partial(jax.jit, static_argnames=("implementation", "normalize"))
def by_op(arrays, cotangents, segment_ids, *, implementation, normalize=False):
  """The same by the op."""

  def run(q, k, v, g, state):
    options = {"implementation": implementation, "normalize": normalize}
    return ops.linear_attention(q, k, v, g=g, state=state, segment_ids=segment_ids, **options)

  (y, state), pull = jax.vjp(run, *arrays)
  return dict(zip(RESULTS, (y, state, *pull(cotangents)), strict=True))


def inputs_of(case, dtype):
  """q, k, v, g, S_0 with zeros at padding, as the op gives them to its kernels; cotangents of y and
  S_T."""
  arrays, random = case.inputs(), np.random.default_rng(1)
  weights = {name: random.normal(size=shape) for name, shape in case.outputs().items()}
  ids, g = case.segment_ids(), arrays.get("g")
  live = np.ones((case.batch, case.length), bool) if ids is None else ids != 0
  rows = (np.asarray(arrays[name] * live[..., None, None], dtype) for name in "qkv")
  if g is not None:
    g = g * live.reshape(*live.shape, *(1,) * (g.ndim - 2))
  arrays = (*rows, None if g is None else np.float32(g), np.float32(arrays["state"]))
  dy = np.asarray(weights["y"] * live[..., None, None], dtype)
  return arrays, (dy, np.float32(weights["state"]))


def documents_of(case):
  ids = case.segment_ids()
  return None if ids is None else np.asarray(ops.document_indices(ids))


def in_double(arrays, cotangents, segment_ids):
  """By the definition, in float64."""
  with jax.enable_x64(True):
    double = jax.tree.map(lambda x: x.astype(np.float64), (arrays, cotangents))
    return by_op(*double, segment_ids, implementation="reference")


def check_errors(name, found, by_xla, exact, errors, rounding):
  """The kernel's errors are at most twice those of the matmul form, and a unit in the last
  place."""
  of_kernel, of_xla = errors(found, exact), errors(by_xla, exact)
  one_ulp = rounding(by_xla.dtype, 2)
  for kernel, xla, kind in zip(of_kernel[:2], of_xla[:2], ("RMS", "largest"), strict=True):
    assert kernel <= 2 * xla + one_ulp, (
      f"{name}: {kind} error {kernel:.1e}, xla {xla:.1e}, worst at {of_kernel[2]}"
    )


BFLOAT16 = ("two_tokens", "many_documents", "scalar", "vector", "shared_keys", "more_queries")


@pytest.mark.parametrize(
  ("case", "dtype"),
  [
    *(pytest.param(case, np.float32, id=f"{case.name}-float32") for case in CASES),
    *(pytest.param(NAMED[name], jnp.bfloat16, id=f"{name}-bfloat16") for name in BFLOAT16),
  ],
)
def test_definition(case, dtype, errors, rounding):
  """In interpret mode the kernels are as near to the definition in float64 as the matmul form is,
  within a factor of two."""
  arrays, cotangents = inputs_of(case, dtype)
  ids = case.segment_ids()
  scale, cut = case.key_dim**-0.5, small_blocks(case)
  found = by_kernel(arrays, cotangents, documents_of(case), scale=scale, cut=cut)
  by_xla = by_op(arrays, cotangents, ids, implementation="xla")
  exact = in_double(arrays, cotangents, ids)
  for name, expected in exact.items():
    if expected is None:
      assert found[name] is None
      continue
    assert found[name].dtype == by_xla[name].dtype
    value = np.asarray(found[name], np.float64)
    if ids is not None and expected.shape[:2] == ids.shape:
      live = (ids != 0).reshape(*ids.shape, *(1,) * (expected.ndim - 2))
      value = value * live  # what stands at padding is the op's to clear
    check_errors(f"{case.name}, {name}", value, by_xla[name], expected, errors, rounding)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_extreme_decays(decay, dtype, errors, rounding):
  """No decay, decays that clear the state, and one that does between tokens that decay little:
  finite, and right in every row."""
  case = Case("extreme", 4, 70, 1, 8, 8, decay=decay)
  (q, k, v, g, state), cotangents = inputs_of(case, dtype)
  g = np.zeros_like(g)
  g[1], g[2], g[3] = -80, -1e4, -0.1
  g[3, 30:50:7] = -1e4
  arrays = q, k, v, g, state
  scale, cut = case.key_dim**-0.5, small_blocks(case)
  found = by_kernel(arrays, cotangents, None, scale=scale, cut=cut)
  by_xla = by_op(arrays, cotangents, None, implementation="xla")
  for name, expected in in_double(arrays, cotangents, None).items():
    assert np.isfinite(np.asarray(found[name], np.float32)).all(), name
    # Gradients of decays that leave nothing are 0, and what is computed is of the others' rounding.
    rows = [slice(None)] if name == "dg" else [slice(b, b + 1) for b in range(case.batch)]
    for row in rows:
      of_row = (x[name][row] for x in (found, by_xla))
      check_errors(f"{name} of row {row}", *of_row, expected[row], errors, rounding)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_tail_is_not_read(decay):
  """What memory holds beyond the length changes nothing: NaN there or zeros, bit for bit."""
  case = dataclasses.replace(NAMED["above_a_chunk"], batch=1, decay=decay)
  cut = blocks.Blocks(chunk=32, chunks=1, heads=1)
  assert case.length % cut.tokens
  arrays, cotangents = inputs_of(case, np.float32)
  zeros = pltpu.InterpretParams(uninitialized_memory="zero")
  run = functools.partial(by_kernel, arrays, cotangents, None, scale=0.5, cut=cut)
  found = run(interpret=STRICT)
  jax.tree.map(np.testing.assert_array_equal, found, run(interpret=zeros))
  assert all(np.isfinite(x).all() for x in found.values())


def test_parts_of_a_group(errors, rounding):
  """Heads that share keys a part at a time are all of them at once."""
  case = dataclasses.replace(NAMED["shared_keys"], decay="scalar")
  arrays, cotangents = inputs_of(case, np.float32)
  run = functools.partial(by_kernel, arrays, cotangents, None, scale=0.5)
  apart, together = (run(cut=blocks.Blocks(chunk=32, chunks=1, heads=heads)) for heads in (1, 2))
  for name, value in together.items():
    rms, largest, worst = errors(apart[name], value)
    assert max(rms, largest) <= rounding(jnp.float32, 4), f"{name}: {rms}, {largest} at {worst}"


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_op_on_a_mesh(normalize, errors, rounding):
  """The op by its kernels, with batch and heads cut over 8 devices, is the op in the matmul form on
  one."""
  case = NAMED["scalar"]
  twice = lambda x: np.concatenate([x, x])  # noqa: E731 — 4 rows, for 4 devices
  arrays, cotangents = jax.tree.map(twice, inputs_of(case, np.float32))
  if normalize:  # weights above zero, and a column of the state for their sum
    more = lambda x: np.concatenate([x, np.abs(x[..., :1])], -1)  # noqa: E731
    q, k, v, g, state = arrays
    arrays = (np.abs(q) + 1, np.abs(k) + 1, v, g, more(state))
    cotangents = (cotangents[0], more(cotangents[1]))
  ids = twice(case.segment_ids())
  expected = by_op(arrays, cotangents, ids, implementation="xla", normalize=normalize)
  mesh = sharding.make_mesh(data=4, tensor=2)
  with pltpu.force_tpu_interpret_mode(STRICT), jax.set_mesh(mesh):
    place = lambda x: jax.device_put(  # noqa: E731
      x, sharding.named_sharding(axes_of(x, case.length), x.shape, mesh)
    )
    arrays, cotangents = jax.tree.map(place, (arrays, cotangents))
    found = by_op(arrays, cotangents, ids, implementation="tpu", normalize=normalize)
  sums = case.length + case.key_dim + case.value_dim
  for name, value in expected.items():
    rms, largest, worst = errors(found[name], value)
    assert max(rms, largest) <= rounding(jnp.float32, sums), f"{name}: {rms}, {largest} at {worst}"
  assert found["y"].sharding.spec[:3] == ("data", None, "tensor")


def axes_of(x, length: int) -> tuple:
  """Logical axes of rows or of states."""
  axes = ("batch", None, "heads", None) if x.shape[1] == length else ("batch", "heads", None, None)
  return axes[: x.ndim]


def test_refusals():
  """A kernel that cannot run says why, and what can."""

  def refusal(heads, size, dtype):
    q, k, v = (jax.ShapeDtypeStruct((1, 128, h, size), dtype) for h in heads)
    return tpu.refusal(q, k, v, None)

  sizes = blocks.Sizes(128, (2, 2, 2), 4096, 4096, "float32", None)
  needed = blocks.vmem_bytes(blocks.Blocks(16, 1, 1), sizes)
  assert needed > 3 * 4096 * 4096 * 4  # a state and its cotangents
  assert refusal((2, 2, 2), 4096, jnp.float32) == (
    f"key_dim=4096, value_dim=4096 in float32 need {needed:,} bytes of VMEM and 12,582,912 are "
    "available; heads of 512 x 512 fit"
  )
  sizes = blocks.Sizes(128, (512, 1, 1), 128, 128, "float32", None)
  needed = blocks.vmem_bytes(blocks.Blocks(16, 1, 512), sizes)
  assert refusal((512, 1, 1), 128, jnp.float32) == (
    f"key_dim=128, value_dim=128 in float32 with 512 heads that share one need {needed:,} bytes of "
    "VMEM and 12,582,912 are available; let fewer share one"
  )
  assert refusal((2, 2, 2), 8, jnp.float16) == (
    "q, k, v are float16, float16, float16, expected all float32 or all bfloat16"
  )
  assert refusal((2, 2, 2), 512, jnp.float32) is None
  assert refusal((1, 1, 24), 128, jnp.bfloat16) is None


@pytest.mark.parametrize("length", [1, 2, 63, 200, 513, 100_000])
@pytest.mark.parametrize("size", [4, 64, 128, 256, 512])
def test_blocks(length, size):
  """Blocks hold whole groups of heads or parts of one, no chunk that is not needed, and fit the
  smallest chip."""
  for dtype in ("float32", "bfloat16"):
    for heads in ((6, 6, 6), (6, 2, 2), (2, 2, 6)):
      for decay in (None, "token", "channel"):
        sizes = blocks.Sizes(length, heads, size, size, dtype, decay)
        try:
          chosen = blocks.choose_blocks(sizes)
        except ValueError:
          assert size == 512, "head size 256 fits every chip"
          continue
        assert 6 % chosen.heads == 0 and chosen.chunk % 16 == 0
        assert sizes.heads == 6 or chosen.heads % 3 == 0
        assert chosen.tokens < 2 * length + max(chosen.chunk, 16)
        assert blocks.vmem_bytes(chosen, sizes) <= blocks.SMALLEST_VMEM


@pytest.mark.parametrize(("platform", "holds"), [("tpu", True), ("cpu", False), ("cuda", False)])
def test_chosen_when_lowered(platform, holds):
  """implementation=None gives the kernels to programs lowered for TPU and to no others."""
  q = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)

  def loss(q, k, v):
    return ops.linear_attention(q, k, v)[0].sum()

  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, q, q)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("linear_attention_forward" in text) == holds
  assert ("linear_attention_backward" in text) == holds


def test_few_tokens():
  """A call of few tokens, as in decoding, is left to the matmul form unless the kernel is demanded
  by name."""
  q = jax.ShapeDtypeStruct((1, 1, 2, 8), jnp.float32)

  def lowered(implementation):
    program = jax.jit(lambda q: ops.linear_attention(q, q, q, implementation=implementation)[0])
    return program.trace(q).lower(lowering_platforms=("tpu",)).as_text()

  assert "linear_attention_forward" not in lowered(None)
  assert "linear_attention_forward" in lowered("tpu")
  lines = ops.explain_implementation(lambda q: ops.linear_attention(q, q, q)[0], q)
  assert any("tpu: length 1 is below 64, one chunk of matmuls" in line for line in lines)
