"""What the TPU kernels of chunked recurrences share: the part of each array that a grid step sees,
the rows of one chunk with their masks, and what log-decays do within a chunk.

Grid (B, cells, blocks of tokens, parts). A cell is heads that share nothing with other heads; the
blocks of tokens are walked in order, since a state is carried along them; where one cell is too
large for a grid step its heads are taken in parts, while the windows of what they share stay.

Rows are head-major inside ([B, H, T, K]): XLA writes the projections in that order at no cost,
while heads side by side in the lanes or sublanes would be copied before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunks import HIDDEN, LOG2E, in_two, to_bits


class Blocks(Protocol):
  """What one grid step holds.

  Attributes:
    chunk: tokens of one chunk (C).   chunks: of a block.   tokens: of a block, C * chunks.
    heads: heads of a block, counted in the array with the most heads.
  """

  chunk: int
  chunks: int
  tokens: int
  heads: int


def head_major(*arrays):
  """[B, T, H, K] <-> [B, H, T, K]; None stays None."""
  return tuple(None if x is None else jnp.swapaxes(x, 1, 2) for x in arrays)


def cut_documents(documents, blocks: Blocks):
  """[B, T] -> [B, N, 2, tokens]: each token's document, and that of the last token before its
  chunk, to which the state belongs that the chunk starts from. None stays None."""
  if documents is None:
    return None
  tail = -documents.shape[1] % blocks.tokens
  documents = jnp.pad(documents, ((0, 0), (0, tail)), mode="edge")
  last = documents[:, blocks.chunk - 1 :: blocks.chunk]
  before = jnp.repeat(jnp.pad(last[:, :-1], ((0, 0), (1, 0))), blocks.chunk, axis=1)
  pair = jnp.stack([documents, before], axis=1)
  return jnp.swapaxes(pair.reshape(pair.shape[0], 2, -1, blocks.tokens), 1, 2)


def cut_scalars(g, blocks: Blocks, held: int):
  """[B, T, H] -> [B, H / held, N, held * chunks, C], a row of a window for each chunk of each head;
  zeros beyond the length."""
  batch, length, heads = g.shape
  g = jnp.pad(g, ((0, 0), (0, -length % blocks.tokens), (0, 0)))
  g = g.reshape(batch, -1, blocks.chunks, blocks.chunk, heads // held, held)
  g = jnp.transpose(g, (0, 4, 1, 5, 2, 3))
  return g.reshape(*g.shape[:3], held * blocks.chunks, blocks.chunk)


def join_scalars(g, blocks: Blocks, length: int):
  """The inverse of `cut_scalars`."""
  batch, cells, count, rows, chunk = g.shape
  g = g.reshape(batch, cells, count, rows // blocks.chunks, blocks.chunks, chunk)
  return jnp.transpose(g, (0, 2, 4, 5, 1, 3)).reshape(batch, count * blocks.tokens, -1)[:, :length]


class Windows:
  """Which part of each array a grid step sees.

  Args:
    blocks: of the kernel.
    most, fewest: heads of the arrays that have the most and the fewest.
    length: T.   reverse: walk the blocks of tokens from the last to the first.

  Attributes:
    count: blocks of tokens.   parts: grid steps that share the windows of a cell.
    grid_of: batch size -> the grid.
  """

  def __init__(self, blocks: Blocks, most: int, fewest: int, length: int, *, reverse: bool = False):
    self.count = pl.cdiv(length, blocks.tokens)
    self.parts = max(most // fewest // blocks.heads, 1)
    self._blocks, self._most = blocks, most
    self._block = (lambda n: self.count - 1 - n) if reverse else (lambda n: n)

  def grid_of(self, batch: int) -> tuple[int, int, int, int]:
    """The grid."""
    return batch, self._most // (self._blocks.heads * self.parts), self.count, self.parts

  def held(self, heads: int) -> int:
    """How many heads a grid step sees of an array of so many."""
    return max(self._blocks.heads * heads // self._most, 1)

  def local(self, head: int, heads: int) -> int:
    """Where in the window of an array of so many heads stands what head `head` of a step uses."""
    return head * self.held(heads) // self._blocks.heads

  def rows(self, heads: int, dim: int) -> pl.BlockSpec:
    """Of [B, heads, T, dim]."""
    shape, of = (1, self.held(heads), self._blocks.tokens, dim), self._heads(heads)
    return pl.BlockSpec(shape, lambda b, c, n, p: (b, of(c, p), self._block(n), 0))

  def states(self, heads: int, key_dim: int, value_dim: int) -> pl.BlockSpec:
    """Of [B, heads, K, V]: a whole cell's, so that it stays while the cell's blocks are walked."""
    held = self.held(heads) * (self.parts if heads == self._most else 1)
    return pl.BlockSpec((1, held, key_dim, value_dim), lambda b, c, n, p: (b, c, 0, 0))

  def starts(self, heads: int, key_dim: int, value_dim: int, kept: int = 1) -> pl.BlockSpec:
    """Of [B, heads, N * kept, K, V]: states kept for the backward pass, so many a block."""
    shape, of = (1, self.held(heads), kept, key_dim, value_dim), self._heads(heads)
    return pl.BlockSpec(shape, lambda b, c, n, p: (b, of(c, p), self._block(n), 0, 0))

  def scalars(self, heads: int) -> pl.BlockSpec:
    """Of `cut_scalars(g, blocks, held(heads))`."""
    shape, of = (self.held(heads) * self._blocks.chunks, self._blocks.chunk), self._heads(heads)
    return pl.BlockSpec((1, 1, 1, *shape), lambda b, c, n, p: (b, of(c, p), self._block(n), 0, 0))

  def documents(self) -> pl.BlockSpec:
    """Of `cut_documents`."""
    shape = (1, 1, 2, self._blocks.tokens)
    return pl.BlockSpec(shape, lambda b, c, n, p: (b, self._block(n), 0, 0))

  def _heads(self, heads: int) -> Callable:
    """The number of the window along the heads of an array."""
    if heads == self._most:
      return lambda c, p: c * self.parts + p
    return lambda c, p: c


def compiler_params(vmem_limit: int) -> pltpu.CompilerParams:
  """Those of the grid above."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    vmem_limit_bytes=vmem_limit,
  )


def dot(a, b, axes: tuple[int, int]):
  """Contracts axes[0] of a with axes[1] of b, accumulating in float32. float32 operands are not
  rounded to bfloat16, which the MXU would do by default."""
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((axes[0],), (axes[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def where(mask, x):
  """x where the mask holds, else 0; None holds everywhere."""
  return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


class Chunk:
  """One chunk of C tokens: where its rows lie, and what they see, read, write and keep.

  Attributes:
    index: of the chunk in its block.
    rows: the rows of the block.
    same: [C, C], which tokens share a document; None means all.
    visible: [C, C], which key (column) a query (row) sees; the other way round with `by_key`.
    reads, writes: [C, 1], which queries read the state before the chunk, and which keys stay in the
      state after it; None means all.
    keeps: [1, 1], whether the state before is part of the state after; None means yes.
    exists: [C, 1], which rows are not beyond the length; None means all.
  """

  def __init__(self, documents_ref, index, *, block, blocks: Blocks, length: int, by_key=False):
    size = blocks.chunk
    first = index * size
    self.index, self.rows = index, pl.ds(first, size)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    self.visible = row <= column if by_key else row >= column
    self.same = self.reads = self.writes = self.keeps = self.exists = None
    if length % blocks.tokens:
      left = length - block * blocks.tokens - first
      self.exists = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) < left
    if documents_ref is not None:
      of_column = jnp.broadcast_to(documents_ref[0, 0, :1, self.rows], (size, size))
      of_row = of_column.T
      last = documents_ref[0, 0, :1, pl.ds(first + size - 1, 1)]
      before = documents_ref[0, 0, 1:, pl.ds(first, 1)]
      self.same = of_row == of_column
      self.visible = self.visible & self.same
      self.reads, self.writes = of_row[:, :1] == before, of_row[:, :1] == last
      self.keeps = before == last

  def load(self, ref, head: int):
    """Rows of a head; beyond the length, where memory holds anything, zeros."""
    return where(self.exists, ref[0, head, self.rows, :])


def weighted(x, weight, mask):
  """weight * x where the mask holds, else 0, in the dtype of x; None is a weight of 1, and a mask
  that holds everywhere."""
  if weight is None:
    return where(mask, x)
  return (x.astype(jnp.float32) * where(mask, weight)).astype(x.dtype)


def parts_of(x, count: int = 3):
  """bfloat16 arrays whose sum is the float32 array x, exactly if there are three: a product of each
  with ones and zeros is exact on the MXU."""
  parts = []
  for _ in range(count):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32)
  return parts


def triangle(size: int, *, strictly_upper: bool = False):
  """[size, size] bfloat16, ones where row >= column, or row < column, else zeros."""
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
  ones = row < column if strictly_upper else row >= column
  return jnp.where(ones, 1.0, 0.0).astype(jnp.bfloat16)


class Decay(NamedTuple):
  """What log-decays do in one chunk of one head. None stands for no decay.

  Attributes:
    since: [C, 1], from the start of the chunk to each token: its share of the state before.
    until: [C, 1], from each token to the end of the chunk: its share of the state after.
    whole: [1, 1], over the chunk.
    pairs: [C, C], from key (column) to query (row), 0 where it is not visible; the other way round
      with `by_key`.
  """

  since: jax.Array | None = None
  until: jax.Array | None = None
  whole: jax.Array | None = None
  pairs: jax.Array | None = None

  def weigh(self, scores, chunk: Chunk):
    """Scores [C, C] under decay, 0 where they are not visible."""
    return where(chunk.visible, scores) if self.pairs is None else scores * self.pairs


class ScalarDecays:
  """The decays of a block of tokens, for one log-decay a token and head.

  Sums of log-decays are matrix products with a triangle of ones, for all chunks and heads at once;
  products along either axis give them as rows and as columns.

  Args:
    g: [heads * chunks, C], as a window of `cut_scalars`.   chunks: of a block.
    exact: keep the digits that a sum loses to a strong decay before it, as float32 inputs need.
  """

  def __init__(self, g, chunks: int, *, exact: bool):
    self._chunks = chunks
    if len(g) == 1:  # products with a single row are lowered otherwise, in bfloat16 wrongly
      g = jnp.broadcast_to(g, (8, g.shape[1]))
    g = to_bits(g)
    summed = in_two(g) if exact else [g]
    ones = triangle(g.shape[1])
    self._rows = [sum(dot(p, ones, (1, 1)) for p in parts_of(x)) for x in summed]
    self._columns = [sum(dot(ones, p, (1, 1)) for p in parts_of(x)) for x in summed]
    self._since = jnp.exp2(sum(self._columns))
    self._until = jnp.exp2(sum(x[-1:] - x for x in self._columns))

  def of(self, head: int, chunk: Chunk, *, by_key: bool = False) -> Decay:
    """Those of a chunk and head."""
    i = head * self._chunks + chunk.index
    exponent = sum(
      c[:, i : i + 1] - r[i : i + 1] for c, r in zip(self._columns, self._rows, strict=True)
    )
    exponent = -exponent if by_key else exponent
    pairs = jnp.exp2(jnp.where(chunk.visible, exponent, HIDDEN))  # masked before exp: never above 1
    since, until = self._since[:, i : i + 1], self._until[:, i : i + 1]
    return Decay(since, until, since[-1:], pairs)


class NoDecays:
  """As `ScalarDecays` where there are none."""

  def of(self, head: int, chunk: Chunk, *, by_key: bool = False) -> Decay:
    """Nothing decays."""
    return Decay()


def prefix_sum(rows):
  """Sums of the rows before each: [C, K] float32, C a multiple of 8."""
  sublane = _sublanes(rows.shape[1])
  sums, running = [], jnp.zeros_like(rows[:1])
  for x in _eights(rows):
    until = x
    for half in (1, 2, 4):
      until = until + where(sublane & half != 0, _other_total(until, half))
    sums.append(running + until - x)
    running = running + until[7:]
  return jnp.concatenate(sums)


class ChannelDecay:
  """What log-decays do in one chunk of one head, for one a token and channel.

  Two tokens are met at the size of block whose halves part them. With the boundary between the
  halves as anchor, the decay from one to the other is a factor of the later token times one of the
  earlier, neither above 1. So the weights of all pairs, sum_k q_rk k_sk exp(g_{s+1,k} + ... +
  g_rk), are a matrix product for each size, of which those pairs are kept that meet there. Sums are
  built by doubling: only numbers of one sign are added, so no decay, however strong, costs digits
  of another.

  Args:
    g: [C, K] float32, C a power of two from 8 on.

  Attributes:
    halves: 1, 2, 4, ..., C / 2.   blocks: that it was joined from.
  """

  def __init__(self, g):
    self._until = _eights(g * LOG2E)  # from the first token of the block, 8 tokens an array
    self._after = [jnp.zeros_like(x) for x in self._until]  # to the last, without the token itself
    self._exponents, self.blocks = {}, []
    self.halves = tuple(1 << i for i in range(len(g).bit_length() - 1))

  @classmethod
  def joined(cls, blocks: list[ChannelDecay]) -> ChannelDecay:
    """Of a chunk, from those of its blocks: what is wanted of one block can be asked for before the
    next is begun."""
    chunk = cls.__new__(cls)
    chunk.blocks = blocks
    chunk._until, chunk._after, chunk._exponents = [], [], {}
    size = 2 * blocks[0].halves[-1] * len(blocks)
    chunk.halves = tuple(1 << i for i in range(size.bit_length() - 1))
    return chunk

  def _reach(self, half: int):
    """Doubles the blocks until their halves are so large: no earlier than the first use, as what
    waits for it would be kept in memory."""
    if self.blocks and not self._exponents:
      inner = self.blocks[0].halves
      for block in self.blocks:
        block._reach(inner[-1])
        self._until += block._until
        self._after += block._after
      self._exponents = {h: [x for b in self.blocks for x in b._exponents[h]] for h in inner}
    for size in self.halves[len(self._exponents) :]:
      if size > half:
        return
      self._double(size)

  def _double(self, half: int):
    until, after = self._until, self._after
    if half < 8:
      later = _sublanes(until[0].shape[1]) & half != 0
      self._exponents[half] = []
      for i, (u, a) in enumerate(zip(until, after, strict=True)):
        inner = jnp.where(later, u, a)
        outer = inner + _other_total(u, half)
        until[i], after[i] = jnp.where(later, outer, u), jnp.where(later, a, outer)
        self._exponents[half].append(inner)
      return
    half //= 8
    self._exponents[8 * half] = [
      u if i & half else a for i, (u, a) in enumerate(zip(until, after, strict=True))
    ]
    for first in range(0, len(until), 2 * half):
      earlier, later = (
        jnp.broadcast_to(until[i + half - 1][7:], until[i].shape) for i in (first, first + half)
      )
      for i in range(first, first + half):
        after[i] = after[i] + later
        until[i + half] = until[i + half] + earlier

  @property
  def whole(self):
    """[1, K], decay over the chunk."""
    self._reach(self.halves[-1])
    return jnp.exp2(self._until[-1][7:])

  @property
  def since(self):
    """[C, K], from the start of the chunk to each token: its share of the state before."""
    self._reach(self.halves[-1])
    return jnp.exp2(jnp.concatenate(self._until))

  @property
  def until(self):
    """[C, K], from each token to the end of the chunk: its share of the state after."""
    self._reach(self.halves[-1])
    return jnp.exp2(jnp.concatenate(self._after))

  def factor(self, half: int):
    """[C, K], in blocks of two halves: of a later token from the boundary on, of an earlier one to
    the boundary."""
    self._reach(half)
    return jnp.exp2(jnp.concatenate(self._exponents[half]))

  def weights(self, q, k, meeting, dtype):
    """The weight of each query (row) and key (column); what stands right of the diagonal is no
    weight.

    Args:
      q, k: [C, K] float32.   meeting: `meeting_size(C)`.   dtype: of the operands of the products.
    """
    weights = where(meeting == 0, jnp.sum(q * k, axis=1, keepdims=True))
    for half in self.halves:
      x = (alternate(q, k, half) * self.factor(half)).astype(dtype)
      if half < 16:
        weights = jnp.where(meeting == half, dot(x, x, (1, 1)), weights)
        continue
      # Later tokens are whole tiles of rows here, and only they are queries.
      later = [slice(i, i + half) for i in range(half, len(x), 2 * half)]
      pairs = dot(jnp.concatenate([x[rows] for rows in later]), x, (1, 1))
      kept = []
      for i, rows in enumerate(later):
        met = pairs[i * half : (i + 1) * half]
        kept.append(weights[rows.start - half : rows.start])
        kept.append(jnp.where(meeting[rows] == half, met, weights[rows]))
      weights = jnp.concatenate(kept)
    return weights

  def pull(self, q, k, dweights, meeting, dtype):
    """The weights, and the gradients of q and k.

    Args:
      dweights: [C, C], cotangents of the weights, mirrored at the diagonal.
      q, k, meeting, dtype: as of `weights`.
    Returns:
      weights: [C, C], mirrored at the diagonal;   dq, dk: [C, K] float32.
    """
    weights = where(meeting == 0, jnp.sum(q * k, axis=1, keepdims=True))
    diagonal = jnp.sum(where(meeting == 0, dweights), axis=1, keepdims=True)
    dq, dk = diagonal * k, diagonal * q
    for half in self.halves:
      factor, met = self.factor(half), meeting == half
      x = (alternate(q, k, half) * factor).astype(dtype)
      weights = jnp.where(met, dot(x, x, (1, 1)), weights)
      # Of later rows that is dq, of earlier ones dk.
      dx = factor * dot(where(met, dweights).astype(dtype), x, (1, 0))
      zero = jnp.zeros_like(dx)
      dq, dk = dq + alternate(dx, zero, half), dk + alternate(zero, dx, half)
    return weights, dq, dk


def meeting_size(size: int):
  """[C, C] int32: half of the size of the block whose halves part row and column; diagonal: 0."""
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
  different, half = row ^ column, jnp.zeros((size, size), jnp.int32)
  for bit in range(size.bit_length() - 1):
    half = jnp.where(different >= 1 << bit, 1 << bit, half)
  return half


def alternate(later, earlier, half: int):
  """[C, K]: rows of `later` in the later halves of blocks, of `earlier` in the others."""
  size, width = later.shape
  if half < 8:
    row = jax.lax.broadcasted_iota(jnp.int32, (1, 8, width), 1)
    later, earlier = (x.reshape(size // 8, 8, width) for x in (later, earlier))
    return jnp.where(row & half != 0, later, earlier).reshape(size, width)
  turns = enumerate(range(0, size, half))
  return jnp.concatenate([(later if i % 2 else earlier)[at : at + half] for i, at in turns])


def _eights(x):
  return [x[i : i + 8] for i in range(0, len(x), 8)]


def _sublanes(width: int):
  return jax.lax.broadcasted_iota(jnp.int32, (8, width), 0)


def _other_total(until, half: int):
  """[8, K]: for each row, the last row of the other half of its block of two halves."""
  sublane = _sublanes(until.shape[1])
  last = sublane | 2 * half - 1
  other = jnp.where(sublane & half != 0, last - half, last)
  if not pltpu.is_tpu_device() or pltpu.get_tpu_info().generation > 4:
    return jnp.take_along_axis(until, other, axis=0, mode="promise_in_bounds")  # one instruction
  total = until
  for row in range(half - 1, 8, half):
    total = jnp.where(other == row, until[row : row + 1], total)
  return total
