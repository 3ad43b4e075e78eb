"""Packed rows: which document a token belongs to, and where in it the token stands.

`segment_ids` [B, T] int32 mark the documents that share a row: 0 is padding, and a change from one
id to another starts a new document. Padding may stand anywhere; it belongs to no document and is no
change.
"""

from __future__ import annotations

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
