"""What the GPU kernels that walk the chunks of a row in order share: what is prepared for them, for
all chunks at once; what a walk sees of one chunk; and the state that it carries.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.chunks_gpu import (
  NARROW,
  Chunk,
  Levels,
  Plan,
  Weights,
  add,
  both,
  call,
  dot,
  is_vector,
  kept,
  load,
  orient,
  store,
  times,
)


def no_decay(plan: Plan):
  """The g [B, T, H] by which nothing decays: 4 bytes a token, beside rows of hundreds."""
  return jnp.zeros((plan.batch, plan.length, plan.heads), jnp.float32)


class State:
  """The tiles of a state that a walk carries: all of its keys, one tile of values."""

  def __init__(self, plan: Plan, batch, head, tile):
    self._plan, self._index = plan, (batch, head)
    self._values = plan.values(tile)

  def load(self, ref) -> tuple:
    """From [B, H, K, V]; zeros from None."""
    if ref is None:
      blocks = self._plan.blocks
      return (jnp.zeros((blocks.keys, blocks.values), jnp.float32),) * self._plan.key_tiles
    return tuple(load(ref, *at) for at in self._places())

  def store(self, ref, state, *number) -> None:
    """To [B, H, K, V], or of a chunk's number to [B, H, N, K, V]."""
    for part, (index, *masks) in zip(state, self._places(*number), strict=True):
      store(ref, index, part, *masks)

  def _places(self, *number):
    columns, columns_exist = self._values
    for tile in range(self._plan.key_tiles):
      channels, exist = self._plan.keys(tile)
      yield (*self._index, *number, channels, columns), exist, columns_exist


class Prepared(NamedTuple):
  """What the chunks are to the state, where there is decay.

  Attributes:
    pairs: A [B, M, T, C], what each query reads of the keys of its chunk.
    reading, written: with vector decay, queries [B, M, T, K] as they read the state before the
      chunk, and keys [B, H, T, K] as they stay in the state after it.
    read, write: with one decay a token, the factors [B, H, T] that make q and k so.
    keep: what is left of the state before in the state after: [B, H, N, K], or [B, H, N].
  """

  pairs: jax.Array
  reading: jax.Array | None
  written: jax.Array | None
  read: jax.Array | None
  write: jax.Array | None
  keep: jax.Array


def prepare(plan: Plan, q, k, g, documents, *, name: str, dtype, interpret) -> Prepared:
  """Computes it, for all chunks at once; g: [B, T, H] or [B, T, H, K], dtype: of A."""
  batch, heads, length, size = plan.batch, plan.heads, plan.length, plan.blocks.chunk
  rows, vector = batch * plan.most * length, is_vector(g)
  if vector:
    plan = plan.with_keys(NARROW)
  of_state, keys = (batch, heads), (plan.key_dim,) * vector
  row = None if vector else jax.ShapeDtypeStruct((*of_state, length), jnp.float32)
  shapes = Prepared(
    pairs=jax.ShapeDtypeStruct((batch, plan.most, length, size), dtype),
    reading=jax.ShapeDtypeStruct((batch, plan.most, length, *keys), q.dtype) if vector else None,
    written=jax.ShapeDtypeStruct((*of_state, length, *keys), q.dtype) if vector else None,
    read=row,
    write=row,
    keep=jax.ShapeDtypeStruct((*of_state, plan.chunks, *keys), jnp.float32),
  )
  sizes = size.bit_length() - 1 if vector else 1
  return call(
    _vector_pairs_kernel if vector else _pairs_kernel,
    plan,
    (plan.chunks, plan.most, batch),
    shapes,
    name=name,
    flops=rows * 2 * size * plan.key_dim * sizes,
    exponentials=rows * (plan.key_dim * (sizes + 2) if vector else size + 2),
    interpret=interpret,
  )(q, k, g, documents)


def _pairs_kernel(q_ref, k_ref, g_ref, documents_ref, *prepared_refs, plan: Plan):
  prepared = Prepared(*prepared_refs)
  number, user, batch = (pl.program_id(axis) for axis in range(3))
  chunk = Chunk(plan, documents_ref, batch, number)
  size, head = plan.blocks.chunk, user // plan.group

  def of_tile(tile, scores):
    channels, exist = plan.keys(tile)
    q, k = (
      load(ref, (batch, chunk.rows, plan.head(ref, user), channels), chunk.exists, exist)
      for ref in (q_ref, k_ref)
    )
    return scores + dot(q, k, (1, 1))

  scores = jnp.zeros((size, size), jnp.float32)
  scores = jax.lax.fori_loop(0, plan.key_tiles, of_tile, scores)
  g = load(g_ref, (batch, chunk.rows, plan.head(g_ref, user)), chunk.exists)
  weights = Weights(chunk, g)
  index = (batch, user, chunk.rows, pl.ds(0, size))
  store(prepared.pairs, index, weights.decay(scores), chunk.exists, None)
  # Queries that share a state have its decay, too, and one of them writes what belongs to it.
  mine = both(chunk.exists, first_of_state(plan, user))
  store(prepared.read, (batch, head, chunk.rows), weights.read, mine)
  store(prepared.write, (batch, head, chunk.rows), weights.write, mine)
  store(
    prepared.keep, (batch, head, pl.ds(number, 1)), weights.keep[None], first_of_state(plan, user)
  )


def first_of_state(plan: Plan, user):
  """[1], whether a query is the first of those that share a state; None where none do."""
  return None if plan.group == 1 else (user % plan.group == 0)[None]


def _vector_pairs_kernel(q_ref, k_ref, g_ref, documents_ref, *prepared_refs, plan: Plan):
  prepared = Prepared(*prepared_refs)
  number, user, batch = (pl.program_id(axis) for axis in range(3))
  chunk = Chunk(plan, documents_ref, batch, number)
  size, dtype, head = plan.blocks.chunk, q_ref.dtype, user // plan.group
  row, column = orient(False)
  token = jnp.arange(size)

  def of_tile(tile, pairs):
    channels, exist = plan.keys(tile)

    def tile_of(ref):
      index = (batch, chunk.rows, plan.head(ref, user), channels)
      return load(ref, index, chunk.exists, exist)

    levels = Levels(size, functools.partial(tile_of, g_ref), dtype)
    first = first_of_state(plan, user)
    reading = times(tile_of(q_ref) * levels.until(), chunk.reads, 0)
    index = (batch, user, chunk.rows, channels)
    store(prepared.reading, index, reading, chunk.exists, exist)
    written = times(tile_of(k_ref) * levels.after(), chunk.writes, 0)
    index = (batch, head, chunk.rows, channels)
    store(prepared.written, index, written, both(chunk.exists, first), exist)
    keep = kept(chunk.keeps, levels.total())
    store(prepared.keep, (batch, head, number, channels), keep, both(exist, first))

    def at_level(level, pairs):
      decay, second, together = levels.at(level)
      of_query = jnp.where(second, tile_of(q_ref) * decay, 0).astype(dtype)
      of_key = jnp.where(second, 0, tile_of(k_ref) * decay).astype(dtype)
      return pairs + jnp.where(together, dot(of_query, of_key, (1, 1)), 0)

    q, k = (tile_of(ref).astype(jnp.float32) for ref in (q_ref, k_ref))
    pairs += jnp.where(row(token) == column(token), row(jnp.sum(q * k, axis=1)), 0)
    return jax.lax.fori_loop(0, levels.count, at_level, pairs)

  pairs = jnp.zeros((size, size), jnp.float32)
  pairs = jax.lax.fori_loop(0, plan.key_tiles, of_tile, pairs)
  pairs = jnp.where(chunk.visible(), pairs, 0)
  store(prepared.pairs, (batch, user, chunk.rows, pl.ds(0, size)), pairs, chunk.exists, None)


class Seen:
  """What a walk sees of one chunk, for one state. All is loaded where it is used: held over the
  whole step, it would overfill the registers.

  Attributes:
    chunk: where it is.
  """

  def __init__(self, plan: Plan, q_ref, k_ref, prepared, documents_ref, batch, head, number):
    self._plan, self._batch, self._head, self._number = plan, batch, head, number
    self._q_ref, self._k_ref, self._prepared = q_ref, k_ref, prepared
    self.chunk = Chunk(plan, documents_ref, batch, number)

  @property
  def read(self):
    """[C], the factor of what is read from the state before the chunk; None means one."""
    return self._factor("read", self.chunk.reads)

  @property
  def write(self):
    """[C], the factor of what is written to the state after the chunk; None means one."""
    return self._factor("write", self.chunk.writes)

  def _factor(self, name: str, mask):
    if self._prepared is None:
      return None if mask is None else mask.astype(jnp.float32)
    ref = getattr(self._prepared, name)
    index = (self._batch, self._head, self.chunk.rows)
    return None if ref is None else load(ref, index, self.chunk.exists)

  @property
  def keeps(self):
    """For each tile of keys, what is left of the state before in the state after: a number, [K] or
    None, which is all."""
    index = (self._batch, self._head, self._number)
    for channels, exist in map(self._plan.keys, range(self._plan.key_tiles)):
      if self._prepared is None:
        keeps = self.chunk.keeps
        yield None if keeps is None else keeps.astype(jnp.float32)
      elif self._prepared.read is None:
        yield load(self._prepared.keep, (*index, channels), exist)
      else:
        yield self._prepared.keep[index]

  @property
  def keys(self):
    """Tiles [C, K], as they stay in the state after the chunk but for `write`."""
    return self._tiles(self._k_ref, self._head, self._head * self._plan.group)

  def queries(self, query):
    """Tiles [C, K] of one of the state's queries, as they read the state before the chunk but for
    `read`."""
    user = self._head * self._plan.group + query
    return self._tiles(self._q_ref, user, user)

  def _tiles(self, ref, own, user):
    """Of q or k. Decayed for each channel they are head-major, and head `own` is meant."""
    index = (self.chunk.rows, self._plan.head(ref, user))
    if self._prepared is not None and self._prepared.read is None:
      index = (own, self.chunk.rows)
    for channels, exist in map(self._plan.keys, range(self._plan.key_tiles)):
      yield load(ref, (self._batch, *index, channels), self.chunk.exists, exist)

  def pairs(self, query, *, by_key: bool = False):
    """[C, C], what queries (rows) read of keys; the other way round with `by_key`."""
    if self._prepared is not None:
      user, every = self._head * self._plan.group + query, pl.ds(0, self._plan.blocks.chunk)
      index = (self._batch, user, self.chunk.rows, every)
      pairs = load(self._prepared.pairs, index, self.chunk.exists, None)
      return pairs.T if by_key else pairs
    queries = self.queries(query)
    sides = (self.keys, queries) if by_key else (queries, self.keys)
    scores = add(dot(a, b, (1, 1)) for a, b in zip(*sides, strict=True))
    return jnp.where(self.chunk.visible(by_key=by_key), scores, 0)


def what_walks_read(q, k, prepared: Prepared | None, documents):
  """What a walk reads for q, k, the rest of what is prepared, and documents."""
  if prepared is None:
    return q, k, None, documents
  if prepared.reading is not None:
    q, k = prepared.reading, prepared.written
  return q, k, prepared._replace(reading=None, written=None), None


def scaled(state, keep):
  """A tile of the state times what is left of it: a number, [K] or None."""
  return times(state, keep, 0) if keep is None or keep.ndim else state * keep
