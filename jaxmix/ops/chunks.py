"""Recurrences of a matrix state in chunks: the form of matrix products, for any decay, with or
without the delta rule.

What a chunk of C tokens does to the state S before it, and what its queries read, are prepared for
all chunks at once:

    written = U - W S        y = scale * (Q_in S + A written)        S' = keep * S + K_out^T written

U and W are the values alone (U = V, W = 0) or, with the delta rule, solve (I + M) [U, W] =
[beta V, beta K_in]. Then only S' runs along the chunks in order. With documents packed in a row, a
query reads S only while no document has begun since S was taken, and S' keeps only what the chunk's
last document wrote.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmix.ops import decays
from jaxmix.ops.implementation import by_platform
from jaxmix.ops.products import product, scale_rows, solve_unit_lower

CACHED = 2**18  # numbers of each array of a span, with which all arrays fit a core's second cache


class Rows(NamedTuple):
  """The arrays of a call, a row a token.

  Attributes:
    q, k, v: [B, T, heads, K or V]; each has the most or the fewest heads among the three, and
      neighbours share a head.
    beta: [B, T, H] or None; with it the delta rule.
    g: None, [B, T, H] or [B, T, H, K], as many heads as the state.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  beta: jax.Array | None
  g: jax.Array | None

  @property
  def fewest(self) -> int:
    """Heads of the arrays that have the fewest."""
    return min(x.shape[2] for x in (self.q, self.k, self.v))

  @property
  def state_shape(self) -> tuple[int, int, int, int]:
    """[B, H, K, V]"""
    heads = max(self.k.shape[2], self.v.shape[2])
    return self.q.shape[0], heads, self.q.shape[3], self.v.shape[3]


class _Prepared(NamedTuple):
  """What the chunks are to the state, [B, L, S, N, ...]; see the head of this file."""

  q_in: jax.Array  # C, K
  scores: jax.Array  # A: C, C
  k_out: jax.Array  # C, K
  keep: jax.Array  # K or 1, 1
  written: jax.Array  # U: C, V
  erased: jax.Array | None  # W: C, K


def forward(rows: Rows, state, documents, *, scale: float, chunk_size: int):
  """y, S_T and the state before each chunk.

  Args:
    state: [B, H, K, V].   documents: [B, T] int32 or None, the document of each token.
    scale: multiplies q.   chunk_size: C, a power of two.
  Returns:
    y: [B, T, heads, V], S_T: [B, H, K, V], and [N, B, L, S, K, V].
  """
  run = functools.partial(_forward, scale=scale, chunk_size=chunk_size)
  return _by_platform(run, rows, chunk_size, (rows, state, documents))


def backward(rows: Rows, starts, documents, dy, dstate, *, scale: float, chunk_size: int):
  """Gradients with respect to the rows and S_0.

  Args:
    starts: what `forward` returned.   dy: [B, T, heads, V].   dstate: [B, H, K, V].
  """
  run = functools.partial(_backward, scale=scale, chunk_size=chunk_size)
  return _by_platform(run, rows, chunk_size, (rows, starts, documents, dy, dstate))


def summary(rows: Rows, documents):
  """What rows without beta do to the state before them, S_T = keep * S_0 + added, where they hold
  one document, and what they add where they hold several.

  Args:
    documents: [B, T] int32 or None, the document of each token.
  Returns:
    keep: [B, H, K or 1, 1] or None, all of it;   added: [B, H, K, V].
  """
  dtype = rows.v.dtype
  _, k, v, _, g = _cut_rows(rows, rows.q.shape[1])
  keep = None
  if g is not None:
    g = jnp.maximum(g, decays.STRONGEST)
    later = jnp.pad(g[..., 1:, :], [*[(0, 0)] * 4, (0, 1), (0, 0)])
    after = jax.lax.cumsum(later, axis=4, reverse=True)
    k = k * jnp.exp(after)
    keep = jnp.swapaxes(jnp.exp(after[..., :1, :] + g[..., :1, :]), -1, -2)
    keep = _join_heads(keep[..., 0, :, :])
  if documents is not None:
    k = _where((documents == documents[:, -1:])[:, None, None, None, :, None], k)
  return keep, _join_heads(product("tk,tv->kv", dtype, k, v)[..., 0, :, :])


def _by_platform(run, rows: Rows, chunk_size: int, arrays):
  """`run` on all chunks at once. A CPU goes from span to span, each of as many chunks as its cache
  holds: from memory, so many small products would wait for their operands."""
  batch, length, *_ = rows.q.shape
  heads = max(x.shape[2] for x in (rows.q, rows.k, rows.v))
  every = -(-length // chunk_size)
  largest = chunk_size * max(chunk_size, rows.q.shape[3], rows.v.shape[3])
  cached = max(CACHED // (batch * heads * largest), 1)
  if cached >= every:
    return run(*arrays, count=every)
  some, at_once = (functools.partial(run, count=count) for count in (cached, every))
  return by_platform(*arrays, cpu=some, default=at_once)


def _forward(rows: Rows, state, documents, *, scale: float, chunk_size: int, count: int):
  """`forward` in spans of `count` chunks."""
  dtype, length, size = rows.v.dtype, rows.q.shape[1], count * chunk_size
  padded, documents = _pad_rows(rows, size), _pad_documents(documents, size)

  def step(state, start):
    prepared = _prepare(dtype, chunk_size, *_span(padded, documents, start, size))
    before, state = _states(prepared, state, dtype)
    y, _ = _read(dtype, scale, prepared, before)
    return state, (_join(y), jnp.moveaxis(before, 3, 0))

  state, (y, starts) = _walk(step, _split_heads(state, rows.fewest), length, size)
  starts = starts.reshape(-1, *starts.shape[2:])[: -(-length // chunk_size)]
  return _whole(y, length), _join_heads(state), starts


def _backward(
  rows: Rows, starts, documents, dy, dstate, *, scale: float, chunk_size: int, count: int
):
  """`backward` in spans of `count` chunks."""
  dtype, length, size = rows.v.dtype, rows.q.shape[1], count * chunk_size
  padded, documents = _pad_rows((rows, dy), size), _pad_documents(documents, size)
  starts = _pad(starts, 0, count)

  def step(dstate, start):
    (span, dspan), seen = _span(padded, documents, start, size)
    before = jax.lax.dynamic_slice_in_dim(starts, start // chunk_size, count)
    before = jnp.moveaxis(before, 0, 3)
    prepared, pull = jax.vjp(lambda span: _prepare(dtype, chunk_size, span, seen), span)
    dread = _cut(dspan.astype(before.dtype), rows.fewest, chunk_size)
    dafter, dstate = _state_cotangents(dtype, scale, prepared, dread, dstate, before.shape)
    _, finished = jax.vjp(lambda prepared: _finish(dtype, scale, prepared, before), prepared)
    return dstate, *pull(*finished((dread, dafter)))

  dstate, drows = _walk(step, _split_heads(dstate, rows.fewest), length, size, reverse=True)
  return jax.tree.map(lambda x: _whole(x, length), drows), _join_heads(dstate)


def _walk(step, carry, length: int, size: int, *, reverse: bool = False):
  """carry, result = step(carry, start) for the first token of each span; results are stacked."""
  starts = jnp.arange(0, length, size)
  if starts.size > 1:
    return jax.lax.scan(step, carry, starts, reverse=reverse)
  carry, result = step(carry, 0)
  return carry, jax.tree.map(lambda x: x[None], result)


def _pad_rows(rows, size: int):
  """Arrays [B, T, ...] with T made a multiple of `size`, by zeros."""
  return jax.tree.map(lambda x: _pad(x, 1, size), rows)


def _pad_documents(documents, size: int):
  """The document of each token behind that of the state given, which is 0; None stays None."""
  if documents is None:
    return None
  return jnp.pad(_pad(documents, 1, size, mode="edge"), ((0, 0), (1, 0)))


def _pad(x, axis: int, size: int, **options):
  """An axis made a multiple of `size`, by zeros unless `options` say otherwise."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % size)
  return jnp.pad(x, widths, **options)


def _span(rows, documents, start, size: int):
  """Rows [B, size, ...] from token `start` on, and documents [B, 1 + size] or None, first that of
  the token before."""

  def cut(x, size):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

  documents = None if documents is None else cut(documents, 1 + size)
  return jax.tree.map(lambda x: cut(x, size), rows), documents


def _whole(x, length: int):
  """[spans, B, size, ...] -> [B, T, ...]"""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _prepare(dtype, size: int, rows: Rows, documents) -> _Prepared:
  """The chunks of a span, of `size` tokens each."""
  q, k, v, beta, g = _cut_rows(rows, size)
  dot = functools.partial(product, dtype=dtype)
  visible, reads, writes, keeps = _masks(documents, size)
  q_in, k_out, keep = q, k, jnp.ones_like(k[..., :1, :1])
  if g is not None:
    g = jnp.maximum(g, decays.STRONGEST)
    until, after = (x.reshape(g.shape) for x in decays.sums_of_chunk(_merged(g)))
    q_in, k_out = q * jnp.exp(until), k * jnp.exp(after)
    keep = jnp.swapaxes(jnp.exp(until[..., -1:, :]), -1, -2)
  q_in, k_out, keep = _where(reads, q_in), _where(writes, k_out), _where(keeps, keep)

  weights = None if g is None or g.shape[-1] > 1 else decays.pair_decays(g, visible)

  def scores(q):
    if g is None:
      return jnp.where(visible, dot("ck,sk->cs", a=q, b=k), 0)
    if weights is not None:
      return dot("ck,sk->cs", a=q, b=k) * weights
    arrays = jnp.broadcast_arrays(q, k, g)
    seen = visible
    if seen.ndim > 2:
      seen = _merged(jnp.repeat(seen, g.shape[2], axis=2))
    scores = decays.decayed_scores(dtype, *map(_merged, arrays), seen)
    return scores.reshape(*arrays[0].shape[:-1], -1)

  written, erased = v, None
  if beta is not None:
    k_in = k if g is None else k * jnp.exp(until)
    right = scale_rows(jnp.concatenate([v, _where(reads, k_in)], axis=-1), beta)
    m = scale_rows(jnp.tril(scores(k), -1), beta)
    solved = solve_unit_lower(dtype, _merged(m), _merged(right)).reshape(right.shape)
    written, erased = jnp.split(solved, [v.shape[-1]], axis=-1)
  return _Prepared(q_in, scores(q), k_out, keep, written, erased)


def _merged(x):
  """[B, L, S, N, ...] -> [B, L, S * N, ...]: of arrays of eight axes, as blocks of chunks would
  have, the CPU compiler makes fusions that crash."""
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _read(dtype, scale: float, prepared: _Prepared, starts):
  """y of all chunks and what they write, from the states before them."""
  dot = functools.partial(product, dtype=dtype)
  written = prepared.written
  if prepared.erased is not None:
    written = written - dot("ck,kv->cv", a=prepared.erased, b=starts)
  y = scale * (
    dot("ck,kv->cv", a=prepared.q_in, b=starts) + dot("cs,sv->cv", a=prepared.scores, b=written)
  )
  return y, written


def _finish(dtype, scale: float, prepared: _Prepared, starts):
  """y of all chunks and the states after them, from the states before them."""
  y, written = _read(dtype, scale, prepared, starts)
  return y, prepared.keep * starts + product("ck,cv->kv", dtype, prepared.k_out, written)


def _states(prepared: _Prepared, state, dtype):
  """The state before each chunk [B, L, S, N, K, V], and the last one."""
  dot = functools.partial(product, dtype=dtype)
  if prepared.erased is None:
    added = dot("ck,cv->kv", a=prepared.k_out, b=prepared.written)
    return _along_chunks(
      lambda state, keep, added: keep * state + added, state, (prepared.keep, added)
    )

  def step(state, keep, k_out, written, erased):
    written = written - dot("ck,kv->cv", a=erased, b=state)
    return keep * state + dot("ck,cv->kv", a=k_out, b=written)

  chunks = (prepared.keep, prepared.k_out, prepared.written, prepared.erased)
  return _along_chunks(step, state, chunks)


def _state_cotangents(dtype, scale: float, prepared: _Prepared, dy, dstate, shape):
  """The cotangent of the state after each chunk, and that of the first state."""
  dot = functools.partial(product, dtype=dtype)

  def of_state(x):  # queries that share a state add to its cotangent
    return x.sum(axis=2, keepdims=True) if x.shape[2] > shape[2] else x

  read = of_state(dot("ck,cv->kv", a=prepared.q_in, b=scale * dy))
  if prepared.erased is None:
    return _along_chunks(
      lambda dstate, keep, read: keep * dstate + read, dstate, (prepared.keep, read), reverse=True
    )
  dwritten = of_state(dot("cs,cv->sv", a=prepared.scores, b=scale * dy))

  def step(dstate, keep, read, dwritten, k_out, erased):
    dwritten = dwritten + dot("ck,kv->cv", a=k_out, b=dstate)
    return keep * dstate + read - dot("ck,cv->kv", a=erased, b=dwritten)

  chunks = (prepared.keep, read, dwritten, prepared.k_out, prepared.erased)
  return _along_chunks(step, dstate, chunks, reverse=True)


def _along_chunks(step, carry, chunks, *, reverse: bool = False):
  """Runs carry = step(carry, *chunk) over axis 3; returns the carry before each step, and the
  last."""

  def keep_carry(carry, chunk):
    return step(carry, *chunk).astype(carry.dtype), carry

  chunks = tuple(jnp.moveaxis(x, 3, 0) for x in chunks)
  carry, before = jax.lax.scan(keep_carry, carry, chunks, reverse=reverse)
  return jnp.moveaxis(before, 0, 3), carry


def _cut_rows(rows: Rows, size: int) -> Rows:
  """Rows in float32 as chunks [B, L, S, N, C, ...]; beta and g of one number a head get an axis of
  length 1."""
  q, k, v, beta, g = rows
  fewest = rows.fewest
  cut = functools.partial(_cut, fewest=fewest, size=size)
  accumulator = jnp.promote_types(v.dtype, jnp.float32)
  if g is not None:
    g = cut(g.reshape(*g.shape[:3], -1))
  beta = None if beta is None else cut(beta[..., None])
  q, k, v = (cut(x.astype(accumulator)) for x in (q, k, v))
  return Rows(q, k, v, beta, g)


def _cut(x, fewest: int, size: int):
  """[B, N * C, L * S, K] -> [B, L, S, N, C, K]"""
  x = x.reshape(x.shape[0], -1, size, fewest, x.shape[2] // fewest, x.shape[3])
  return jnp.moveaxis(x, (3, 4), (1, 2))


def _join(x):
  """[B, L, S, N, C, V] -> [B, N * C, L * S, V]"""
  x = jnp.moveaxis(x, (1, 2), (3, 4))
  return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], x.shape[5])


def _split_heads(state, fewest: int):
  """[B, H, K, V] -> [B, L, S, K, V]"""
  return state.reshape(state.shape[0], fewest, -1, *state.shape[2:])


def _join_heads(state):
  """[B, L, S, K, V] -> [B, H, K, V]"""
  return state.reshape(state.shape[0], -1, *state.shape[3:])


def _masks(documents, size: int):
  """Which keys a query sees [.., C, C], and which tokens read and write the state [.., C, 1]; which
  chunks keep it [.., 1, 1]."""
  visible = jnp.tril(jnp.ones((size, size), bool))
  if documents is None:
    return visible, None, None, None
  before = documents[:, None, None, :-1:size, None]
  documents = documents[:, 1:].reshape(documents.shape[0], 1, 1, -1, size)
  last = documents[..., -1:]
  return (
    visible & (documents[..., :, None] == documents[..., None, :]),
    (documents == before)[..., None],
    (documents == last)[..., None],
    (last == before)[..., None],
  )


def _where(mask, x):
  return x if mask is None else jnp.where(mask, x, 0)
