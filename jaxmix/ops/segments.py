"""Packed rows: which document a token belongs to, and where in it the token stands.

`segment_ids` [B, T] int32 mark the documents that share a row: 0 is padding, and a change from one
id to another starts a new document. Padding may stand anywhere; it belongs to no document and is no
change.

What looks back over a few tokens wants the tokens of a document to be neighbours. Padding inside a
document is rare: `over_padding` asks for it when the program runs, and puts such rows in order.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def document_indices(segment_ids: jax.Array) -> jax.Array:
  """Number of the document that each token belongs to, counted within its row.

  Args:
    segment_ids: [B, T] int32; 0 is padding.
  Returns:
    [B, T] int32: 0 for the first document of a row, 1 for the next, ...; padding counts with what
    stands before it.
  """
  index = jnp.arange(segment_ids.shape[1])
  live = segment_ids != 0
  newest = jax.lax.cummax(jnp.where(live, index, -1), axis=1)
  before = jnp.pad(newest, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
  starts = live & (before >= 0) & (segment_ids != id_before)
  return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def document_positions(segment_ids: jax.Array, first: jax.Array) -> jax.Array:
  """Position of each token in its document.

  Args:
    segment_ids: [B, T] int32; 0 is padding.
    first: [B] int32, position of the first token that is not padding (above 0 when a document goes
      on from an earlier call).
  Returns:
    [B, T] int32; at padding, the position that the next token of the document will have.
  """
  live = segment_ids != 0
  documents = document_indices(segment_ids)
  seen = jnp.cumsum(live, axis=1, dtype=jnp.int32) - live  # tokens of the row before this one
  changes = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)))
  offset = jax.lax.cummax(jnp.where(changes, seen, 0), axis=1)  # those of earlier documents
  return seen - offset + jnp.where(documents == 0, first[:, None], 0)


def last_token(segment_ids: jax.Array, values: jax.Array, otherwise: jax.Array) -> jax.Array:
  """The value at the last token of each row that is not padding.

  Args:
    segment_ids, values: [B, T] int32.   otherwise: [B] int32, for rows of nothing but padding.
  Returns:
    [B] int32.
  """
  index = jnp.arange(segment_ids.shape[1])
  newest = jnp.max(jnp.where(segment_ids != 0, index, -1), axis=1, initial=-1)
  value = jnp.sum(jnp.where(index == newest[:, None], values, 0), axis=1, dtype=values.dtype)
  return jnp.where(newest >= 0, value, otherwise)


def newest_rows(before: jax.Array, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """The last M tokens of a row's last document, oldest first, with zeros before its first.

  Args:
    before: [B, M, ...], the same of what came before the row; it belongs to the document of the
      first token that is not padding.   x: [B, T, ...].   segment_ids: [B, T] int32 or None.
  Returns:
    [B, M, ...].
  """
  length, count = x.shape[1], before.shape[1]
  if segment_ids is None:
    return jnp.concatenate([before[:, min(length, count) :], x[:, max(length - count, 0) :]], 1)
  if count == 0 or length == 0:
    return before
  documents, place = document_indices(segment_ids), jnp.arange(count)
  in_last = (segment_ids != 0) & (documents == documents[:, -1:])
  behind = jnp.cumsum(in_last[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]  # itself among them
  hit = in_last[:, None] & (behind[:, None] == (count - place)[:, None])
  rows = jnp.max(jnp.where(hit, jnp.arange(length), -1), axis=2)
  kept = place + behind[:, :1]
  kept = jnp.where((rows < 0) & (documents[:, -1:] == 0), kept, count)
  of_before = jnp.pad(before, ((0, 0), (0, 1), *((0, 0),) * (before.ndim - 2)))
  found = (rows >= 0).reshape(*rows.shape, *(1,) * (x.ndim - 2))
  of_x = take_rows(x, jnp.maximum(rows, 0)).astype(before.dtype)
  return jnp.where(found, of_x, take_rows(of_before, kept))


def take_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
  """x [B, T, ...] at rows [B, N] -> [B, N, ...]."""
  return jnp.take_along_axis(x, rows.reshape(*rows.shape, *(1,) * (x.ndim - 2)), axis=1)


def order(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[B, T] twice: the row of each token, in their order and behind them those of the padding; and
  the place of each row in that order."""
  batch, length = segment_ids.shape
  index = jnp.arange(length, dtype=jnp.int32)
  live = segment_ids != 0
  count = jnp.cumsum(live, axis=1, dtype=jnp.int32)
  places = jnp.where(live, count - 1, count[:, -1:] + index - count)
  rows = jnp.zeros((batch, length), jnp.int32)
  rows = rows.at[jnp.arange(batch)[:, None], places].set(index, unique_indices=True)
  return rows, places


def in_order(form: Callable, segment_ids: jax.Array | None, *arrays: jax.Array):
  """form(segment_ids, *arrays), arrays [B, T, ...] or None, with the padding of each row moved
  behind its tokens. What the form returns, or the first of what it returns, is put back."""
  if segment_ids is None:
    return form(None, *arrays)
  rows, places = order(segment_ids)
  segment_ids, *arrays = jax.tree.map(lambda x: take_rows(x, rows), (segment_ids, *arrays))
  results = form(segment_ids, *arrays)
  if isinstance(results, jax.Array):
    return take_rows(results, places)
  first, *others = results
  return take_rows(first, places), *others


def over_padding(form: Callable, segment_ids: jax.Array | None, *arrays: jax.Array):
  """form(segment_ids, *arrays) on rows as they stand, or as `in_order` does it where padding stands
  inside a document."""
  if segment_ids is None:
    return form(None, *arrays)
  live, documents = segment_ids != 0, document_indices(segment_ids)
  inside = live[:, 1:] & ~live[:, :-1] & (documents[:, 1:] == documents[:, :-1])
  return jax.lax.cond(
    jnp.any(inside),
    lambda: in_order(form, segment_ids, *arrays),
    lambda: form(segment_ids, *arrays),
  )


def check_segment_ids(op: str, segment_ids, batch: int, length: int) -> None:
  """Raises ValueError unless segment_ids is [batch, length] of integers."""
  if segment_ids is None:
    return
  if segment_ids.shape != (batch, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise ValueError(
      f"{op}: segment_ids is {segment_ids.dtype}{list(segment_ids.shape)}, expected "
      f"int32[{batch}, {length}], "
      "one id a token with 0 for padding"
    )
