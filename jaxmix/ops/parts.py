"""Rows cut along their length: what an op does where each device holds a part of every row.

A part keeps some of the state that comes before it and adds to it,

    after = keep . before + added,

and two parts are one such part. So the state before every part is a scan over the devices, of
log2(parts) rounds and one last step: a device sends one state and what its part keeps in each,
whatever the length (Hillis & Steele 1986, "Data parallel algorithms"). Where a state holds the last
tokens and no document has to be told from another, it comes from the neighbours alone, in one step.

The functions run inside `jaxmix.sharding.shard_kernel`, with rows cut along "length".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmix.ops.segments import document_indices, take_rows

AXIS = "sequence"  # the mesh axis that cuts the length


class Documents(NamedTuple):
  """The documents of a part.

  Attributes:
    first, last: [B] int32, ids of its first and of its last token; 0 where all is padding.
    unbroken: [B] int32, 1 where it holds no more than one document, else 0.
  """

  first: jax.Array
  last: jax.Array
  unbroken: jax.Array

  @classmethod
  def of(cls, segment_ids) -> Documents | None:
    """Those of segment_ids [B, T]; None where rows hold one document."""
    if segment_ids is None:
      return None
    live = segment_ids != 0
    newest = segment_ids.shape[1] - 1 - jnp.argmax(live[:, ::-1], axis=1)
    first, last = (
      jnp.take_along_axis(segment_ids, index[:, None], axis=1)[:, 0]
      for index in (jnp.argmax(live, axis=1), newest)
    )
    unbroken = (document_indices(segment_ids)[:, -1] == 0).astype(jnp.int32)
    return cls(first, last, unbroken)

  def goes_on_from(self, before: Documents):
    """[B] bool, whether the first document may have begun in the part before."""
    return (before.last == 0) | (self.first == 0) | (before.last == self.first)

  def behind(self, before: Documents) -> tuple[Documents, jax.Array]:
    """Those of both parts, and [B] bool, whether what comes before this part is seen behind it."""
    passes = (self.unbroken == 1) & self.goes_on_from(before)
    first = jnp.where(before.first != 0, before.first, self.first)
    last = jnp.where(self.last != 0, self.last, before.last)
    return Documents(first, last, before.unbroken * passes), passes


class Part(NamedTuple):
  """What a part of a row does to the state before it.

  Attributes:
    added: the state after it, arrays [B, ...], where there was none before it.
    keep: what it keeps of the state before, as the op takes it.
    documents: its documents; None where the row is one.
  """

  added: Any
  keep: Any
  documents: Documents | None


def state_before(
  part: Part, state, *, apply: Callable, compose: Callable, reach: int | None = None
):
  """The state before each device's part.

  Args:
    part: this device's.   state: before the row, arrays [B, ...]; None means nothing.
    apply: (keep, state) -> what is kept of the state.
    compose: (later, earlier) -> what two parts keep.
    reach: how many parts back what a part adds is still seen; None means all.
  """
  count, index = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
  reach = count if reach is None or part.documents is not None else reach

  def join(earlier: Part, later: Part) -> Part:
    documents = passes = None
    if later.documents is not None:
      documents, passes = later.documents.behind(earlier.documents)
    kept = _where(passes, apply(later.keep, earlier.added))
    return Part(_add(kept, later.added), compose(later.keep, earlier.keep), documents)

  whole, distance = part, 1
  while distance < min(reach, count):
    joined = join(_received(whole, distance), whole)
    whole = jax.tree.map(functools.partial(jnp.where, index >= distance), joined, whole)
    distance *= 2
  earlier = _received(whole, 1)
  before = earlier.added
  if state is not None:
    kept = apply(earlier.keep, state)
    if part.documents is not None:
      kept = _where(earlier.documents.unbroken == 1, kept)
    kept = _add(kept, before)
    before = jax.tree.map(functools.partial(jnp.where, index == 0), state, kept)
  if part.documents is not None:
    before = _where(part.documents.goes_on_from(earlier.documents), before)
  return before


def moved_up(count, memory):
  """What is left of the last tokens of a document, [B, M, ...] with the oldest first, when `count`
  [B] more come behind them; these are zeros."""
  size = memory.shape[1]
  places = jnp.minimum(count, size)[:, None] + jnp.arange(size)
  return take_rows(jnp.pad(memory, ((0, 0), (0, size), *((0, 0),) * (memory.ndim - 2))), places)


def count_tokens(x, segment_ids):
  """[B], tokens of rows x [B, T, ...] that are not padding."""
  if segment_ids is None:
    return jnp.full(x.shape[0], x.shape[1], jnp.int32)
  return jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)


def of_last(state):
  """The state after the last part, on every device."""
  last = jax.lax.axis_index(AXIS) == jax.lax.axis_size(AXIS) - 1
  return jax.tree.map(lambda x: jax.lax.psum(jnp.where(last, x, 0), AXIS), state)


def _received(part: Part, distance: int) -> Part:
  """What the device so far before sends; zeros where there is none."""
  count = jax.lax.axis_size(AXIS)
  pairs = [(source, source + distance) for source in range(count - distance)]
  added, keep, documents = jax.tree.map(
    lambda x: jax.lax.ppermute(x, AXIS, pairs),
    (part.added, part.keep, None if part.documents is None else jnp.stack(part.documents)),
  )
  return Part(added, keep, None if documents is None else Documents(*documents))


def _where(mask, tree):
  """The arrays [B, ...] where mask [B] holds, else 0; all of them without a mask."""
  if mask is None:
    return tree
  return jax.tree.map(
    lambda x: jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, 0).astype(x.dtype), tree
  )


def _add(one, other):
  return jax.tree.map(jnp.add, one, other)
