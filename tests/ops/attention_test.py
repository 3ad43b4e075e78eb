"""The op attention: jax's form against the definition, and its cache against the row that it stands
for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops
from pallas_kernels.attention.cases import CASES

NAMED = {case.name: case for case in CASES}


def options_of(case) -> dict:
  return {"visibility": "causal" if case.causal else "full", "window": case.window}


@functools.partial(jax.jit, static_argnames=("implementation", "visibility", "window"))
def outputs_and_gradients(arrays, weights, segment_ids, **options):
  """y, and the gradients of its weighted sum with respect to q, k and v."""

  def weighted(arrays):
    y, _ = ops.attention(**arrays, segment_ids=segment_ids, **options)
    return jnp.sum(y * weights), y

  gradients, y = jax.grad(weighted, has_aux=True)(arrays)
  return {"y": y, **gradients}


@functools.partial(jax.jit, static_argnames=("window", "capacity", "scale", "implementation"))
def attend(arrays, state, segment_ids=None, **options):
  return ops.attention(**arrays, state=state, segment_ids=segment_ids, **options)


def weights_of(case) -> np.ndarray:
  return np.random.default_rng(1).normal(size=(case.batch, case.length, case.heads, case.value_dim))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_definition(case, close, rounding):
  """Values and gradients are those of the definition; jax takes its softmax in float32."""
  arrays = case.inputs(), weights_of(case), case.segment_ids()
  with jax.enable_x64(True):
    found = outputs_and_gradients(*arrays, implementation="xla", **options_of(case))
    expected = outputs_and_gradients(*arrays, implementation="reference", **options_of(case))
  close(
    found, expected, tolerance=rounding(jnp.float32, case.length + case.key_dim + case.value_dim)
  )


def test_definition_itself(close, rounding):
  """The definition, against one query after another in numpy."""
  inputs = NAMED["grouped"].inputs()
  ids = np.repeat([[0, 4, 6, 4], [1, 1, 2, 0]], (20, 30, 40, 40), axis=1).astype(np.int32)
  with jax.enable_x64(True):
    y, _ = attend(inputs, None, segment_ids=ids, window=25, scale=0.5, implementation="reference")
  y = np.asarray(y)
  for row, t, head in ((0, 25, 1), (0, 49, 3), (0, 60, 2), (0, 129, 0), (1, 49, 1)):
    start = t
    while start > max(0, t - 24) and ids[row, start - 1] == ids[row, t]:
      start -= 1
    keys, values = (inputs[name][row, start : t + 1, head // 2] for name in "kv")
    weights = np.exp(0.5 * keys @ inputs["q"][row, t, head])
    expected = weights @ values / weights.sum()
    close(y[row, t, head], expected, tolerance=rounding(np.float64, 25 + 8 + 8))
  assert not y[ids == 0].any()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_precision(dtype, errors, rounding):
  """In float32 and bfloat16 the errors against float64 are those of rounding."""
  case = NAMED["packed"]
  inputs = {name: x.astype(dtype) for name, x in case.inputs().items()}
  arrays = inputs, weights_of(case).astype(np.float32), case.segment_ids()
  found = outputs_and_gradients(*arrays, implementation="xla")
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(np.float64), arrays)
    exact = outputs_and_gradients(*wide, implementation="reference")
  # float32: the sums. bfloat16: the roundings of scores, weights, cotangents and results.
  operations = case.length + case.key_dim + case.value_dim if dtype == np.float32 else 4
  for name, leaf in found.items():
    rms, largest, worst = errors(leaf, exact[name])
    assert leaf.dtype == dtype
    assert max(rms, largest) <= rounding(dtype, operations), (
      f"{name}: {rms:.1e}, {largest:.1e} at {worst}"
    )


def in_pieces(inputs, cuts, **options):
  """The row in several calls that hand on the cache."""
  state, outputs = None, []
  for start, end in zip((0, *cuts), (*cuts, inputs["q"].shape[1]), strict=True):
    y, state = attend({name: x[:, start:end] for name, x in inputs.items()}, state, **options)
    outputs.append(y)
  return np.concatenate(outputs, axis=1), state


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("window", [None, 9, 30])
def test_cache(window, implementation, close, rounding):
  """A cache as large as the window is a ring: pieces shorter and longer than it give the row, and
  the same cache."""
  inputs = {name: x[:, :70].astype(np.float32) for name, x in NAMED["grouped"].inputs().items()}
  y, state = attend(
    inputs, None, window=window, capacity=window or 70, implementation=implementation
  )
  assert state["k"].shape == (2, window or 70, 2, 8)
  assert np.all(state["length"] == 70)
  pieces, after = in_pieces(
    inputs,
    (20, 21, 22, 62, 63, 64),
    window=window,
    capacity=window or 70,
    implementation=implementation,
  )
  close(pieces, np.asarray(y), tolerance=rounding(jnp.float32, 70 + 8 + 8))
  for name in ("k", "v", "length"):
    np.testing.assert_array_equal(after[name], state[name])


def test_cache_holds_the_last_document():
  """Of packed rows the cache holds the newest tokens of the last document, in the slots of their
  positions."""
  inputs = {name: x[:, :9].astype(np.float32) for name, x in NAMED["grouped"].inputs().items()}
  ids = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 2, 2, 0]], np.int32)
  _, state = attend(inputs, None, segment_ids=ids, window=4)
  np.testing.assert_array_equal(state["length"], [6, 2])
  np.testing.assert_array_equal(state["k"][0], inputs["k"][0, [7, 8, 5, 6]])  # positions 4, 5, 2, 3
  np.testing.assert_array_equal(state["v"][1], np.r_[inputs["v"][1, 6:8], np.zeros((2, 2, 8))])


def test_cache_overflow(close, rounding):
  """Where a cache without window has no slot left, the output is NaN; up to there it is right."""
  inputs = {name: x[:, :20].astype(np.float32) for name, x in NAMED["grouped"].inputs().items()}
  whole, _ = attend(inputs, None)
  _, state = attend({name: x[:, :5] for name, x in inputs.items()}, None, capacity=12)
  rest, state = attend({name: x[:, 5:] for name, x in inputs.items()}, state)
  rest = np.asarray(rest)
  close(rest[:, :7], np.asarray(whole)[:, 5:12], tolerance=rounding(jnp.float32, 20 + 8 + 8))
  assert np.isnan(rest[:, 7:]).all() and np.all(state["length"] == 20)
  one, _ = attend({name: x[:, :1] for name, x in inputs.items()}, state)
  assert np.isnan(one).all()


def test_cache_gradients(close, rounding):
  """A gradient that flows through the cache is that of the row."""
  inputs = {name: x[:, :40].astype(np.float32) for name, x in NAMED["grouped"].inputs().items()}
  weights = np.random.default_rng(1).normal(size=(2, 40, 4, 8)).astype(np.float32)

  def whole(inputs):
    return jnp.sum(ops.attention(**inputs, window=9)[0] * weights)

  def pieces(inputs):
    total, state = 0.0, None
    for start, end in ((0, 25), (25, 26), (26, 40)):
      y, state = ops.attention(
        **{name: x[:, start:end] for name, x in inputs.items()}, state=state, window=9
      )
      total += jnp.sum(y * weights[:, start:end])
    return total

  found, expected = (jax.jit(jax.grad(loss))(inputs) for loss in (pieces, whole))
  close(found, expected, tolerance=rounding(jnp.float32, 2 * (40 + 8 + 8)))


def test_no_tokens():
  inputs = {name: jnp.zeros((2, 0, 2, 8)) for name in "qkv"}
  state = ops.attention_state(2, 4, (2, 8), (2, 8), jnp.float32)
  y, after = ops.attention(**inputs, state=state)
  assert y.shape == (2, 0, 2, 8)
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


GOOD = ((1, 4, 2, 8),) * 3
CACHE = ops.attention_state(1, 4, (2, 8), (2, 8), np.float32)


@pytest.mark.parametrize(
  ("shapes", "options", "text"),
  [
    (((1, 4, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)), {},
     "attention: q, k, v have shapes (1, 4, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8), expected [B, T, "
     "H, K], [B, T, G, K], [B, T, G, V]"),
    (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), {},
     "attention: 3 query heads do not share 2 key heads evenly; make the first a multiple of "
     "the second"),
    (GOOD, {"visibility": "both"},
     "attention: visibility='both' is unknown; expected \"causal\" or \"full\""),
    (GOOD, {"visibility": "full", "window": 3},
     'attention: visibility="full" sees the whole row at once, so it takes neither state nor '
     'window; use visibility="causal"'),
    (GOOD, {"window": 0},
     "attention: window=0, expected at least 1 (the token itself), or None for all"),
    (GOOD, {"capacity": 3},
     "attention: a cache of capacity=3 cannot hold 4 tokens; raise the capacity or set window"),
    (GOOD, {"window": 9, "state": CACHE},
     "attention: the cache has 4 slots, window=9 needs as many; make it with capacity=9"),
    (GOOD, {"segment_ids": np.zeros((1, 3), np.int32)},
     "attention: segment_ids is int32[1, 3], expected int32[1, 4], one id a token with 0 for "
     "padding"),
    (GOOD, {"implementation": "tpu"},
     'attention: implementation="tpu" cannot run this call: length 4 is shorter than one block '
     'of 128; use implementation="xla"'),
    (GOOD, {"implementation": "tpu", "state": CACHE},
     'attention with a cache: implementation="tpu" cannot run this call: the TPU kernel reads '
     'no cache; use implementation="xla"'),
    (GOOD, {"implementation": "gpu"},
     'attention: implementation="gpu" cannot run this call: attention has no gpu kernel; use '
     'implementation="xla"'),
  ],
)  # fmt: skip
def test_errors(shapes, options, text):
  arrays = (np.zeros(shape, np.float32) for shape in shapes)
  with pytest.raises(ValueError) as error:
    ops.attention(*arrays, **options)
  assert str(error.value) == text
