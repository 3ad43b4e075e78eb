"""Causal linear attention on GPU.

Forward: one program for each state and tile of its values walks the chunks of C tokens in order,
the state [K, tile] float32 in its registers: what it adds to HBM's traffic over q, k, v and y is
nothing but, under differentiation, the state before each chunk. Programs of one state stand beside
one another in the grid, so that q and k come from HBM once and from the cache for the others. The
alternative, a pass for the states of all chunks and then all chunks at once, would write and read
those states even without differentiation: 2 K V / C numbers a token and head against 2 (K + V), as
much again at C = 64 and head size 128. It would be faster where states and tiles are fewer than the
multiprocessors; values are cut finer there instead (`choose_blocks`).

Backward: the same walk from the end carries the cotangent of the state, yields dv, and keeps the
cotangent of the state after each chunk; dq, dk and dg then need nothing from other chunks, and are
computed for all chunks and tiles of keys at once.

A decay for each key channel makes the pair weights of a chunk expensive, a product for each size of
block (`Levels`), and independent of the state: a kernel of its own computes them for all chunks at
once, with queries and keys decayed to the chunk's ends, and the walks only multiply. It keeps them
for the backward: they are in HBM in any case, and to compute them again would read q, k, g.

Bytes, a token and head at b bytes a number: forward b (2 K + 2 V), with vector decay
4 K + 4 b K + 2 b C more; under differentiation b K V / C more. Backward b (6 K + 5 V + 4 K V / C),
with vector decay 8 K + b C more. Flops: forward 2 C (K + V) + 4 K V, backward 2 C (4 K + 2 V)
+ 8 K V; with vector decay 2 C K for each of log2 C sizes and twice that in the backward.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import chunks_gpu
from pallas_kernels.chunks_gpu import (
  Blocks,
  Chunk,
  Levels,
  Plan,
  Weights,
  add,
  add_rows,
  both,
  dot,
  kept,
  load,
  make_plan,
  orient,
  split,
  store,
  sum_passed,
  times,
)


VECTOR_KEYS = 32  # channels of a tile where each has its own decay: wider ones overfill the registers


def refusal(q, k, v, g=None) -> str | None:
  """Why the kernels cannot run on q, k [B, T, heads, K] and v [B, T, heads, V], or None."""
  return chunks_gpu.mixed_dtypes(q=q, k=k, v=v) or chunks_gpu.shortage(q.shape[3])


def forward(
  q,
  k,
  v,
  g,
  state,
  documents,
  *,
  scale: float,
  dtype,
  save: bool = False,
  blocks: Blocks | None = None,
  interpret=False,
):
  """Causal linear attention.

      S_t = exp(g_t) * S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t

  Args:
    q, k: [B, T, heads, K].   v: [B, T, heads, V].   All float32 or all bfloat16. Each has the most
      or the fewest heads of the three; neighbours share a head.
    g: log-decay <= 0, float32: [H], [B, T, H] or [B, T, H, K]; None is no decay. H is the more of
      the heads of k and v.
    state: [B, H, K, V] float32, S_0; None means zeros.
    documents: [B, T] int32 or None: the number of each token's document in its row, from 0 and
      never falling; S is cleared where it changes, and S_0 belongs to document 0.
    scale: multiplies q.   dtype: of y.
    save: also return what `backward` wants.
    blocks: None chooses.   interpret: run the kernel's program on the CPU.
  Returns:
    y: [B, T, most heads, V];   S_T: [B, H, K, V] float32;   with `save` a tuple of arrays with
    batch first and heads second: the state before each chunk [B, H, N, K, V] in the dtype of q, and
    with vector decay the pair weights and what else the chunks are to the state.
  Source: Katharopoulos et al. 2020 (arXiv 2006.16236), section 3.3; with decay Yang et al. 2024
    (arXiv 2312.06635), section 4.
  """
  plan = make_plan(q, k, v, blocks)
  g = _per_token(g, plan)
  prepared = None if g is None else _prepare(plan, q, k, g, documents, interpret)
  walked = (plan, q, k, v, prepared, documents, state)
  y, state, starts = _walk(*walked, scale, dtype, save, interpret)
  if not save:
    return y, state
  return y, state, (starts, prepared)


def backward(
  q,
  k,
  v,
  g,
  starts,
  documents,
  dy,
  dstate,
  *,
  scale: float,
  blocks: Blocks | None = None,
  interpret=False,
):
  """Gradients of `forward`.

  Args:
    q, k, v, g, documents, scale, blocks, interpret: as given to `forward`.
    starts: what it saved.
    dy: [B, T, most heads, V], any float dtype.   dstate: [B, H, K, V] float32: cotangents of y and
      S_T.
  Returns:
    dq, dk, dv in the shapes and the dtype of q, k, v; dg float32 in the shape of g, or None;
    dS_0: [B, H, K, V] float32.
  """
  plan = make_plan(q, k, v, blocks)
  rows = _per_token(g, plan)
  starts, prepared = starts
  walked = (plan, q, k, v, prepared, documents, dy, dstate)
  dv, dends, dfirst = _walk_back(*walked, scale, interpret)
  dq, dk, dg = _pull_back(plan, q, k, v, rows, starts, dends, documents, dy, scale, interpret)
  dq, dk, dv = (_sum_shared(dx, x) for dx, x in ((dq, q), (dk, k), (dv, v)))
  if g is not None:
    dg = dg.reshape(*rows.shape[:3], plan.group, *rows.shape[3:]).sum(axis=3)
    dg = dg.sum(axis=(0, 1)) if g.ndim == 1 else dg
  return dq, dk, dv, dg, dfirst


def _per_token(g, plan: Plan):
  """A constant decay as one for each token: 4 bytes, beside rows of hundreds."""
  if g is None or g.ndim > 1:
    return g
  return jnp.broadcast_to(g, (plan.batch, plan.length, plan.heads))


def _is_vector(g) -> bool:
  return g is not None and g.ndim == 4


def _sum_shared(dx, x):
  """The gradient of an array from those of its heads' users, summed in float32."""
  if dx.shape == x.shape:
    return dx.astype(x.dtype)
  shared = dx.reshape(*x.shape[:3], -1, x.shape[3])
  return shared.sum(axis=3).astype(x.dtype)


def _gradient_of(x, heads: int):
  """The array that a kernel writes the gradient of x to: a head for each of its users, in float32
  where they are then summed."""
  batch, length, own, dim = x.shape
  shape = (batch, length, max(own, heads), dim)
  return jax.ShapeDtypeStruct(shape, x.dtype if own >= heads else jnp.float32)


def _call(kernel, plan: Plan, grid, out_shape, *, name: str, flops: int, exponentials: int = 0,
          warps: int = 4, stages: int = 2, interpret=False):
  """A `pallas_call` whose kernel sees whole arrays, as a GPU does."""

  def run(*arrays):
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, out_shape)))
    return pl.pallas_call(
      functools.partial(kernel, plan=plan),
      grid=grid,
      out_shape=out_shape,
      compiler_params=chunks_gpu.compiler_params(warps, stages),
      cost_estimate=pl.CostEstimate(
        flops=flops, transcendentals=exponentials, bytes_accessed=moved
      ),
      name=name,
      interpret=interpret,
    )(*arrays)

  return run


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


def _prepare(plan: Plan, q, k, g, documents, interpret) -> Prepared:
  batch, heads, length, size = plan.batch, plan.heads, plan.length, plan.blocks.chunk
  rows, vector = batch * plan.most * length, _is_vector(g)
  if vector:
    plan = plan.with_keys(VECTOR_KEYS)
  of_state, keys = (batch, heads), (plan.key_dim,) * vector
  row = None if vector else jax.ShapeDtypeStruct((*of_state, length), jnp.float32)
  shapes = Prepared(
    pairs=jax.ShapeDtypeStruct((batch, plan.most, length, size), q.dtype),
    reading=jax.ShapeDtypeStruct((batch, plan.most, length, *keys), q.dtype) if vector else None,
    written=jax.ShapeDtypeStruct((*of_state, length, *keys), q.dtype) if vector else None,
    read=row,
    write=row,
    keep=jax.ShapeDtypeStruct((*of_state, plan.chunks, *keys), jnp.float32),
  )
  sizes = size.bit_length() - 1 if vector else 1
  return _call(
    _vector_pairs_kernel if vector else _pairs_kernel,
    plan,
    (plan.chunks, plan.most, batch),
    shapes,
    name="linear_attention_pairs",
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
  mine = both(chunk.exists, _first(plan, user))
  store(prepared.read, (batch, head, chunk.rows), weights.read, mine)
  store(prepared.write, (batch, head, chunk.rows), weights.write, mine)
  store(prepared.keep, (batch, head, pl.ds(number, 1)), weights.keep[None], _first(plan, user))


def _first(plan: Plan, user):
  """[1]: whether a query is the first of those that share a state; None where none do."""
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
    first = _first(plan, user)
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


class _Seen:
  """What a walk sees of one chunk, for one state.

  Attributes:
    chunk: where it is.
    keys: tiles [C, K], as they stay in the state after the chunk but for `write`.
    read, write: [C] factors of what is read from the state before the chunk, and of what is written
      to the state after it; None means one.
    keeps: for each tile of keys, what is left of the state before in the state after: a number, [K]
      or None, which is all.
  """

  def __init__(self, plan: Plan, q_ref, k_ref, prepared, documents_ref, batch, head, number):
    self._plan, self._batch, self._head = plan, batch, head
    self._q_ref, self._prepared = q_ref, prepared
    self.chunk = chunk = Chunk(plan, documents_ref, batch, number)
    self.keys = self._tiles(k_ref, head, head * plan.group)
    if prepared is None:
      self.read, self.write, keep = (
        None if mask is None else mask.astype(jnp.float32)
        for mask in (chunk.reads, chunk.writes, chunk.keeps)
      )
      self.keeps = [keep] * plan.key_tiles
    elif prepared.read is None:
      self.read = self.write = None
      index = (batch, head, number)
      self.keeps = [
        load(prepared.keep, (*index, channels), exist)
        for channels, exist in map(plan.keys, range(plan.key_tiles))
      ]
    else:
      index = (batch, head, chunk.rows)
      self.read, self.write = (
        load(ref, index, chunk.exists) for ref in (prepared.read, prepared.write)
      )
      self.keeps = [prepared.keep[batch, head, number]] * plan.key_tiles

  def _tiles(self, ref, own, user):
    """Of q or k. Decayed for each channel they are head-major, and head `own` is meant."""
    index = (self.chunk.rows, self._plan.head(ref, user))
    if self._prepared is not None and self._prepared.read is None:
      index = (own, self.chunk.rows)
    return [
      load(ref, (self._batch, *index, channels), self.chunk.exists, exist)
      for channels, exist in map(self._plan.keys, range(self._plan.key_tiles))
    ]

  def queries(self, query):
    """Tiles [C, K] of one of the state's queries, as they read the state before the chunk but for
    `read`."""
    user = self._head * self._plan.group + query
    return self._tiles(self._q_ref, user, user)

  def pairs(self, query, queries, *, by_key: bool = False):
    """[C, C], what queries (rows) read of keys; the other way round with `by_key`."""
    size = self._plan.blocks.chunk
    if self._prepared is not None:
      user = self._head * self._plan.group + query
      index = (self._batch, user, self.chunk.rows, pl.ds(0, size))
      pairs = load(self._prepared.pairs, index, self.chunk.exists, None)
      return pairs.T if by_key else pairs
    sides = (self.keys, queries) if by_key else (queries, self.keys)
    scores = add(dot(a, b, (1, 1)) for a, b in zip(*sides, strict=True))
    return jnp.where(self.chunk.visible(by_key=by_key), scores, 0)


class _State:
  """The tiles of a state that a walk carries: all of its keys, one tile of values."""

  def __init__(self, plan: Plan, batch, head, tile):
    self._plan, self._index = plan, (batch, head)
    self._values = plan.values(tile)

  def load(self, ref) -> tuple:
    """From [B, H, K, V]; zeros from None."""
    if ref is None:
      blocks = self._plan.blocks
      zeros = jnp.zeros((blocks.keys, blocks.values), jnp.float32)
      return (zeros,) * self._plan.key_tiles
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


def _walk(plan: Plan, q, k, v, prepared, documents, state, scale, dtype, save, interpret):
  """y, S_T, and the states before the chunks or None."""
  batch, heads, sizes = plan.batch, plan.heads, (plan.key_dim, plan.value_dim)
  rows = batch * plan.most * plan.length
  q, k, prepared, documents = _walked(q, k, prepared, documents)
  return _call(
    functools.partial(_walk_kernel, scale=scale),
    plan,
    (plan.value_tiles, heads, batch),
    [
      jax.ShapeDtypeStruct((batch, plan.length, plan.most, plan.value_dim), dtype),
      jax.ShapeDtypeStruct((batch, heads, *sizes), jnp.float32),
      jax.ShapeDtypeStruct((batch, heads, plan.chunks, *sizes), v.dtype) if save else None,
    ],
    name="linear_attention_forward",
    flops=rows * (2 * plan.blocks.chunk * sum(sizes) + 4 * sizes[0] * sizes[1]),
    warps=plan.blocks.warps,
    interpret=interpret,
  )(q, k, v, prepared, documents, state)


def _walk_kernel(
  q_ref,
  k_ref,
  v_ref,
  prepared,
  documents_ref,
  state_ref,
  y_ref,
  last_ref,
  starts_ref,
  *,
  plan: Plan,
  scale: float,
):
  tile, head, batch = (pl.program_id(axis) for axis in range(3))
  columns, columns_exist = plan.values(tile)
  tiles, dtype = _State(plan, batch, head, tile), v_ref.dtype

  def step(number, state):
    seen = _Seen(plan, q_ref, k_ref, prepared, documents_ref, batch, head, number)
    rows, exists = seen.chunk.rows, seen.chunk.exists
    if starts_ref is not None:
      tiles.store(starts_ref, state, number)
    index = (batch, rows, plan.head(v_ref, head * plan.group), columns)
    v = load(v_ref, index, exists, columns_exist)

    def of_query(query, done):
      queries = seen.queries(query)
      within = dot(seen.pairs(query, queries).astype(dtype), v)
      before = add(dot(q, part.astype(dtype)) for q, part in zip(queries, state, strict=True))
      index = (batch, rows, head * plan.group + query, columns)
      y = scale * (within + times(before, seen.read, 0))
      store(y_ref, index, y, exists, columns_exist)
      return done

    jax.lax.fori_loop(0, plan.group, of_query, 0)
    written = times(v, seen.write, 0).astype(dtype)
    return tuple(
      _scaled(part, keep) + dot(k, written, (0, 0))
      for part, keep, k in zip(state, seen.keeps, seen.keys, strict=True)
    )

  state = jax.lax.fori_loop(0, plan.chunks, step, tiles.load(state_ref))
  tiles.store(last_ref, state)


def _walked(q, k, prepared: Prepared | None, documents):
  """What a walk reads for q, k, the rest of what is prepared, and documents."""
  if prepared is None:
    return q, k, None, documents
  if prepared.reading is not None:
    q, k = prepared.reading, prepared.written
  return q, k, prepared._replace(reading=None, written=None), None


def _scaled(state, keep):
  """A tile of the state times what is left of it: a number, [K] or None."""
  return times(state, keep, 0) if keep is None or keep.ndim else state * keep


def _walk_back(plan: Plan, q, k, v, prepared, documents, dy, dstate, scale, interpret):
  """dv, the cotangents of the states after the chunks [B, H, N, K, V] in the dtype of q, dS_0."""
  batch, heads, sizes = plan.batch, plan.heads, (plan.key_dim, plan.value_dim)
  rows = batch * plan.most * plan.length
  dtype = q.dtype
  q, k, prepared, documents = _walked(q, k, prepared, documents)
  return _call(
    functools.partial(_walk_back_kernel, scale=scale),
    plan,
    (plan.value_tiles, heads, batch),
    [
      _gradient_of(v, heads),
      jax.ShapeDtypeStruct((batch, heads, plan.chunks, *sizes), dtype),
      jax.ShapeDtypeStruct((batch, heads, *sizes), jnp.float32),
    ],
    name="linear_attention_backward_states",
    flops=rows * (2 * plan.blocks.chunk * sum(sizes) + 4 * sizes[0] * sizes[1]),
    warps=plan.blocks.warps,
    interpret=interpret,
  )(q, k, prepared, documents, dy, dstate)


def _walk_back_kernel(
  q_ref,
  k_ref,
  prepared,
  documents_ref,
  dy_ref,
  dstate_ref,
  dv_ref,
  dends_ref,
  dfirst_ref,
  *,
  plan: Plan,
  scale: float,
):
  tile, head, batch = (pl.program_id(axis) for axis in range(3))
  columns, columns_exist = plan.values(tile)
  tiles, dtype = _State(plan, batch, head, tile), dends_ref.dtype

  def step(back, dstate):
    number = plan.chunks - 1 - back
    seen = _Seen(plan, q_ref, k_ref, prepared, documents_ref, batch, head, number)
    rows, exists = seen.chunk.rows, seen.chunk.exists
    tiles.store(dends_ref, dstate, number)
    after = add(dot(k, part.astype(dtype)) for k, part in zip(seen.keys, dstate, strict=True))

    def of_query(query, carry):
      dv, read = carry
      queries = seen.queries(query)
      index = (batch, rows, head * plan.group + query, columns)
      dy = scale * load(dy_ref, index, exists, columns_exist).astype(jnp.float32)
      pairs = seen.pairs(query, queries, by_key=True).astype(dtype)
      dv += dot(pairs, dy.astype(dtype))
      dread = times(dy, seen.read, 0).astype(dtype)
      read = tuple(
        part + dot(q, dread, (0, 0)) for part, q in zip(read, queries, strict=True)
      )
      return dv, read

    dstate = tuple(_scaled(part, keep) for part, keep in zip(dstate, seen.keeps, strict=True))
    dv, dstate = jax.lax.fori_loop(
      0, plan.group, of_query, (times(after, seen.write, 0), dstate)
    )
    store(dv_ref, (batch, rows, head, columns), dv, exists, columns_exist)
    return dstate

  dstate = jax.lax.fori_loop(0, plan.chunks, step, tiles.load(dstate_ref))
  tiles.store(dfirst_ref, dstate)


def _pull_back(plan: Plan, q, k, v, g, starts, dends, documents, dy, scale, interpret):
  """dq, dk, and dg [B, T, M] or [B, T, M, K]: a head for each user."""
  rows, vector = plan.batch * plan.most * plan.length, _is_vector(g)
  if vector:
    plan = plan.with_keys(VECTOR_KEYS)
  dg = None
  if g is not None:
    shape = (plan.batch, plan.length, plan.most, *g.shape[3:])
    dg = jax.ShapeDtypeStruct(shape, jnp.float32)
  levels = plan.blocks.chunk.bit_length() - 1 if vector else 1
  return _call(
    functools.partial(_pull_back_kernel, scale=scale),
    plan,
    (plan.chunks, plan.most, plan.batch),
    [_gradient_of(q, plan.most), _gradient_of(k, plan.most), dg],
    name="linear_attention_backward",
    flops=rows * 2 * plan.blocks.chunk * (2 * levels * plan.key_dim + plan.value_dim)
    + rows * 4 * plan.key_dim * plan.value_dim,
    exponentials=0 if g is None else rows * plan.key_dim * levels,
    warps=4 if vector else 8,
    interpret=interpret,
  )(q, k, v, g, starts, dends, documents, dy)


def _pull_back_kernel(
  q_ref,
  k_ref,
  v_ref,
  g_ref,
  starts_ref,
  dends_ref,
  documents_ref,
  dy_ref,
  dq_ref,
  dk_ref,
  dg_ref,
  *,
  plan: Plan,
  scale: float,
):
  number, user, batch = (pl.program_id(axis) for axis in range(3))
  chunk = Chunk(plan, documents_ref, batch, number)
  size, dtype, head = plan.blocks.chunk, q_ref.dtype, user // plan.group
  rows, exists = chunk.rows, chunk.exists

  def values_of(tile):
    """dy and v of a tile."""
    columns, columns_exist = plan.values(tile)
    dy = load(dy_ref, (batch, rows, user, columns), exists, columns_exist).astype(jnp.float32)
    v = load(v_ref, (batch, rows, plan.head(v_ref, user), columns), exists, columns_exist)
    return (scale * dy).astype(dtype), v

  def of_pairs(tile, dpairs):
    return dpairs + dot(*values_of(tile), (1, 1))

  dpairs = jnp.zeros((size, size), jnp.float32)
  dpairs = jax.lax.fori_loop(0, plan.value_tiles, of_pairs, dpairs)
  scalar = g_ref is not None and len(g_ref.shape) == 3
  if scalar:
    g = load(g_ref, (batch, rows, plan.head(g_ref, user)), exists)
    weights = Weights(chunk, g)
    dpairs = weights.decay(dpairs).astype(dtype)
  else:
    dpairs = jnp.where(chunk.visible(), dpairs, 0).astype(dtype)

  def of_keys(tile, carry):
    channels, exist = plan.keys(tile)

    def of_states(tile, carry):
      dread, dwritten, through = carry
      dy, v = values_of(tile)
      columns, columns_exist = plan.values(tile)
      start, dend = (
        load(ref, (batch, head, number, channels, columns), exist, columns_exist)
        for ref in (starts_ref, dends_ref)
      )
      through += jnp.sum(start.astype(jnp.float32) * dend.astype(jnp.float32), axis=1)
      return dread + dot(dy, start, (1, 1)), dwritten + dot(v, dend, (1, 1)), through

    zeros = jnp.zeros((size, plan.blocks.keys), jnp.float32)
    states = zeros, zeros, jnp.zeros((plan.blocks.keys,), jnp.float32)
    dread, dwritten, through = jax.lax.fori_loop(0, plan.value_tiles, of_states, states)
    if plan.group > 1:  # the state's own part belongs to one of the queries that share it
      first = user % plan.group == 0
      dwritten, through = (jnp.where(first, x, 0) for x in (dwritten, through))

    def tile_of(ref):
      index = (batch, rows, plan.head(ref, user), channels)
      return load(ref, index, exists, exist)

    if g_ref is None:
      dq = dot(dpairs, tile_of(k_ref)) + times(dread, chunk.reads, 0)
      dk = dot(dpairs, tile_of(q_ref), (0, 0)) + times(dwritten, chunk.writes, 0)
    elif scalar:
      q, k = tile_of(q_ref), tile_of(k_ref)
      dq = dot(dpairs, k) + times(dread, weights.read, 0)
      dk, dwritten = dot(dpairs, q, (0, 0)), times(dwritten, weights.write, 0)
      found = jnp.sum(q * dq - k * dk, axis=1), jnp.sum(k * dwritten, axis=1), jnp.sum(through)
      carry = tuple(old + new for old, new in zip(carry, found, strict=True))
      dk += dwritten
    else:
      levels = Levels(size, functools.partial(tile_of, g_ref), dtype)
      dread *= times(levels.until(), chunk.reads, 0)
      dwritten *= times(levels.after(), chunk.writes, 0)
      load_rows = functools.partial(tile_of, q_ref), functools.partial(tile_of, k_ref)
      dq, dk, dg = _pull_vector(levels, *load_rows, dpairs, dread, dwritten)
      dg += (kept(chunk.keeps, levels.total()) * through)[None, :]
      store(dg_ref, (batch, rows, user, channels), dg, exists, exist)
    for ref, gradient in ((dq_ref, dq), (dk_ref, dk)):
      store(ref, (batch, rows, user, channels), gradient, exists, exist)
    return carry

  row = jnp.zeros((size,), jnp.float32)
  carry = (row, row, jnp.float32(0)) if scalar else ()
  carry = jax.lax.fori_loop(0, plan.key_tiles, of_keys, carry)
  if scalar:
    read, written, through = carry
    dg = sum_passed(read, written) + weights.keep * through
    store(dg_ref, (batch, rows, user), dg, exists)


def _pull_vector(levels: Levels, load_q, load_k, dpairs, dread, dwritten):
  """dq, dk, and dg [C, K] but for what the chunk passes on of the state before it.

  dpairs comes masked, dread and dwritten decayed; q and k are loaded where they are used.
  """
  dtype = dpairs.dtype

  def at_level(level, gradients):
    dq, dk = gradients
    decay, second, together = levels.at(level)
    of_query, of_key = jnp.where(second, decay, 0), jnp.where(second, 0, decay)
    part = jnp.where(together, dpairs, 0)
    dq += of_query * dot(part, (load_k() * of_key).astype(dtype))
    dk += of_key * dot(part, (load_q() * of_query).astype(dtype), (0, 0))
    return dq, dk

  dq, dk = jax.lax.fori_loop(0, levels.count, at_level, (dread, jnp.zeros_like(dread)))
  row, column = orient(False)
  token, q, k = jnp.arange(levels.size), load_q(), load_k()
  dg = add_rows(column(token) >= row(token), split(q * dq - k * dk, dtype))
  dg += add_rows(column(token) < row(token), split(k * dwritten, dtype))
  itself = jnp.sum(jnp.where(row(token) == column(token), dpairs, 0).astype(jnp.float32), axis=1)
  return dq + row(itself) * k, dk + dwritten + row(itself) * q, dg
