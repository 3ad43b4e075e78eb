"""Causal linear attention with decay on TPU: one fused kernel a direction.

Grid (B, cells of heads, T / tokens, parts of a cell), see `pallas_kernels.chunks_tpu`; the backward
kernel walks the tokens from the end. A block holds `tokens` rows of q, k, v, y (and dy, dq, dk, dv)
of `heads` heads, cut into chunks of C, and the log-decays g: a number a token and head, or K. The
states [K, V] of a cell, float32, stay in VMEM while its blocks are walked and reach HBM once.

Bytes, a token and head, at b bytes a number: forward b (2 K + 2 V) and 4 or 4 K for g; under
differentiation also the states that the backward starts from. Without decay, or with one a token,
it starts from the state before each block, b K V / tokens, and computes those between its chunks
again, one product more; that is 6 % of the forward's bytes at K = V = 128 and blocks of 512 tokens.
With decays of channels the sums and exponentials of g would have to be computed again as well, so
the state before each chunk is kept, b K V / C. Backward: b (4 K + 3 V), 8 or 8 K for g and dg, and
those states. Flops: forward 2 C (K + V) + 4 K V; backward, 2 C (3 K + 2 V) + 10 K V. Decays of
channels multiply the products of C x C by the sizes at which pairs of tokens meet, log2(C).

How a chunk reads, writes and passes on the state stands in `_TokenDecay` and `_ChannelDecay` alone.
The latter holds states transposed, [V, K], so that decays of channels lie along the lanes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunks import mixed_dtypes
from pallas_kernels.chunks_tpu import (
  ChannelDecay,
  Chunk,
  Decay,
  NoDecays,
  ScalarDecays,
  Windows,
  compiler_params,
  cut_documents,
  cut_scalars,
  dot,
  head_major,
  join_scalars,
  meeting_size,
  parts_of,
  prefix_sum,
  triangle,
  weighted,
  where,
)
from pallas_kernels.linear_attention.blocks import Blocks, Sizes, choose_blocks, vmem_limit


def refusal(q, k, v, g=None) -> str | None:
  """Why the kernels cannot run on q [B, T, heads, K], k [B, T, heads, K], v [B, T, heads, V] and g
  ([B, T, H], [B, T, H, K] or None), or None."""
  if (mixed := mixed_dtypes(q=q, k=k, v=v)) is not None:
    return mixed
  try:
    choose_blocks(Sizes.of(q, k, v, g))
  except ValueError as error:
    return str(error)
  return None


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
  """Causal linear attention with decay.

      S_t = exp(g_t) * S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t

  Args:
    q: [B, T, heads, K].   k: [B, T, heads, K].   v: [B, T, heads, V].   All float32 or all
      bfloat16. Those with fewer heads have the same number, a divisor of the others', and
      neighbours share a head. There are H states, the more of the heads of k and v.
    g: log-decays, float32 and <= 0: [B, T, H] or [B, T, H, K]; None means no decay.
    state: [B, H, K, V] float32, S_0; None means zeros.
    documents: [B, T] int32 or None: the number of each token's document in its row, from 0 and
      never falling; S is cleared where it changes, and S_0 belongs to document 0.
    scale: multiplies q.   dtype: of y.
    save: also return the states that `backward` wants.
    blocks: None chooses.   interpret: run the kernel's program on the CPU.
  Returns:
    y: [B, T, most heads, V];   S_T: [B, H, K, V] float32;   with `save` the states kept for
    `backward` in the dtype of q, [B, H, N, ...].
  Raises:
    ValueError: the heads do not fit VMEM (see `choose_blocks`).
  Source: Katharopoulos et al. 2020 (arXiv 2006.16236), section 3.3; with decay, Yang et al. 2024
    (arXiv 2312.06635), section 4.
  """
  sizes = Sizes.of(q, k, v, g)
  blocks = blocks or choose_blocks(sizes)
  at = Windows(blocks, sizes.most, sizes.fewest, sizes.length)
  batch, kept = q.shape[0], _kept(sizes, blocks)
  y, state, starts = pl.pallas_call(
    functools.partial(_forward_kernel, at=at, blocks=blocks, length=sizes.length, scale=scale),
    grid=at.grid_of(batch),
    in_specs=[
      *_row_specs(sizes, at),
      None if state is None else at.states(*sizes.state),
      None if documents is None else at.documents(),
    ],
    out_specs=[
      at.rows(sizes.most, sizes.value_dim),
      at.states(*sizes.state),
      at.starts(sizes.heads, *sizes.carried, kept) if save else None,
    ],
    out_shape=[
      jax.ShapeDtypeStruct((batch, sizes.most, sizes.length, sizes.value_dim), dtype),
      jax.ShapeDtypeStruct((batch, *sizes.state), jnp.float32),
      jax.ShapeDtypeStruct((batch, sizes.heads, at.count * kept, *sizes.carried), q.dtype)
      if save
      else None,
    ],
    scratch_shapes=[_carry(sizes, at)],
    compiler_params=compiler_params(vmem_limit(blocks, sizes)),
    cost_estimate=_cost(sizes, blocks, batch, kept=at.count * kept * save),
    name="linear_attention_forward",
    interpret=interpret,
  )(*_head_major_rows(q, k, v, g, blocks, at), state, cut_documents(documents, blocks))
  (y,) = head_major(y)
  return (y, state, starts) if save else (y, state)


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
    starts: the states that it saved.
    dy: [B, T, most heads, V], any float dtype.   dstate: [B, H, K, V] float32: cotangents of y and
      S_T.
  Returns:
    dq, dk, dv in the shapes and the dtype of q, k, v; dg: float32 in the shape of g, or None;
    dS_0: [B, H, K, V] float32.
  """
  sizes = Sizes.of(q, k, v, g)
  blocks = blocks or choose_blocks(sizes)
  at = Windows(blocks, sizes.most, sizes.fewest, sizes.length, reverse=True)
  batch, kept = q.shape[0], _kept(sizes, blocks)
  rows, row_specs = _head_major_rows(q, k, v, g, blocks, at), _row_specs(sizes, at)
  gradients = [None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in rows]
  # Where several states share an array, its gradients are summed here.
  sums = [
    pltpu.VMEM((at.held(heads), blocks.tokens, dim), jnp.float32) if heads < sizes.heads else None
    for heads, dim in zip(
      sizes.of_rows, (sizes.key_dim, sizes.key_dim, sizes.value_dim), strict=True
    )
  ]
  *gradients, dstate = pl.pallas_call(
    functools.partial(_backward_kernel, at=at, blocks=blocks, length=sizes.length, scale=scale),
    grid=at.grid_of(batch),
    in_specs=[
      *row_specs,
      at.starts(sizes.heads, *sizes.carried, kept),
      None if documents is None else at.documents(),
      at.rows(sizes.most, sizes.value_dim),
      at.states(*sizes.state),
    ],
    out_specs=[*row_specs, at.states(*sizes.state)],
    out_shape=[*gradients, jax.ShapeDtypeStruct(dstate.shape, jnp.float32)],
    scratch_shapes=[
      _carry(sizes, at),
      pltpu.VMEM((at.held(sizes.heads), blocks.chunks, *sizes.carried), q.dtype)
      if kept < blocks.chunks
      else None,
      sums,
      _TokenDecays.scratch(at.held(sizes.heads), blocks) if sizes.decay == "token" else None,
    ],
    compiler_params=compiler_params(vmem_limit(blocks, sizes)),
    cost_estimate=_cost(sizes, blocks, batch, kept=at.count * kept, backward=True),
    name="linear_attention_backward",
    interpret=interpret,
  )(*rows, starts, cut_documents(documents, blocks), *head_major(dy), dstate)
  dq, dk, dv, dg = gradients
  if sizes.decay == "channel":
    (dg,) = head_major(dg)
  elif g is not None:
    dg = join_scalars(dg, blocks, sizes.length)
  return *head_major(dq, dk, dv), dg, dstate


def _head_major_rows(q, k, v, g, blocks: Blocks, at: Windows):
  """q, k, v and g as the kernels see them."""
  q, k, v = head_major(q, k, v)
  if g is None:
    return q, k, v, None
  if g.ndim == 4:
    return q, k, v, *head_major(g)
  return q, k, v, cut_scalars(g, blocks, at.held(g.shape[2]))


def _row_specs(sizes: Sizes, at: Windows):
  """The windows of `_head_major_rows`."""
  of_g = {
    None: lambda: None,
    "token": lambda: at.scalars(sizes.heads),
    "channel": lambda: at.rows(sizes.heads, sizes.key_dim),
  }
  dims = (sizes.key_dim, sizes.key_dim, sizes.value_dim)
  rows = (at.rows(heads, dim) for heads, dim in zip(sizes.of_rows, dims, strict=True))
  return *rows, of_g[sizes.decay]()


def _kept(sizes: Sizes, blocks: Blocks) -> int:
  """States kept for the backward pass, a block."""
  return blocks.chunks if sizes.decay == "channel" else 1


def _carry(sizes: Sizes, at: Windows):
  """Where the states of a cell stay."""
  held = at.states(*sizes.state).block_shape[1]
  return pltpu.VMEM((held, *sizes.carried), jnp.float32)


def _cost(sizes: Sizes, blocks: Blocks, batch: int, *, kept: int, backward: bool = False):
  """The cost of a kernel; kept: states a head that are written or read for the backward pass."""
  key_dim, value_dim, size = sizes.key_dim, sizes.value_dim, jnp.dtype(sizes.dtype).itemsize
  tokens = batch * sizes.length
  levels = blocks.chunk.bit_length() - 1 if sizes.decay == "channel" else 1
  of_q, of_k, of_v = sizes.of_rows
  decays = {None: 0, "token": 4, "channel": 4 * key_dim}[sizes.decay] * sizes.heads
  products = 3 * levels * key_dim + 2 * value_dim if backward else levels * key_dim + value_dim
  return pl.CostEstimate(
    flops=tokens
    * sizes.most
    * (2 * blocks.chunk * products + (10 if backward else 4) * key_dim * value_dim),
    transcendentals=tokens
    * sizes.heads
    * {None: 0, "token": blocks.chunk, "channel": (levels + 2) * key_dim}[sizes.decay],
    bytes_accessed=tokens
    * ((1 + backward) * (((of_q + of_k) * key_dim + of_v * value_dim) * size + decays))
    + tokens * sizes.most * value_dim * size
    + batch * sizes.heads * key_dim * value_dim * (8 + kept * size),
  )


class _TokenDecay(NamedTuple):
  """A chunk of a head under no decay, or under one a token. States are [K, V]."""

  decay: Decay
  chunk: Chunk

  def advance(self, state, k, v):
    """The state after the chunk."""
    kept = weighted(v, self.decay.until, self.chunk.writes)
    return weighted(state, self.decay.whole, self.chunk.keeps) + dot(k, kept, (0, 0))

  def read(self, q, k, v, state):
    """y / scale [C, V] float32; the state is in the dtype of q."""
    scores = self.decay.weigh(dot(q, k, (1, 1)), self.chunk).astype(v.dtype)
    before = weighted(dot(q, state, (1, 0)), self.decay.since, self.chunk.reads)
    return dot(scores, v, (1, 0)) + before

  def pull_state(self, dafter):
    """From the cotangent of the state after the chunk, what comes through to that before it."""
    return weighted(dafter, self.decay.whole, self.chunk.keeps)

  def pull_write(self, k, v, dafter):
    """Gradients of k and v as written to the state after the chunk."""
    kept = weighted(v, self.decay.until, self.chunk.writes)
    dv = weighted(dot(k, dafter, (1, 0)), self.decay.until, self.chunk.writes)
    return dot(kept, dafter, (1, 1)), dv

  def pull_read(self, q, k, v, state, dy):
    """Gradients of q, k, v and of the state before the chunk, from dy [C, V] float32."""
    dtype = q.dtype
    read = weighted(dy, self.decay.since, self.chunk.reads).astype(dtype)
    dy = dy.astype(dtype)
    # Scores are held by key, [s, t], as dk and dv need them; only dq transposes.
    scores = self.decay.weigh(dot(k, q, (1, 1)), self.chunk).astype(dtype)
    dv = dot(scores, dy, (1, 0))
    dscores = self.decay.weigh(dot(v, dy, (1, 1)), self.chunk).astype(dtype)
    dk = dot(dscores, q, (1, 0))
    dq = dot(dscores, k, (0, 0)) + dot(read, state, (1, 1))
    return dq, dk, dv, dot(q, read, (0, 0))


class _TokenDecays:
  """The decays of a block of tokens: none, or one a token and head.

  Args:
    g_ref: window of `cut_scalars`, or None.
    scratch: of `scratch`, where gradients of g are wanted.
  """

  def __init__(self, g_ref, blocks: Blocks, *, exact: bool, scratch=None):
    self._chunks, self._scratch = blocks.chunks, scratch
    self._decays = (
      NoDecays() if g_ref is None else ScalarDecays(g_ref[0, 0, 0], blocks.chunks, exact=exact)
    )

  @staticmethod
  def scratch(heads: int, blocks: Blocks):
    """A column of db, and a number, for each chunk of each head; 8 at least, as products want."""
    count = max(heads * blocks.chunks, 8)
    return (
      pltpu.VMEM((blocks.chunk, count), jnp.float32),
      pltpu.VMEM((count, 1), jnp.float32),
    )

  def of(self, head: int, chunk: Chunk, *, by_key: bool = False) -> _TokenDecay:
    """Those of one chunk and head."""
    return _TokenDecay(self._decays.of(head, chunk, by_key=by_key), chunk)

  def keep_gradient(self, head: int, chunk: Chunk, db, total) -> None:
    """Takes up q dq - k dk [C, K] of each token, and <S_0, dS_0> [K, V], products of the elements,
    for `write_gradient`."""
    if self._scratch is None:
      return
    db_ref, total_ref = self._scratch
    i = head * self._chunks + chunk.index
    db_ref[:, i : i + 1] = jnp.sum(db, axis=1, keepdims=True)
    total_ref[i : i + 1, :] = jnp.sum(total, keepdims=True)

  def write_gradient(self, dg_ref) -> None:
    """dg: what passes through a token's decay is what comes out of the state before the chunk, less
    what is read of it and plus what is written to it by the tokens before."""
    if self._scratch is None:
      return
    db_ref, total_ref = self._scratch
    size = db_ref.shape[0]
    earlier = triangle(size, strictly_upper=True)
    before = sum(dot(part, earlier, (0, 0)) for part in parts_of(db_ref[...]))
    dg_ref[0, 0, 0] = (total_ref[...] - before)[: dg_ref.shape[3]]


class _ChannelDecay(NamedTuple):
  """A chunk of a head under a decay a token and channel. States are [V, K]."""

  decay: ChannelDecay
  chunk: Chunk
  meeting: jax.Array
  since: jax.Array
  until: jax.Array

  def advance(self, state, k, v):
    """The state after the chunk."""
    return self.pull_state(state) + dot(v, self._scaled(k, self.until), (0, 0))

  def read(self, q, k, v, state):
    """y / scale [C, V] float32; the state is in the dtype of q."""
    dtype = q.dtype
    before = dot(self._scaled(q, self.since), state, (1, 1))
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    weights = where(self.chunk.visible, self.decay.weights(q, k, self.meeting, dtype))
    return dot(weights.astype(dtype), v, (1, 0)) + before

  def pull_state(self, dafter):
    """From the cotangent of the state after the chunk, what comes through to that before it."""
    return weighted(dafter, self.decay.whole, self.chunk.keeps)

  def pull_write(self, k, v, dafter):
    """Gradients of k and v as written to the state after the chunk."""
    return self.until * dot(v, dafter, (1, 0)), dot(self._scaled(k, self.until), dafter, (1, 1))

  def pull_read(self, q, k, v, state, dy):
    """Gradients of q, k, v and of the state before the chunk, from dy [C, V] float32."""
    dtype, dy = q.dtype, dy.astype(q.dtype)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, self.meeting.shape, a) for a in (0, 1))
    dweights = jnp.where(row >= column, dot(dy, v, (1, 1)), dot(v, dy, (1, 1)))
    weights, dq, dk = self.decay.pull(
      q.astype(jnp.float32),
      k.astype(jnp.float32),
      where(self.chunk.same, dweights),
      self.meeting,
      dtype,
    )
    dv = dot(where(self.chunk.visible, weights).astype(dtype), dy, (1, 0))
    dq = dq + self.since * dot(dy, state, (1, 0))
    return dq, dk, dv, dot(dy, self._scaled(q, self.since), (0, 0))

  @staticmethod
  def _scaled(x, factor):
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


class _ChannelDecays:
  """The decays of a block of tokens, one a token and channel; g_ref: window of g."""

  def __init__(self, g_ref, blocks: Blocks, dg_ref=None):
    self._g_ref, self._dg_ref = g_ref, dg_ref
    self._meeting = meeting_size(blocks.chunk)

  def of(self, head: int, chunk: Chunk, *, by_key: bool = False) -> _ChannelDecay:
    """Those of one chunk and head."""
    decay = ChannelDecay(chunk.load(self._g_ref, head))
    since, until = where(chunk.reads, decay.since), where(chunk.writes, decay.until)
    return _ChannelDecay(decay, chunk, self._meeting, since, until)

  def keep_gradient(self, head: int, chunk: Chunk, db, total) -> None:
    """Writes dg, from q dq - k dk [C, K] and S_0 dS_0 [V, K]; see `_TokenDecays`."""
    total = jnp.sum(total, axis=0, keepdims=True)
    self._dg_ref[0, head, chunk.rows, :] = total - prefix_sum(db)

  def write_gradient(self, dg_ref) -> None:
    """Nothing is left to write."""


def _forward_kernel(
  q_ref,
  k_ref,
  v_ref,
  g_ref,
  state_ref,
  documents_ref,
  y_ref,
  last_ref,
  starts_ref,
  carry_ref,
  *,
  at: Windows,
  blocks: Blocks,
  length: int,
  scale: float,
):
  """carry_ref holds S, and last_ref is the S_T returned."""
  block, part = pl.program_id(2), pl.program_id(3)
  by_channel = g_ref is not None and g_ref.ndim == 4

  @pl.when((block == 0) & (part == 0))
  def _():
    if state_ref is None:
      carry_ref[...] = jnp.zeros_like(carry_ref)
    else:
      _copy_states(state_ref, carry_ref, by_channel)

  heads, held = y_ref.shape[1], carry_ref.shape[0] // at.parts
  if by_channel:
    decays = _ChannelDecays(g_ref, blocks)
  else:
    decays = _TokenDecays(g_ref, blocks, exact=q_ref.dtype == jnp.float32)
  chunk_at = functools.partial(Chunk, documents_ref, block=block, blocks=blocks, length=length)
  chunks = [chunk_at(c) for c in range(blocks.chunks)]  # their masks serve all heads
  for h in range(held):
    place = h if at.parts == 1 else part * held + h
    for chunk in chunks:
      decay = decays.of(h, chunk)
      k = chunk.load(k_ref, h * k_ref.shape[1] // held)
      v = chunk.load(v_ref, h * v_ref.shape[1] // held)
      state = carry_ref[place]
      # First, since the next chunk waits for it: the schedule follows the order of the program.
      carry_ref[place] = decay.advance(state, k, v)
      state = state.astype(k.dtype)
      if starts_ref is not None and chunk.index < starts_ref.shape[2]:
        starts_ref[0, h, chunk.index] = state
      for reader in range(h * heads // held, (h + 1) * heads // held):
        q = chunk.load(q_ref, reader * q_ref.shape[1] // heads)
        y = scale * decay.read(q, k, v, state)
        y_ref[0, reader, chunk.rows, :] = y.astype(y_ref.dtype)

  @pl.when((block == at.count - 1) & (part == at.parts - 1))
  def _():
    _copy_states(carry_ref, last_ref, by_channel)


def _copy_states(source_ref, target_ref, transposed: bool) -> None:
  """Between the states as given and returned, [1, heads, K, V], and as carried."""
  for h in range(source_ref.shape[-3]):
    source, target = (
      (ref.at[0, h] if len(ref.shape) == 4 else ref.at[h]) for ref in (source_ref, target_ref)
    )
    target[...] = source[...].T if transposed else source[...]


def _backward_kernel(
  q_ref,
  k_ref,
  v_ref,
  g_ref,
  starts_ref,
  documents_ref,
  dy_ref,
  dlast_ref,
  dq_ref,
  dk_ref,
  dv_ref,
  dg_ref,
  dfirst_ref,
  dcarry_ref,
  within_ref,
  sum_refs,
  dg_scratch,
  *,
  at: Windows,
  blocks: Blocks,
  length: int,
  scale: float,
):
  """dcarry_ref holds the cotangent of S, and dfirst_ref is the dS_0 returned."""
  step, part = pl.program_id(2), pl.program_id(3)
  by_channel = g_ref is not None and g_ref.ndim == 4

  @pl.when((step == 0) & (part == 0))
  def _():
    _copy_states(dlast_ref, dcarry_ref, by_channel)

  dtype, block = q_ref.dtype, at.count - 1 - step
  heads, held = dy_ref.shape[1], dcarry_ref.shape[0] // at.parts
  if by_channel:
    decays = _ChannelDecays(g_ref, blocks, dg_ref)
  else:
    decays = _TokenDecays(g_ref, blocks, exact=dtype == jnp.float32, scratch=dg_scratch)
  chunk_at = functools.partial(Chunk, documents_ref, block=block, blocks=blocks, length=length)
  chunks = [chunk_at(c, by_key=True) for c in range(blocks.chunks)]
  add = functools.partial(_add, part=part if at.parts > 1 else None)
  for h in range(held):
    place = h if at.parts == 1 else part * held + h
    of_k, of_v = h * k_ref.shape[1] // held, h * v_ref.shape[1] // held
    if within_ref is not None:
      state = starts_ref[0, h, 0].astype(jnp.float32)
      within_ref[h, 0] = starts_ref[0, h, 0]
      for chunk in chunks[:-1]:
        k, v = chunk.load(k_ref, of_k), chunk.load(v_ref, of_v)
        state = decays.of(h, chunk, by_key=True).advance(state, k, v)
        within_ref[h, chunk.index + 1] = state.astype(dtype)

    for chunk in reversed(chunks):
      decay = decays.of(h, chunk, by_key=True)
      state = starts_ref[0, h, chunk.index] if within_ref is None else within_ref[h, chunk.index]
      dafter = dcarry_ref[place]
      dbefore, dafter = decay.pull_state(dafter), dafter.astype(dtype)
      k, v = chunk.load(k_ref, of_k), chunk.load(v_ref, of_v)
      dk, dv = decay.pull_write(k, v, dafter)
      moved = 0.0  # q dq - k dk: what each token reads of the state, less what it writes
      for reader in range(h * heads // held, (h + 1) * heads // held):
        of_q = reader * q_ref.shape[1] // heads
        q = chunk.load(q_ref, of_q)
        dy = scale * chunk.load(dy_ref, reader).astype(jnp.float32)
        dq, dk_read, dv_read, dread = decay.pull_read(q, k, v, state, dy)
        dk, dv, dbefore = dk + dk_read, dv + dv_read, dbefore + dread
        if g_ref is not None:
          moved = moved + q.astype(jnp.float32) * dq
        add(dq_ref, sum_refs[0], of_q, chunk, dq, reader % (heads // q_ref.shape[1]))
      add(dk_ref, sum_refs[1], of_k, chunk, dk, h % (held // k_ref.shape[1]))
      add(dv_ref, sum_refs[2], of_v, chunk, dv, h % (held // v_ref.shape[1]))
      dcarry_ref[place] = dbefore
      if g_ref is not None:
        moved = moved - k.astype(jnp.float32) * dk
        decays.keep_gradient(h, chunk, moved, state.astype(jnp.float32) * dbefore)
  decays.write_gradient(dg_ref)

  @pl.when((step == at.count - 1) & (part == at.parts - 1))
  def _():
    _copy_states(dcarry_ref, dfirst_ref, by_channel)


def _add(ref, sum_ref, head: int, chunk: Chunk, value, turn: int, *, part) -> None:
  """Writes a gradient of rows, or adds it to those of the heads that share the rows.

  Args:
    sum_ref: None where none share them.   turn: of this head among those of a grid step.
    part: of the cell, None where it has one: the sum goes on over its parts.
  """
  if sum_ref is not None:
    if turn:
      value = value + sum_ref[head, chunk.rows, :]
    elif part is not None:
      value = value + jnp.where(part == 0, 0.0, sum_ref[head, chunk.rows, :])
    sum_ref[head, chunk.rows, :] = value
  ref[0, head, chunk.rows, :] = value.astype(ref.dtype)
