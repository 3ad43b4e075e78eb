"""Ops on rows cut along their length: those of one device, whatever lies across the cuts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops, sharding

BATCH, LENGTH, HEADS, DIM = 2, 24, 2, 6
# Parts of 6 and of 12 tokens: of padding alone, of several documents and inside one, with padding
# inside a document and at both ends.
SEGMENT_IDS = np.array([[4] * 3 + [0] * 8 + [4] * 2 + [9] * 11, [0] * 2 + [1] + [2] * 2 + [1] * 19])
SEGMENT_IDS[1, 20:22] = 0


@dataclasses.dataclass(frozen=True)
class Case:
  """An op, of arrays [B, T, ...], of parameters, and of the state before the rows."""

  run: Callable
  rows: Mapping[str, tuple[int, ...]]
  parameters: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  state: Callable[[], dict] | None = None
  computes_in: str = "float64"


def grassmann(z, weight, bias, **options):
  """Offsets that reach over several parts."""
  return ops.grassmann_mix(z, weight, bias, offsets=(1, 4, 17), **options)


def fractional(z, weight, bias, taps, **options):
  return ops.fractional_grassmann_mix(z, weight, bias, jax.nn.softmax(taps), **options)


def whole_state(length):
  """A state that rows of so many tokens have left."""
  _, state = grassmann(
    np.random.default_rng(7).normal(size=(BATCH, length, DIM)), np.ones((15, 4)), np.ones(4)
  )
  return state


def matrix_state():
  return np.random.default_rng(8).normal(size=(BATCH, HEADS, DIM, DIM))


MATRICES = {name: (HEADS, DIM) for name in "qkv"}
PLANES = {"weight": (15, 4), "bias": (4,)}
CASES = {
  "linear_attention": Case(ops.linear_attention, {**MATRICES, "q": (4, DIM)}, state=matrix_state),
  "decay": Case(ops.linear_attention, {**MATRICES, "g": (HEADS,)}, state=matrix_state),
  "decay_of_channels": Case(ops.linear_attention, {**MATRICES, "g": (HEADS, DIM)}),
  "delta_rule": Case(
    ops.delta_rule, {**MATRICES, "beta": (HEADS,), "g": (HEADS, DIM)}, state=matrix_state
  ),
  "short_convolution": Case(
    ops.short_convolution,
    {"x": (DIM,)},
    {"weight": (DIM, 14), "bias": (DIM,)},
    state=lambda: np.random.default_rng(9).normal(size=(BATCH, 13, DIM)),
  ),
  "grassmann": Case(grassmann, {"z": (DIM,)}, PLANES, state=lambda: whole_state(5)),
  "fractional": Case(fractional, {"z": (DIM,)}, {**PLANES, "taps": (2, 9)}),
  "long_convolution": Case(ops.long_convolution, {"u": (8,)}, {"kernel": (8, 20)}),
  "attention": Case(ops.attention, MATRICES, computes_in="float32"),
  "window": Case(
    functools.partial(ops.attention, window=9), MATRICES, computes_in="float32"
  ),
  "full": Case(functools.partial(ops.attention, visibility="full"), MATRICES),
}  # fmt: skip


def arrays_of(case: Case) -> dict[str, np.ndarray]:
  """Inputs of a case; log-decays below 0, write strengths between 0 and 1."""
  random = np.random.default_rng(0)
  shapes = {name: (BATCH, LENGTH, *shape) for name, shape in case.rows.items()}
  arrays = {name: random.normal(size=shape) for name, shape in (shapes | case.parameters).items()}
  for name in {"g", "beta"} & set(arrays):
    arrays[name] = random.uniform(*((-0.5, 0) if name == "g" else (0, 1)), arrays[name].shape)
  return arrays


@functools.partial(jax.jit, static_argnames="op")
def outputs_and_gradients(op, arrays, state, segment_ids):
  """y and the state after it, and gradients of a weighted sum of them."""

  def weighted(arrays, state):
    given = {} if state is None else {"state": state}
    y, after = op(**arrays, **given, segment_ids=segment_ids)
    y = jnp.where((segment_ids != 0).reshape(*segment_ids.shape, *(1,) * (y.ndim - 2)), y, 0)
    leaves = [x for x in jax.tree.leaves((y, after)) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(x)) for x in leaves), (y, after)

  return jax.grad(weighted, argnums=(0, 1), has_aux=True, allow_int=True)(arrays, state)


@pytest.mark.parametrize(
  ("name", "parts"), [*((name, 4) for name in CASES), ("decay", 2), ("short_convolution", 2)]
)
def test_parts_are_the_whole(float64, close, rounding, name, parts):
  """Outputs, the state after the rows and the gradients, also of the state before them. On eight
  devices: the law "shard" of the mixers."""
  case, segment_ids = CASES[name], SEGMENT_IDS.astype(np.int32)
  arrays, state = arrays_of(case), case.state and case.state()
  call = functools.partial(outputs_and_gradients, case.run)
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    one = jax.device_get(call(arrays, state, segment_ids))
  mesh = sharding.make_mesh(data=1, sequence=parts, devices=jax.devices()[:parts])
  with jax.set_mesh(mesh):

    def put(name, x):
      axes = ("batch", "length") if name in case.rows else (None, None)
      axes = (*axes, *(None,) * x.ndim)[: x.ndim]
      return jax.device_put(x, sharding.named_sharding(axes, x.shape, mesh))

    arrays = {name: put(name, x) for name, x in arrays.items()}
    many = jax.device_get(call(arrays, state, segment_ids))
  floats = [jax.tree.leaves(tree) for tree in (many, one)]
  keep = [np.issubdtype(x.dtype, np.floating) for x in floats[1]]
  found, expected = ([x for x, k in zip(tree, keep, strict=True) if k] for tree in floats)
  close(found, expected, tolerance=rounding(case.computes_in, 4 * (LENGTH + 4 * DIM)))


def test_length_that_is_not_cut_evenly_stays_whole(float64, close, rounding):
  """25 tokens on four devices: each has all of them, and the values are the same."""
  x, weight = np.random.default_rng(0).normal(size=(1, 25, 4)), np.ones((4, 3))
  expected, _ = ops.short_convolution(x, weight)
  with jax.set_mesh(sharding.make_mesh(data=1, sequence=4, devices=jax.devices()[:4])):
    y, _ = jax.jit(ops.short_convolution)(x, weight)
  close(y, expected, tolerance=rounding("float64", 8))
