"""The laws of a mixer, in float64: what must come out the same in two ways, values and gradients
alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

BATCH, LENGTH, TAIL, DOCUMENT = 2, 112, 3, 16
# Where each document of a row begins; all are of one length, so that they can be run apart as one
# batch.
PACKED = ((0, 16, 32, 48, 64, 80), (0, 16, 32, 48, 64, 80))
# Padding before, between and behind; chunks of 64 part documents.
PADDED = ((0, 18, 36, 56, 75, 91), (3, 19, 38, 55, 71, 89))


@pytest.fixture
def tolerance(subject64, rounding) -> float:
  """What rounding leaves: a channel passes through four maps of width 32 and a sum over the tokens,
  and back."""
  return rounding(subject64.case.computes_in, 2 * (4 * 32 + LENGTH))


# Arrays are made and cut by numpy: every jax operation outside jit would be a program of its own to
# compile.
def rows(batch: int, length: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(batch, length, 32))


def ids_of(layout) -> np.ndarray:
  ids = np.zeros((BATCH, LENGTH), np.int32)
  for row, starts in enumerate(layout):
    for index, start in enumerate(starts):
      ids[row, start : start + DOCUMENT] = 7 * row + index + 1
  return ids


@jax.jit
def outputs_and_gradients(mixer, x, tail, ids, y_weights, tail_weights):
  """A batch and a tail that goes on from its state: outputs, and gradients of their weighted sum.

  The gradient with respect to x flows through the state that is handed on.
  """

  def weighted(mixer, x, tail):
    y, state = mixer(x, segment_ids=ids)
    after = jnp.zeros_like(tail) if state is None else mixer(tail, state=state)[0]
    return jnp.sum(y * y_weights) + jnp.sum(after * tail_weights), (y, after)

  return jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)(mixer, x, tail)


def weights_of(ids: np.ndarray) -> np.ndarray:
  """Random weights of the outputs at live positions, 0 at padding."""
  return np.where((ids != 0)[..., None], rows(*ids.shape, seed=2), 0)


def assert_packing(mixer, layout, close, tolerance):
  """Rows of documents give what the documents give apart, in one batch with a row each."""
  x, tail, ids = rows(BATCH, LENGTH), rows(BATCH, TAIL, seed=1), ids_of(layout)
  y_weights, tail_weights = weights_of(ids), rows(BATCH, TAIL, seed=3)
  places = [(row, start) for row, starts in enumerate(layout) for start in starts]
  last = [places.index((row, starts[-1])) for row, starts in enumerate(layout)]

  def cut(z):  # [B, T, D] -> one row a document
    return np.stack([z[row, start : start + DOCUMENT] for row, start in places])

  def spread(z):  # tails [B, ...] -> one row a document, zero but for the last document of each row
    rows = np.zeros((len(places), *z.shape[1:]))
    rows[last] = z
    return rows

  (dmixer, dx, dtail), (y, after) = jax.device_get(
    outputs_and_gradients(mixer, x, tail, ids, y_weights, tail_weights)
  )
  (dmixer_apart, dx_apart, dtail_apart), (y_apart, after_apart) = jax.device_get(
    outputs_and_gradients(mixer, cut(x), spread(tail), None, cut(y_weights), spread(tail_weights))
  )
  close(cut(y), y_apart, tolerance=tolerance)
  close(after, after_apart[last], tolerance=tolerance)
  close(cut(dx), dx_apart, tolerance=tolerance)
  close(dtail, dtail_apart[last], tolerance=tolerance)
  close(jax.tree.leaves(dmixer), jax.tree.leaves(dmixer_apart), tolerance=tolerance)
  assert not dx[ids == 0].any()


def test_packing(subject64, close, tolerance):
  """Documents packed into rows give the outputs, the state and the gradients of the documents
  apart."""
  assert_packing(subject64.mixer, PACKED, close, tolerance)


def test_padding(subject64, close, tolerance):
  """So do documents with padding before, between and behind them; padding gets no gradient."""
  assert_packing(subject64.mixer, PADDED, close, tolerance)


def test_definition(subject64, close, tolerance):
  """The implementation chosen is the reference: outputs, gradients, also through the state handed
  on."""
  ids = ids_of(PADDED)
  arrays = (
    rows(BATCH, LENGTH),
    rows(BATCH, TAIL, seed=1),
    ids,
    weights_of(ids),
    rows(BATCH, TAIL, seed=3),
  )
  chosen, reference = (
    outputs_and_gradients(mixer, *arrays)
    for mixer in (subject64.mixer, subject64.make("reference"))
  )
  close(jax.tree.leaves(chosen), jax.tree.leaves(reference), tolerance=tolerance)


def test_boundary(subject64):
  """No gradient of a document reaches another: exactly zero."""
  ids = ids_of(PACKED)
  middle = ids % 7 == 4
  weights = np.where(middle[..., None], rows(BATCH, LENGTH, seed=2), 0)
  (_, dx, _), _ = outputs_and_gradients(
    subject64.mixer,
    rows(BATCH, LENGTH),
    rows(BATCH, TAIL),
    ids,
    weights,
    np.zeros((BATCH, TAIL, 32)),
  )
  dx = np.asarray(dx)
  assert not dx[~middle].any() and dx[middle].all()


def test_padding_inside(subject64, close, tolerance):
  """Padding in the middle of a document is passed over."""
  x = rows(BATCH, LENGTH)
  live = np.r_[:20, LENGTH - 17 : LENGTH]
  ids = np.zeros((BATCH, LENGTH), np.int32)
  ids[:, live] = 1
  close(
    np.asarray(subject64(x, segment_ids=ids)[0])[:, live],
    subject64(x[:, live])[0],
    tolerance=tolerance,
  )


def test_padding_alone(subject64):
  """A row of padding leaves the state as it was, bitwise by what it does to a continuation."""
  x = rows(BATCH, TAIL)
  padding = np.zeros((BATCH, TAIL), np.int32)
  if not subject64.case.streams:
    assert not np.asarray(subject64(x, segment_ids=padding)[0]).any()
    return
  _, state = subject64(x, state=subject64.init_state(BATCH, x.dtype))
  y, after = subject64(x, state=state, segment_ids=padding)
  assert not np.asarray(y).any()
  np.testing.assert_array_equal(subject64(x, state=after)[0], subject64(x, state=state)[0])


@pytest.mark.parametrize("length", [1, 37])
def test_odd_lengths(subject64, length, close, tolerance):
  """A short row alone is that row as the first document of a long one."""
  x = rows(BATCH, LENGTH)
  ids = np.where(np.arange(LENGTH) < length, 1, 2)[None].repeat(BATCH, 0).astype(np.int32)
  close(
    subject64(x[:, :length])[0],
    np.asarray(subject64(x, segment_ids=ids)[0])[:, :length],
    tolerance=tolerance,
  )


@pytest.mark.parametrize("cut", [0, 37, LENGTH])
def test_split(subject64, cut, close, tolerance):
  """f(x[:a]) and then f(x[a:]) with the carried state is f(x), and leaves the same state."""
  x, tail = rows(BATCH, LENGTH), rows(BATCH, TAIL, seed=1)
  whole, last = subject64(x)
  first, state = subject64(x[:, :cut], state=subject64.init_state(BATCH, x.dtype))
  second, state = subject64(x[:, cut:], state=state)
  close(np.concatenate([first, second], axis=1), whole, tolerance=tolerance)
  close(subject64(tail, state=state)[0], subject64(tail, state=last)[0], tolerance=tolerance)


def test_split_packed(subject64, close, tolerance):
  """A state handed on belongs to the first document of the rows that follow."""
  x, ids, cut = rows(BATCH, LENGTH), ids_of(PADDED), 20
  whole, _ = subject64(x, segment_ids=ids)
  first, state = subject64(x[:, :cut], segment_ids=ids[:, :cut])
  second, _ = subject64(x[:, cut:], state=state, segment_ids=ids[:, cut:])
  live = (ids != 0)[..., None]
  close(
    np.where(live, np.concatenate([first, second], axis=1), 0),
    np.where(live, whole, 0),
    tolerance=tolerance,
  )


def test_step(subject64, close, tolerance):
  """T calls of length 1 are one call of length T, and leave the same state."""
  x, tail = rows(BATCH, LENGTH), rows(BATCH, TAIL, seed=1)

  @jax.jit
  def decode(mixer, x, state):
    def step(state, token):
      y, state = mixer(token[:, None], state=state)
      return state, y[:, 0]

    state, y = jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1), state

  whole, last = subject64(x)
  y, state = decode(subject64.mixer, x, subject64.init_state(BATCH, x.dtype))
  close(y, whole, tolerance=tolerance)
  close(subject64(tail, state=state)[0], subject64(tail, state=last)[0], tolerance=tolerance)


@pytest.mark.parametrize("layout", [None, PACKED], ids=["one_document", "packed"])
def test_causality(subject64, layout):
  """Changing x[t:] leaves y[:t] unchanged, bitwise: a later token has weight zero, not a small
  one."""
  x, ids, t = rows(BATCH, LENGTH), None if layout is None else ids_of(layout), 40
  before = np.asarray(subject64(x, segment_ids=ids)[0])
  changed = np.where(np.arange(LENGTH)[:, None] < t, x, -1e6 * x)
  after = np.asarray(subject64(changed, segment_ids=ids)[0])
  np.testing.assert_array_equal(before[:, :t], after[:, :t])
  assert np.any(before[:, t:] != after[:, t:])


@pytest.mark.parametrize("cut", ["every_axis", "length"])
def test_shard(subject64, close, tolerance, devices_cut, cut):
  """Eight devices with batch, heads and length cut, or length alone, give the outputs, the state
  and the gradients of one. Documents begin and end anywhere in the parts of the length."""
  ids = ids_of(PADDED)
  arrays = (
    rows(BATCH, LENGTH),
    rows(BATCH, TAIL, seed=1),
    ids,
    weights_of(ids),
    rows(BATCH, TAIL, seed=3),
  )
  one = outputs_and_gradients(subject64.mixer, *arrays)
  devices = devices_cut[cut]
  with jax.set_mesh(devices.mesh):
    mixer, arrays = devices.place(subject64.mixer, arrays)
    many = outputs_and_gradients(mixer, *arrays)
    parameters = jax.tree.leaves(nnx.as_pure(mixer))
  gradients = jax.tree.leaves(nnx.as_pure(many[0][0]))
  # XLA lays out small gradients as it likes; those of the parameters that are cut stay cut.
  pairs = zip(parameters, gradients, strict=True)
  parts = [gradient for parameter, gradient in pairs if not parameter.sharding.is_fully_replicated]
  if cut == "every_axis":
    gradient = max(parts, key=lambda leaf: leaf.size)
    assert len(gradient.sharding.device_set) == 8 and not gradient.sharding.is_fully_replicated
  close(jax.tree.leaves(many), jax.tree.leaves(one), tolerance=tolerance)
