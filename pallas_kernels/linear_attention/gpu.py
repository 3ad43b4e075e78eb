"""Causal linear attention on GPU.

Forward: one program for each state and tile of its values walks the chunks of C tokens in order,
the state [K, tile] float32 in its registers. Programs of one state stand beside one another in the
grid, so that q and k come from HBM once and from the cache for the others. A pass for the states of
all chunks and then all chunks at once would have more programs, but write and read those states
even without differentiation: at C = 64 and head size 128 as many bytes again as q, k, v and y.
Where states are few, values are cut finer instead (`choose_blocks`).

With decay the pair weights of the chunks are computed beforehand, for all chunks at once
(`prepare`), and the walks only multiply: their path is short, and leaves registers free on every
GPU. The backward uses them again.
Backward: the same walk from the end carries the cotangent of the state, yields dv, and keeps the
cotangent of the state after each chunk; dq, dk and dg then need nothing from other chunks.

Bytes, a token and head at b bytes a number: forward b (2 K + 2 V), with one decay a token
b (2 K + 2 C) more, with one a channel 4 K + b (4 K + 2 C) more; under differentiation b K V / C
more. Backward b (6 K + 5 V + 4 K V / C), with decay b C more, with one a channel also
8 K + 2 b (V + C). Flops: forward 2 C (K + V) + 4 K V, backward 2 C (2 K + 2 V) + 8 K V; with a
decay a channel 2 C K more for each of log2 C sizes of block, twice that in the backward, and four
times that for the sums of decays.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.chunks import mixed_dtypes
from pallas_kernels.chunks_gpu import (
  NARROW,
  NARROWEST,
  Blocks,
  Chunk,
  Levels,
  Plan,
  Weights,
  add,
  add_rows,
  apart,
  call,
  dot,
  gradient_of,
  is_vector,
  kept,
  load,
  make_plan,
  orient,
  shortage,
  split,
  store,
  sum_passed,
  sum_shared,
  times,
)
from pallas_kernels.walks_gpu import (
  Seen,
  State,
  no_decay,
  prepare,
  scaled,
  what_walks_read,
)


def refusal(q, k, v, g=None) -> str | None:
  """Why the kernels cannot run on q, k [B, T, heads, K] and v [B, T, heads, V], or None."""
  return mixed_dtypes(q=q, k=k, v=v) or shortage(q.shape[3])


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
    g: log-decay <= 0, float32: [B, T, H] or [B, T, H, K]; None is no decay. H is the more of the
      heads of k and v.
    state: [B, H, K, V] float32, S_0; None means zeros.
    documents: [B, T] int32 or None: the number of each token's document in its row, from 0 and
      never falling; S is cleared where it changes, and S_0 belongs to document 0.
    scale: multiplies q.   dtype: of y.
    save: also return what `backward` wants.
    blocks: None chooses.   interpret: run the kernel's program on the CPU.
  Returns:
    y: [B, T, most heads, V];   S_T: [B, H, K, V] float32;   with `save` a tuple of arrays with
    batch first and heads second: the state before each chunk [B, H, N, K, V] in the dtype of q, and
    with decay what the chunks are to the state (`Prepared`).
  Source: Katharopoulos et al. 2020 (arXiv 2006.16236), section 3.3; with decay Yang et al. 2024
    (arXiv 2312.06635), section 4.
  """
  plan = make_plan(q, k, v, blocks)
  g, prepared = _held(g, plan, q.dtype), None
  if g is not None:
    name = "linear_attention_pairs"
    prepared = prepare(plan, q, k, g, documents, name=name, dtype=q.dtype, interpret=interpret)
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
  rows = _held(g, plan, q.dtype)
  starts, prepared = starts
  walked = (plan, q, k, v, prepared, documents, dy, dstate)
  dv, dends, dfirst = _walk_back(*walked, scale, interpret)
  dq, dk, dg = _pull_back(plan, q, k, v, rows, starts, dends, documents, dy, scale, interpret)
  dq, dk, dv = (sum_shared(dx, x) for dx, x in ((dq, q), (dk, k), (dv, v)))
  if g is None:
    return dq, dk, dv, None, dfirst
  dg = dg.reshape(*rows.shape[:3], plan.group, *rows.shape[3:]).sum(axis=3)
  return dq, dk, dv, dg, dfirst


def _held(g, plan: Plan, dtype):
  """g; in float32, whose walks have no registers left for the pair weights, zeros for none."""
  return no_decay(plan) if g is None and dtype == jnp.float32 else g


def _walk(plan: Plan, q, k, v, prepared, documents, state, scale, dtype, save, interpret):
  """y, S_T, and the states before the chunks or None."""
  batch, heads, sizes = plan.batch, plan.heads, (plan.key_dim, plan.value_dim)
  rows = batch * plan.most * plan.length
  q, k, prepared, documents = what_walks_read(q, k, prepared, documents)
  return call(
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
  tiles, dtype = State(plan, batch, head, tile), v_ref.dtype

  def step(number, state):
    seen = Seen(plan, q_ref, k_ref, prepared, documents_ref, batch, head, number)
    rows, exists = seen.chunk.rows, seen.chunk.exists
    if starts_ref is not None:
      tiles.store(starts_ref, state, number)
    index = (batch, rows, plan.head(v_ref, head * plan.group), columns)
    v = load(v_ref, index, exists, columns_exist)

    def of_query(query, done):
      parts = zip(seen.queries(query), state, strict=True)
      before = times(add(dot(q, part.astype(dtype)) for q, part in parts), seen.read, 0)
      y = scale * (before + dot(seen.pairs(query).astype(dtype), v))
      index = (batch, rows, head * plan.group + query, columns)
      store(y_ref, index, y, exists, columns_exist)
      return done

    jax.lax.fori_loop(0, plan.group, of_query, 0)
    written = times(v, seen.write, 0).astype(dtype)
    return tuple(
      scaled(part, keep) + dot(k, written, (0, 0))
      for part, keep, k in zip(state, seen.keeps, seen.keys, strict=True)
    )

  state = jax.lax.fori_loop(0, plan.chunks, step, tiles.load(state_ref))
  tiles.store(last_ref, state)


def _walk_back(plan: Plan, q, k, v, prepared, documents, dy, dstate, scale, interpret):
  """dv, the cotangents of the states after the chunks [B, H, N, K, V] in the dtype of q, dS_0."""
  batch, heads, sizes = plan.batch, plan.heads, (plan.key_dim, plan.value_dim)
  rows = batch * plan.most * plan.length
  dtype = q.dtype
  q, k, prepared, documents = what_walks_read(q, k, prepared, documents)
  return call(
    functools.partial(_walk_back_kernel, scale=scale),
    plan,
    (plan.value_tiles, heads, batch),
    [
      gradient_of(v, heads),
      jax.ShapeDtypeStruct((batch, heads, plan.chunks, *sizes), dtype),
      jax.ShapeDtypeStruct((batch, heads, *sizes), jnp.float32),
    ],
    name="linear_attention_backward_states",
    flops=rows * (2 * plan.blocks.chunk * sum(sizes) + 4 * sizes[0] * sizes[1]),
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
  tiles, dtype = State(plan, batch, head, tile), dends_ref.dtype

  def step(back, dstate):
    number = plan.chunks - 1 - back
    seen = Seen(plan, q_ref, k_ref, prepared, documents_ref, batch, head, number)
    rows, exists = seen.chunk.rows, seen.chunk.exists
    tiles.store(dends_ref, dstate, number)
    after = add(dot(k, part.astype(dtype)) for k, part in zip(seen.keys, dstate, strict=True))

    def of_query(query, carry):
      dv, read = carry
      index = (batch, rows, head * plan.group + query, columns)
      dy = scale * load(dy_ref, index, exists, columns_exist).astype(jnp.float32)
      dv += dot(seen.pairs(query, by_key=True).astype(dtype), dy.astype(dtype))
      dread = times(dy, seen.read, 0).astype(dtype)
      parts = zip(read, seen.queries(query), strict=True)
      read = tuple(part + dot(q, dread, (0, 0)) for part, q in parts)
      return dv, read

    dstate = tuple(scaled(part, keep) for part, keep in zip(dstate, seen.keeps, strict=True))
    dv, dstate = jax.lax.fori_loop(0, plan.group, of_query, (times(after, seen.write, 0), dstate))
    store(dv_ref, (batch, rows, head, columns), dv, exists, columns_exist)
    return dstate

  dstate = jax.lax.fori_loop(0, plan.chunks, step, tiles.load(dstate_ref))
  tiles.store(dfirst_ref, dstate)


def _pull_back(plan: Plan, q, k, v, g, starts, dends, documents, dy, scale, interpret):
  """dq, dk, and dg [B, T, M] or [B, T, M, K]: a head for each user."""
  plan = plan.with_keys(NARROW if q.dtype == jnp.bfloat16 else NARROWEST)
  rows, size = plan.batch * plan.most * plan.length, plan.blocks.chunk
  of_rows = [gradient_of(q, plan.most), gradient_of(k, plan.most)]
  if g is not None:
    shape = (plan.batch, plan.length, plan.most, *g.shape[3:])
    of_rows.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  states = rows * 4 * plan.key_dim * plan.value_dim
  of_pairs = rows * 2 * size * plan.value_dim
  grid = (plan.chunks, plan.most, plan.batch)
  if not is_vector(g):
    found = call(
      functools.partial(_pull_kernel, scale=scale),
      plan,
      grid,
      of_rows,
      name="linear_attention_backward",
      flops=states + of_pairs + rows * 4 * size * plan.key_dim,
      interpret=interpret,
    )(q, k, v, g, starts, dends, documents, dy)
    return found if g is not None else (*found, None)
  dpairs = call(
    functools.partial(_pair_cotangents_kernel, scale=scale),
    plan,
    grid,
    jax.ShapeDtypeStruct((plan.batch, plan.most, plan.length, size), q.dtype),
    name="linear_attention_backward_pairs",
    flops=of_pairs,
    interpret=interpret,
  )(v, documents, dy)
  levels, plan = size.bit_length() - 1, plan.with_keys(NARROWEST)
  return call(
    functools.partial(_pull_vector_kernel, scale=scale),
    plan,
    (plan.key_tiles, *grid),
    of_rows,
    name="linear_attention_backward",
    flops=states + rows * 4 * size * plan.key_dim * levels,
    exponentials=rows * plan.key_dim * (levels + 2),
    interpret=interpret,
  )(q, k, v, g, starts, dends, documents, dy, dpairs)


class Pulled:
  """What the kernels that pull cotangents back see of one chunk, for one user of its state."""

  def __init__(self, plan: Plan, documents_ref, number, user, batch, scale: float):
    self.plan, self.number, self.user, self.batch = plan, number, user, batch
    self.chunk, self._scale = Chunk(plan, documents_ref, batch, number), scale

  def tile(self, ref, channels, exist):
    """Rows of one of q, k, v, g."""
    index = (self.batch, self.chunk.rows, self.plan.head(ref, self.user), channels)
    return load(ref, index, self.chunk.exists, exist)

  def values(self, dy_ref, v_ref, tile):
    """dy, scaled and in the dtype of v, and v, of a tile of values."""
    columns, exist = self.plan.values(tile)
    v = self.tile(v_ref, columns, exist)
    dy = self._scale * self.tile(dy_ref, columns, exist).astype(jnp.float32)
    return dy.astype(v.dtype), v

  def pairs(self, dy_ref, v_ref):
    """[C, C], cotangents of the pair weights, not masked."""

    def add_tile(tile, dpairs):
      return dpairs + dot(*self.values(dy_ref, v_ref, tile), (1, 1))

    zeros = jnp.zeros((self.plan.blocks.chunk,) * 2, jnp.float32)
    return jax.lax.fori_loop(0, self.plan.value_tiles, add_tile, zeros)

  def states(self, dy_ref, v_ref, starts_ref, dends_ref, keys):
    """For the channels `keys`: what dy and the state before the chunk give dq, what v and the
    cotangent of the state after it give dk, [C, K] both; and [K], the product of the two states."""
    plan, head = self.plan, self.user // self.plan.group
    channels, exist = keys

    def add_tile(tile, found):
      dread, dwritten, through = found
      dy, v = self.values(dy_ref, v_ref, tile)
      columns, columns_exist = plan.values(tile)
      start, dend = (
        load(ref, (self.batch, head, self.number, channels, columns), exist, columns_exist)
        for ref in (starts_ref, dends_ref)
      )
      through += jnp.sum(start.astype(jnp.float32) * dend.astype(jnp.float32), axis=1)
      return dread + dot(dy, start, (1, 1)), dwritten + dot(v, dend, (1, 1)), through

    zeros = jnp.zeros((plan.blocks.chunk, plan.blocks.keys), jnp.float32)
    found = zeros, zeros, jnp.zeros((plan.blocks.keys,), jnp.float32)
    dread, dwritten, through = jax.lax.fori_loop(0, plan.value_tiles, add_tile, found)
    if plan.group > 1:  # the state's own part belongs to one of the queries that share it
      first = self.user % plan.group == 0
      dwritten, through = (jnp.where(first, x, 0) for x in (dwritten, through))
    return dread, dwritten, through

  def store(self, ref, gradient, channels, exist):
    """Writes a tile of a gradient."""
    index = (self.batch, self.chunk.rows, self.user, channels)
    store(ref, index, gradient, self.chunk.exists, exist)


def _pull_kernel(
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
  dg_ref=None,
  *,
  plan: Plan,
  scale: float,
):
  """Without decay or with one a token.

  A decay counts wherever it stands between what is read and what was written. So dg_r sums q dq of
  the queries from r on, less k dk of their keys from r on, k dk of keys before r that stay in the
  state, and what passes through from the state before: terms that belong together, where sums over
  the whole sequence would cancel.
  """
  number, user, batch = (pl.program_id(axis) for axis in range(3))
  seen = Pulled(plan, documents_ref, number, user, batch, scale)
  chunk, dtype, decays = seen.chunk, q_ref.dtype, g_ref is not None
  read, write = chunk.reads, chunk.writes
  dpairs = seen.pairs(dy_ref, v_ref)
  if decays:
    weights = Weights(chunk, load(g_ref, (batch, chunk.rows, plan.head(g_ref, user)), chunk.exists))
    read, write = weights.read, weights.write
    dpairs = weights.decay(dpairs).astype(dtype)
    dpairs, own = apart(dpairs)
  else:
    dpairs = jnp.where(chunk.visible(), dpairs, 0).astype(dtype)

  def of_keys(tile, found):
    keys = plan.keys(tile)
    dread, dwritten, through = seen.states(dy_ref, v_ref, starts_ref, dends_ref, keys)
    q, k = seen.tile(q_ref, *keys), seen.tile(k_ref, *keys)
    dq = dot(dpairs, k) + times(dread, read, 0)
    dk, dwritten = dot(dpairs, q, (0, 0)), times(dwritten, write, 0)
    if decays:
      sums = jnp.sum(q * dq - k * dk, axis=1), jnp.sum(k * dwritten, axis=1), jnp.sum(through)
      found = tuple(old + new for old, new in zip(found, sums, strict=True))
      dq, dk = dq + times(k, own, 0), dk + times(q, own, 0)
    seen.store(dq_ref, dq, *keys)
    seen.store(dk_ref, dk + dwritten, *keys)
    return found

  row = jnp.zeros((plan.blocks.chunk,), jnp.float32)
  found = (row, row, jnp.float32(0)) if decays else ()
  found = jax.lax.fori_loop(0, plan.key_tiles, of_keys, found)
  if decays:
    dg = sum_passed(*found[:2]) + weights.keep * found[2]
    store(dg_ref, (batch, chunk.rows, user), dg, chunk.exists)


def _pair_cotangents_kernel(v_ref, documents_ref, dy_ref, dpairs_ref, *, plan: Plan, scale: float):
  number, user, batch = (pl.program_id(axis) for axis in range(3))
  seen = Pulled(plan, documents_ref, number, user, batch, scale)
  chunk, every = seen.chunk, pl.ds(0, plan.blocks.chunk)
  dpairs = jnp.where(chunk.visible(), seen.pairs(dy_ref, v_ref), 0)
  store(dpairs_ref, (batch, user, chunk.rows, every), dpairs, chunk.exists, None)


def _pull_vector_kernel(
  q_ref,
  k_ref,
  v_ref,
  g_ref,
  starts_ref,
  dends_ref,
  documents_ref,
  dy_ref,
  dpairs_ref,
  dq_ref,
  dk_ref,
  dg_ref,
  *,
  plan: Plan,
  scale: float,
):
  """As `_pull_kernel`, with a decay for each channel, so that dg is a sum for each channel. Tiles
  are loaded where they are used: held, they would overfill the registers."""
  tile, number, user, batch = (pl.program_id(axis) for axis in range(4))
  seen = Pulled(plan, documents_ref, number, user, batch, scale)
  chunk, dtype, keys, size = seen.chunk, q_ref.dtype, plan.keys(tile), plan.blocks.chunk
  levels = Levels(size, lambda: seen.tile(g_ref, *keys), dtype)

  def load_pairs():
    index = (batch, user, chunk.rows, pl.ds(0, size))
    return load(dpairs_ref, index, chunk.exists, None)

  def at_level(level, gradients):
    dq, dk = gradients
    decay, second, together = levels.at(level)
    of_query, of_key = jnp.where(second, decay, 0), jnp.where(second, 0, decay)
    dpairs = jnp.where(together, load_pairs(), 0)
    q, k = seen.tile(q_ref, *keys), seen.tile(k_ref, *keys)
    dq += of_query * dot(dpairs, (k * of_key).astype(dtype))
    dk += of_key * dot(dpairs, (q * of_query).astype(dtype), (0, 0))
    return dq, dk

  zeros = jnp.zeros((size, plan.blocks.keys), jnp.float32)
  dq, dk = jax.lax.fori_loop(0, levels.count, at_level, (zeros, zeros))
  dread, dwritten, through = seen.states(dy_ref, v_ref, starts_ref, dends_ref, keys)
  dq += dread * times(levels.until(), chunk.reads, 0)
  dwritten *= times(levels.after(), chunk.writes, 0)
  q, k = seen.tile(q_ref, *keys), seen.tile(k_ref, *keys)
  row, column = orient(False)
  token = jnp.arange(size)
  dg = add_rows(column(token) >= row(token), split(q * dq - k * dk, dtype))
  dg += add_rows(column(token) < row(token), split(k * dwritten, dtype))
  dg += (kept(chunk.keeps, levels.total()) * through)[None, :]
  seen.store(dg_ref, dg, *keys)
  _, own = apart(load_pairs())
  seen.store(dq_ref, dq + times(k, own, 0), *keys)
  seen.store(dk_ref, dk + dwritten + times(q, own, 0), *keys)
