"""The delta rule on GPU.

What a chunk writes depends on the state before it by one product: with M its keys' decayed
products, strictly lower triangular, times beta, and X = (I + M)^-1,

    written = U - W S        U = X (beta V)        W = X (beta K as it reads S)

U and W are computed for all chunks at once; a walk as that of linear attention then carries S, and
reads the pair weights A from HBM, as it does there with decay.

Backward: the walk from the end carries the cotangent of S and yields that of `written`; X^T takes
it back to the values and to M, and the rest needs nothing from other chunks. X, W and `written` are
kept for it, since the inverse is the dearest part.

Bytes, a token and head at b bytes a number, with C = 64: forward b (5 K + 6 V + 4 C) + 4 C; kept
for the backward b (K V / C + 2 C + K + V). The inverse is built by doubling the size of the blocks
that are inverted, X - X M_l X with M_l what couples two neighbours: no power of M is formed, which
grows without bound where keys repeat. Its products keep 16 digits, in float32 all (`dot`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.chunks import mixed_dtypes
from pallas_kernels.chunks_gpu import (
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
  Prepared,
  Seen,
  State,
  no_decay,
  prepare,
  scaled,
  what_walks_read,
)


def refusal(q, k, v, beta, g=None) -> str | None:
  """Why the kernels cannot run on q, k, v [B, T, heads, .] and beta [B, T, H], or None."""
  if q.shape[2] > beta.shape[2]:
    return f"q has {q.shape[2]} heads, expected no more than the {beta.shape[2]} of the state"
  return mixed_dtypes(q=q, k=k, v=v) or shortage(q.shape[3])


def forward(
  q,
  k,
  v,
  beta,
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
  """The delta rule.

      S~  = exp(g_t) * S_{t-1}
      S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T        y_t = scale * S_t^T q_t

  Args:
    beta: [B, T, H] float32, write strength, H the more of the heads of k and v.
    others: as for linear attention; q has no more heads than the state.
  Returns:
    y: [B, T, H, V];   S_T: [B, H, K, V] float32;   with `save` a tuple of arrays with batch first
    and heads second.
  Source: Yang et al. 2024 (arXiv 2406.06484), section 3; with decay Yang et al. 2024 (arXiv
    2412.06464) and Kimi Team 2025 (arXiv 2510.26692), section 3.
  """
  plan = make_plan(q, k, v, blocks)
  g = no_decay(plan) if g is None else g
  options = {"name": "delta_rule_pairs", "interpret": interpret}
  prepared = prepare(plan, q, k, g, documents, dtype=q.dtype, **options)
  of_keys = prepare(plan, k, k, g, documents, dtype=jnp.float32, **options)
  x, u, w = _solve(plan, k, v, beta, of_keys, interpret)
  y, state, *saved = _walk(plan, q, k, u, w, prepared, state, scale, dtype, save, interpret)
  return (y, state, (*saved, prepared, x, w)) if save else (y, state)


def backward(
  q,
  k,
  v,
  beta,
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
    q, k, v, beta, g, documents, scale, blocks, interpret: as given to `forward`; starts: its own.
    dy: [B, T, H, V], any float dtype.   dstate: [B, H, K, V] float32: cotangents of y and S_T.
  Returns:
    dq, dk, dv in the shapes and the dtype of q, k, v; dbeta, and dg in the shape of g or None,
    float32; dS_0: [B, H, K, V] float32.
  """
  plan = make_plan(q, k, v, blocks)
  rows = no_decay(plan) if g is None else g
  starts, written, prepared, x, w = starts
  dy = (scale * dy.astype(jnp.float32)).astype(q.dtype)
  dwritten, dends, dfirst = _walk_back(plan, q, k, w, prepared, dy, dstate, interpret)
  given = (x, written, dwritten, documents, dy)
  solved = _pull_solved(plan, v, beta, None if is_vector(rows) else rows, given, interpret)
  dv, of_values, *solved = solved
  states = (starts, dends, written, dy, *solved)
  dq, dk, of_keys, dg = _pull_back(plan, q, k, beta, rows, states, documents, interpret)
  dq, dk, dv = (sum_shared(dx, x) for dx, x in ((dq, q), (dk, k), (dv, v)))
  dg = None if g is None else dg if is_vector(g) else dg.sum(axis=0)
  return dq, dk, dv, of_values + of_keys.sum(axis=0), dg, dfirst


def _shape(plan: Plan, dim: int, dtype):
  """Rows, head-major."""
  return jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.length, dim), dtype)


def _rows(plan: Plan) -> int:
  return plan.batch * plan.heads * plan.length


def _solve(plan: Plan, k, v, beta, of_keys: Prepared, interpret):
  """X [B, H, T, C], U [B, H, T, V], W [B, H, T, K]."""
  size = plan.blocks.chunk
  reading = k if of_keys.reading is None else of_keys.reading
  given = of_keys._replace(reading=None, written=None, write=None, keep=None)
  return call(
    _solve_kernel,
    plan,
    (plan.chunks, plan.heads, plan.batch),
    [_shape(plan, dim, k.dtype) for dim in (size, plan.value_dim, plan.key_dim)],
    name="delta_rule_solve",
    flops=_rows(plan) * 2 * size * (plan.key_dim + plan.value_dim + 2 * size * 6),
    warps=8,
    interpret=interpret,
  )(reading, v, beta, given)


def _solve_kernel(k_ref, v_ref, beta_ref, of_keys, x_ref, u_ref, w_ref, *, plan: Plan):
  number, head, batch = (pl.program_id(axis) for axis in range(3))
  chunk, size, dtype = Chunk(plan, None, batch, number), plan.blocks.chunk, u_ref.dtype
  every, own = pl.ds(0, size), (batch, head, chunk.rows)
  row, column = orient(False)
  token = jnp.arange(size)

  def load_beta():  # where it is used, since the inverse fills the registers
    return load(beta_ref, (batch, chunk.rows, head), chunk.exists)

  def double(level, x):
    half, block = token >> level, token >> (level + 1)
    couples = (row(block) == column(block)) & (row(half) > column(half))
    m = times(load(of_keys.pairs, (*own, every), chunk.exists, None), load_beta(), 0)
    return x - dot(dot(x, jnp.where(couples, m, 0), dtype=dtype), x, dtype=dtype)

  x = (row(token) == column(token)).astype(jnp.float32)
  x = jax.lax.fori_loop(0, size.bit_length() - 1, double, x).astype(dtype)
  store(x_ref, (*own, every), x, chunk.exists, None)

  def of_values(tile, done):
    columns, exist = plan.values(tile)
    v = load(v_ref, (batch, chunk.rows, plan.head(v_ref, head), columns), chunk.exists, exist)
    store(
      u_ref, (*own, columns), dot(x, times(v, load_beta(), 0).astype(dtype)), chunk.exists, exist
    )
    return done

  def of_channels(tile, done):
    channels, exist = plan.keys(tile)
    read, index = load_beta(), (*own, channels)
    if of_keys.read is not None:
      read *= load(of_keys.read, own, chunk.exists)
      index = (batch, chunk.rows, plan.head(k_ref, head), channels)
    k = times(load(k_ref, index, chunk.exists, exist), read, 0).astype(dtype)
    store(w_ref, (*own, channels), dot(x, k), chunk.exists, exist)
    return done

  jax.lax.fori_loop(0, plan.value_tiles, of_values, 0)
  jax.lax.fori_loop(0, plan.key_tiles, of_channels, 0)


def _erased_tiles(plan: Plan, w_ref, batch, head, chunk: Chunk):
  for channels, exist in map(plan.keys, range(plan.key_tiles)):
    yield load(w_ref, (batch, head, chunk.rows, channels), chunk.exists, exist)


def _walk(plan: Plan, q, k, u, w, prepared, state, scale, dtype, save, interpret):
  """y, S_T, the states before the chunks and what is written, or two times None."""
  sizes = (plan.key_dim, plan.value_dim)
  q, k, prepared, _ = what_walks_read(q, k, prepared, None)
  states = (plan.batch, plan.heads, plan.chunks, *sizes)
  return call(
    functools.partial(_walk_kernel, scale=scale),
    plan,
    (plan.value_tiles, plan.heads, plan.batch),
    [
      jax.ShapeDtypeStruct((plan.batch, plan.length, plan.heads, plan.value_dim), dtype),
      jax.ShapeDtypeStruct((plan.batch, plan.heads, *sizes), jnp.float32),
      jax.ShapeDtypeStruct(states, u.dtype) if save else None,
      jax.ShapeDtypeStruct(u.shape, u.dtype) if save else None,
    ],
    name="delta_rule_forward",
    flops=_rows(plan) * (2 * plan.blocks.chunk * plan.value_dim + 6 * sizes[0] * sizes[1]),
    interpret=interpret,
  )(q, k, u, w, prepared, state)


def _walk_kernel(
  q_ref,
  k_ref,
  u_ref,
  w_ref,
  prepared,
  state_ref,
  y_ref,
  last_ref,
  starts_ref,
  written_ref,
  *,
  plan: Plan,
  scale: float,
):
  tile, head, batch = (pl.program_id(axis) for axis in range(3))
  columns, exist = plan.values(tile)
  tiles, dtype = State(plan, batch, head, tile), u_ref.dtype

  def step(number, state):
    seen = Seen(plan, q_ref, k_ref, prepared, None, batch, head, number)
    rows, exists = seen.chunk.rows, seen.chunk.exists
    parts = [part.astype(dtype) for part in state]
    erased = _erased_tiles(plan, w_ref, batch, head, seen.chunk)
    written = load(u_ref, (batch, head, rows, columns), exists, exist).astype(jnp.float32)
    written -= add(dot(w, part) for w, part in zip(erased, parts, strict=True))
    if starts_ref is not None:
      tiles.store(starts_ref, state, number)
      store(written_ref, (batch, head, rows, columns), written, exists, exist)
    before = add(dot(q, part) for q, part in zip(seen.queries(0), parts, strict=True))
    within = dot(seen.pairs(0).astype(dtype), written.astype(dtype))
    y = scale * (times(before, seen.read, 0) + within)
    store(y_ref, (batch, rows, head, columns), y, exists, exist)
    written = times(written, seen.write, 0).astype(dtype)
    return tuple(
      scaled(part, keep) + dot(k, written, (0, 0))
      for part, keep, k in zip(state, seen.keeps, seen.keys, strict=True)
    )

  state = jax.lax.fori_loop(0, plan.chunks, step, tiles.load(state_ref))
  tiles.store(last_ref, state)


def _walk_back(plan: Plan, q, k, w, prepared, dy, dstate, interpret):
  """Cotangents of what is written [B, H, T, V], of the states after the chunks, and of S_0."""
  sizes = (plan.key_dim, plan.value_dim)
  q, k, prepared, _ = what_walks_read(q, k, prepared, None)
  return call(
    _walk_back_kernel,
    plan,
    (plan.value_tiles, plan.heads, plan.batch),
    [
      _shape(plan, plan.value_dim, dy.dtype),
      jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.chunks, *sizes), dy.dtype),
      jax.ShapeDtypeStruct((plan.batch, plan.heads, *sizes), jnp.float32),
    ],
    name="delta_rule_backward_states",
    flops=_rows(plan) * (2 * plan.blocks.chunk * plan.value_dim + 6 * sizes[0] * sizes[1]),
    interpret=interpret,
  )(q, k, w, prepared, dy, dstate)


def _walk_back_kernel(
  q_ref,
  k_ref,
  w_ref,
  prepared,
  dy_ref,
  dstate_ref,
  dwritten_ref,
  dends_ref,
  dfirst_ref,
  *,
  plan: Plan,
):
  tile, head, batch = (pl.program_id(axis) for axis in range(3))
  columns, exist = plan.values(tile)
  tiles, dtype = State(plan, batch, head, tile), dy_ref.dtype

  def step(back, dstate):
    number = plan.chunks - 1 - back
    seen = Seen(plan, q_ref, k_ref, prepared, None, batch, head, number)
    rows, exists = seen.chunk.rows, seen.chunk.exists
    tiles.store(dends_ref, dstate, number)
    dy = load(dy_ref, (batch, rows, head, columns), exists, exist)
    after = add(dot(k, part.astype(dtype)) for k, part in zip(seen.keys, dstate, strict=True))
    dwritten = times(after, seen.write, 0)
    dwritten += dot(seen.pairs(0, by_key=True).astype(dtype), dy)
    dwritten = dwritten.astype(dtype)
    store(dwritten_ref, (batch, head, rows, columns), dwritten, exists, exist)
    dread = times(dy, seen.read, 0).astype(dtype)
    erased = _erased_tiles(plan, w_ref, batch, head, seen.chunk)
    return tuple(
      scaled(part, keep) + dot(q, dread, (0, 0)) - dot(w, dwritten, (0, 0))
      for part, keep, q, w in zip(dstate, seen.keeps, seen.queries(0), erased, strict=True)
    )

  dstate = jax.lax.fori_loop(0, plan.chunks, step, tiles.load(dstate_ref))
  tiles.store(dfirst_ref, dstate)


def _pull_solved(plan: Plan, v, beta, g, given, interpret):
  """dv, what values give dbeta [B, T, H], R = X^T dwritten [B, H, T, V], and cotangents of the pair
  weights and of M before beta [B, H, T, C], masked and, with one decay a token, decayed."""
  size = plan.blocks.chunk
  pairs = _shape(plan, size, v.dtype)
  return call(
    _pull_solved_kernel,
    plan,
    (plan.chunks, plan.heads, plan.batch),
    [
      gradient_of(v, plan.heads),
      jax.ShapeDtypeStruct(beta.shape, jnp.float32),
      _shape(plan, plan.value_dim, v.dtype),
      pairs,
      pairs,
    ],
    name="delta_rule_backward_pairs",
    flops=_rows(plan) * 6 * size * plan.value_dim,
    interpret=interpret,
  )(v, beta, g, *given)


def _pull_solved_kernel(
  v_ref,
  beta_ref,
  g_ref,
  x_ref,
  written_ref,
  dwritten_ref,
  documents_ref,
  dy_ref,
  dv_ref,
  dbeta_ref,
  right_ref,
  dpairs_ref,
  dm_ref,
  *,
  plan: Plan,
):
  number, head, batch = (pl.program_id(axis) for axis in range(3))
  chunk, size = Chunk(plan, documents_ref, batch, number), plan.blocks.chunk
  every, own = pl.ds(0, size), (batch, head, chunk.rows)
  beta = load(beta_ref, (batch, chunk.rows, head), chunk.exists)

  def of_values(tile, found):
    dpairs, dm, dbeta = found
    columns, exist = plan.values(tile)

    def own_tile(ref):
      return load(ref, (*own, columns), chunk.exists, exist)

    x = load(x_ref, (*own, every), chunk.exists, None)
    right = dot(x, own_tile(dwritten_ref), (0, 0))
    v = load(v_ref, (batch, chunk.rows, plan.head(v_ref, head), columns), chunk.exists, exist)
    dy = load(dy_ref, (batch, chunk.rows, head, columns), chunk.exists, exist)
    index = (batch, chunk.rows, head, columns)
    store(dv_ref, index, times(right, beta, 0), chunk.exists, exist)
    store(right_ref, (*own, columns), right, chunk.exists, exist)
    written = own_tile(written_ref)
    dpairs += dot(dy, written, (1, 1))
    dm -= dot(right.astype(written.dtype), written, (1, 1))
    return dpairs, dm, dbeta + jnp.sum(right * v, axis=1)

  zeros = jnp.zeros((size, size), jnp.float32)
  found = zeros, zeros, jnp.zeros((size,), jnp.float32)
  dpairs, dm, dbeta = jax.lax.fori_loop(0, plan.value_tiles, of_values, found)
  store(dbeta_ref, (batch, chunk.rows, head), dbeta, chunk.exists)
  if g_ref is None:
    dpairs, dm = (jnp.where(chunk.visible(), pairs, 0) for pairs in (dpairs, dm))
  else:
    weights = Weights(chunk, load(g_ref, (batch, chunk.rows, head), chunk.exists))
    dpairs, dm = weights.decay(dpairs), weights.decay(dm)
  store(dpairs_ref, (*own, every), dpairs, chunk.exists, None)
  store(dm_ref, (*own, every), apart(dm)[0], chunk.exists, None)


def _pull_back(plan: Plan, q, k, beta, g, states, documents, interpret):
  """dq, dk with a head for each user; what keys give dbeta [tiles, B, T, H]; dg [B, T, H, K], or
  one a token for each tile of keys [tiles, B, T, H]."""
  vector, size = is_vector(g), plan.blocks.chunk
  plan = plan.with_keys(NARROWEST)
  tiles = jax.ShapeDtypeStruct((plan.key_tiles, *beta.shape), jnp.float32)
  levels = size.bit_length() - 1 if vector else 1
  return call(
    _pull_kernel,
    plan,
    (plan.key_tiles, plan.chunks, plan.heads, plan.batch),
    [
      gradient_of(q, plan.heads),
      gradient_of(k, plan.heads),
      tiles,
      jax.ShapeDtypeStruct(g.shape, jnp.float32) if vector else tiles,
    ],
    name="delta_rule_backward",
    flops=_rows(plan) * plan.key_dim * (8 * size * levels + 6 * plan.value_dim),
    exponentials=_rows(plan) * (plan.key_dim * (levels + 2) if vector else 2 * size),
    warps=8 if vector else 4,
    interpret=interpret,
  )(q, k, beta, g, documents, *states)


class _Rows:
  """A tile of keys of one chunk, loaded where it is used: held, it would overfill the registers."""

  def __init__(self, plan: Plan, refs, chunk: Chunk, batch, head, keys):
    self.q_ref, self.k_ref, self.beta_ref, self.g_ref = refs
    self._plan, self.chunk, self._batch, self._head, self._keys = plan, chunk, batch, head, keys

  def tile(self, ref):
    """Of q, k or g."""
    channels, exist = self._keys
    index = (self._batch, self.chunk.rows, self._plan.head(ref, self._head), channels)
    return load(ref, index, self.chunk.exists, exist)

  def row(self, ref):
    """Of beta, or of g with one decay a token."""
    return load(ref, (self._batch, self.chunk.rows, self._head), self.chunk.exists)

  def pairs(self, ref):
    """[C, C]"""
    every = pl.ds(0, self._plan.blocks.chunk)
    index = (self._batch, self._head, self.chunk.rows, every)
    return load(ref, index, self.chunk.exists, None)


def _pull_kernel(
  q_ref,
  k_ref,
  beta_ref,
  g_ref,
  documents_ref,
  starts_ref,
  dends_ref,
  written_ref,
  dy_ref,
  right_ref,
  dpairs_ref,
  dm_ref,
  dq_ref,
  dk_ref,
  dbeta_ref,
  dg_ref,
  *,
  plan: Plan,
):
  """A decay counts wherever it stands between what is read and what was written. A key reads, as a
  query does, to erase (`dleft`), and is written (`dright`, and `dlast` where it stays)."""
  tile, number, head, batch = (pl.program_id(axis) for axis in range(4))
  chunk, keys, vector = Chunk(plan, documents_ref, batch, number), plan.keys(tile), is_vector(g_ref)
  rows = _Rows(plan, (q_ref, k_ref, beta_ref, g_ref), chunk, batch, head, keys)
  pull = _pull_vector if vector else _pull_scalar
  dq, dleft, dright = pull(plan, rows, dpairs_ref, dm_ref)
  dread, derased, dlast, through = _pull_states(
    plan, (starts_ref, dends_ref, written_ref, dy_ref, right_ref), chunk, batch, head, number, keys
  )
  read, write, keep = _left(plan, rows)  # not before: it would stand in registers meanwhile
  q, k, beta = rows.tile(q_ref), rows.tile(k_ref), rows.row(beta_ref)
  dq += dread * read
  dleft -= derased * read
  dlast *= write
  at = (batch, chunk.rows, head)
  store(dbeta_ref, (tile, *at), jnp.sum(k * dleft, axis=1), chunk.exists)
  dleft = times(dleft, beta, 0)
  if vector:
    row, column = orient(False)
    token = jnp.arange(plan.blocks.chunk)
    dg = add_rows(column(token) >= row(token), split(q * dq + k * (dleft - dright), q.dtype))
    dg += add_rows(column(token) < row(token), split(k * dlast, q.dtype))
    store(dg_ref, (*at, keys[0]), dg + (keep * through)[None, :], chunk.exists, keys[1])
  else:
    dg = sum_passed(jnp.sum(q * dq + k * (dleft - dright), axis=1), jnp.sum(k * dlast, axis=1))
    store(dg_ref, (tile, *at), dg + keep * jnp.sum(through), chunk.exists)
  _, own = apart(rows.pairs(dpairs_ref))
  dq, dright = dq + times(k, own, 0), dright + times(q, own, 0)
  for ref, gradient in ((dq_ref, dq), (dk_ref, dleft + dright + dlast)):
    store(ref, (*at, keys[0]), gradient, chunk.exists, keys[1])


def _pull_states(plan: Plan, refs, chunk: Chunk, batch, head, number, keys):
  """What the state before gives queries, and keys that erase, and what the state after gives keys
  that are written, [C, K] each; and the product of the two states [K]."""
  starts_ref, dends_ref, written_ref, dy_ref, right_ref = refs
  channels, exist = keys

  def of_values(tile, found):
    dread, derased, dlast, through = found
    columns, columns_exist = plan.values(tile)
    start, dend = (
      load(ref, (batch, head, number, channels, columns), exist, columns_exist)
      for ref in (starts_ref, dends_ref)
    )
    right, written = (
      load(ref, (batch, head, chunk.rows, columns), chunk.exists, columns_exist)
      for ref in (right_ref, written_ref)
    )
    dy = load(dy_ref, (batch, chunk.rows, head, columns), chunk.exists, columns_exist)
    through += jnp.sum(start.astype(jnp.float32) * dend.astype(jnp.float32), axis=1)
    return (
      dread + dot(dy, start, (1, 1)),
      derased + dot(right, start, (1, 1)),
      dlast + dot(written, dend, (1, 1)),
      through,
    )

  zeros = jnp.zeros((plan.blocks.chunk, plan.blocks.keys), jnp.float32)
  found = zeros, zeros, zeros, jnp.zeros((plan.blocks.keys,), jnp.float32)
  return jax.lax.fori_loop(0, plan.value_tiles, of_values, found)


def _left(plan: Plan, rows: _Rows):
  """What is left of the state before the chunk where queries read it, and of keys in the state
  after it, [C, 1] or [C, K]; and of the state before in the state after, a number or [K]."""
  if not is_vector(rows.g_ref):
    weights = Weights(rows.chunk, rows.row(rows.g_ref))
    return weights.read[:, None], weights.write[:, None], weights.keep
  levels = Levels(plan.blocks.chunk, lambda: rows.tile(rows.g_ref), rows.q_ref.dtype)
  read = times(levels.until(), rows.chunk.reads, 0)
  write = times(levels.after(), rows.chunk.writes, 0)
  return read, write, kept(rows.chunk.keeps, levels.total())


def _pull_scalar(plan: Plan, rows: _Rows, dpairs_ref, dm_ref):
  """What pairs of different tokens give queries, and keys where they erase, before beta, and where
  they are written, [C, K] each."""
  q, k = rows.tile(rows.q_ref), rows.tile(rows.k_ref)
  dpairs, dm = apart(rows.pairs(dpairs_ref))[0], rows.pairs(dm_ref)
  writing = times(k, rows.row(rows.beta_ref), 0).astype(q.dtype)
  dright = dot(dpairs, q, (0, 0)) + dot(dm, writing, (0, 0))
  return dot(dpairs, k), dot(dm, k), dright


def _pull_vector(plan: Plan, rows: _Rows, dpairs_ref, dm_ref):
  """As `_pull_scalar`."""
  size, dtype = plan.blocks.chunk, rows.q_ref.dtype
  levels = Levels(size, lambda: rows.tile(rows.g_ref), dtype)

  def at_level(level, found):
    dq, dleft, dright = found
    decay, second, together = levels.at(level)
    of_query, of_key = jnp.where(second, decay, 0), jnp.where(second, 0, decay)
    key = (rows.tile(rows.k_ref) * of_key).astype(dtype)
    dpairs = jnp.where(together, rows.pairs(dpairs_ref), 0)
    dq += of_query * dot(dpairs, key)
    query = (rows.tile(rows.q_ref) * of_query).astype(dtype)
    dright += of_key * dot(dpairs, query, (0, 0))
    dm = jnp.where(together, rows.pairs(dm_ref), 0)
    dleft += of_query * dot(dm, key)
    writing = times(rows.tile(rows.k_ref) * of_query, rows.row(rows.beta_ref), 0).astype(dtype)
    dright += of_key * dot(dm, writing, (0, 0))
    return dq, dleft, dright

  zeros = jnp.zeros((size, plan.blocks.keys), jnp.float32)
  return jax.lax.fori_loop(0, levels.count, at_level, (zeros, zeros, zeros))
