"""Tiles of tokens inside a TPU kernel of the delta rule: what the tokens see and keep, the weights
of their pairs under decay with the gradients, and the inverse of what couples the keys.

A tile is L tokens of one head, in chunks of C. The matrices [C, C] of its chunks lie side by side
along the lanes, [C, L], as many as make a row of 128: half of each register would stay empty
otherwise.

The inverse X of I + M is built from the diagonal outwards: blocks of 8 rows by substitution, then
twice as large ones from pairs of those, the coupling block of each pair being -X_22 M_21 X_11. No
powers of M are formed: those grow without bound where keys repeat, while X does not.

Substitution needs the columns of M, each spread over the 8 lanes of its block by the lane unit, and
two vector operations a row. Each doubling is two products with [L, L] on the MXU, in which the
blocks are side by side again, [b, L]: so few rows that pushing the weights is what costs. For
bfloat16 kernels such a product is hi * hi + hi * lo + lo * hi of parts in bfloat16, exact to 2^-17
of each number; repeated keys with beta 2, where errors do not fade from row to row, add up 14 times
that, still 30 times below the rounding of the inverse to bfloat16 that follows. hi * hi and
hi * lo share one push: the rows of the weights that belong to the other block of each pair would be
zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunks import HIDDEN, in_two, to_bits
from pallas_kernels.chunks_tpu import (
  ChannelDecay,
  alternate,
  dot,
  meeting_size,
  parts_of,
  where,
)
from pallas_kernels.delta_rule.blocks import Blocks

ROWS = 8  # of the blocks inverted by substitution: those of a register


def unit_lower_inverses(matrix: jax.Array, *, exact: bool) -> Generator[None, None, jax.Array]:
  """(I + M)^-1 of each M, strictly lower triangular.

  It yields where its next step waits for the one before, so that others can be written between.

  Args:
    matrix: [C, L] float32, matrices [C, C] side by side; C is 8 times a power of two.
    exact: products in float32; else in three passes of bfloat16.
  Returns:
    [C, L] float32.
  """
  size, width = matrix.shape
  lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, width), 1)
  inverse = yield from _substitute(matrix, lane)
  parts = _parts(matrix, exact)
  while (half := inverse.shape[0]) < size:
    block = block_of(lane, half)
    # For each pair of blocks the rows of M_21, and those of X_11, where their columns lie.
    coupling, inner = [], []
    of_inverse = _parts(inverse, exact)
    for first in range(0, width // half, 2):
      columns, second = block == first, (first + 1) * half % size
      coupling += [_rows(part, second, half, columns) for part in reversed(parts)]
      inner += [_rows(part, 0, half, columns) for part in of_inverse]
    product = yield from _multiply(of_inverse, coupling, exact, second=True)
    product = yield from _multiply(_parts(product, exact), inner, exact, second=False)
    of_first = jax.lax.broadcasted_iota(jnp.int32, (half, width), 1) & half == 0
    inverse = jnp.concatenate([where(of_first, inverse), jnp.where(of_first, -product, inverse)])
  return inverse


def _substitute(matrix, lane):
  """The inverses of the blocks of 8 rows on the diagonal: [8, L], one beside the other."""
  size = matrix.shape[0]
  blocks = matrix[:ROWS]
  for i in range(1, size // ROWS):
    here = block_of(place_in(lane, size), ROWS) == i
    blocks = jnp.where(here, matrix[i * ROWS : (i + 1) * ROWS], blocks)
  row = jax.lax.broadcasted_iota(jnp.int32, blocks.shape, 0)
  inverse = jnp.where(row == place_in(lane, ROWS), 1.0, 0.0)
  for i in range(ROWS - 1):
    column = jnp.take_along_axis(blocks, lane - place_in(lane, ROWS) + i, axis=1)
    inverse = inverse - column * inverse[i : i + 1]
    yield
  return inverse


def _parts(x, exact: bool):
  """x as a sum of two: what bfloat16 holds of it, and the rest; or all of it, and nothing."""
  high = x if exact else x.astype(jnp.bfloat16).astype(jnp.float32)
  return high, x - high


def _rows(part, at: int, count: int, mask):
  """`count` rows of `part` from `at`, 0 outside the mask."""
  rows = (where(mask, part[i : i + ROWS]) for i in range(at, at + count, ROWS))
  return jnp.concatenate(list(rows))


def _multiply(parts, weights, exact: bool, *, second: bool):
  """What the blocks [b, b] of `parts`, [b, L] each, give that are the second, or the first, of
  their pairs.

  The weights hold the first part of their numbers in the rows that those blocks meet, and the
  second part in the rows that the others of the pairs meet: to these the first part is copied.
  """
  high, low = parts
  half, width = high.shape
  lane = jax.lax.broadcasted_iota(jnp.int32, high.shape, 1)
  own = lane & half != 0 if second else lane & half == 0
  high = jnp.where(own, high, pltpu.roll(high, width - half if second else half, 1))
  weights = jnp.concatenate(weights)
  if not exact:
    high = jnp.concatenate([high, where(own, low)]).astype(jnp.bfloat16)
    weights = weights.astype(jnp.bfloat16)
  yield
  product = dot(high, weights, (1, 0))
  yield
  return product if exact else product[:half] + product[half:]


def block_of(index, size: int):
  """The number of the block of `size`, a power of two, that an index lies in. (Not by //, which in
  a kernel cannot be lowered for a TPU without one.)"""
  return index >> size.bit_length() - 1


def place_in(index, size: int):
  """Where in its block of `size` an index lies."""
  return index & size - 1


def fold(x, size: int):
  """The blocks [C, C] on the diagonal of [L, L], side by side: [C, L]."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (size, x.shape[1]), 1)
  folded = x[:size]
  for i in range(1, x.shape[1] // size):
    folded = jnp.where(block_of(lane, size) == i, x[i * size : (i + 1) * size], folded)
  return folded


def unfold(x):
  """Blocks [C, C] side by side, [C, L], as the diagonal of [L, L]."""
  size, width = x.shape
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.concatenate([where(block_of(lane, size) == i, x) for i in range(width // size)])


def spread(column, size: int):
  """[L, 1] -> [C, L], the number of row r of chunk m in all columns of that chunk."""
  return fold(jnp.broadcast_to(column, (column.shape[0],) * 2), size)


def shifted(x, by: int):
  """[L, K]: rows moved down by a power of two, or up if it is negative, within their eight or, from
  8 on, within their block of twice as many; what leaves it comes in at the other end."""
  if (half := abs(by)) < 8:
    return jnp.concatenate([pltpu.roll(x[i : i + 8], by % 8, 0) for i in range(0, len(x), 8)])
  return jnp.concatenate([x[i ^ half : (i ^ half) + half] for i in range(0, len(x), half)])


def _row_sums(x):
  return jnp.sum(x, axis=1, keepdims=True)


def last_rows(x, size: int):
  """Of each chunk of rows the last, on all of them."""
  rows = (x[i + size - 1 : i + size] for i in range(0, x.shape[0], size))
  return jnp.concatenate([jnp.broadcast_to(row, (size, x.shape[1])) for row in rows])


class Masks:
  """What the tokens of a tile see and keep, whatever their head.

  Attributes:
    visible: [C, L], which key (column) a query (row) sees; the other way round by key.
    reads, writes: [L, 1], which queries read the state before their chunk, and which keys stay in
      the state after it; None means all.
    keeps: for each chunk [1, 1], whether the state before is part of the state after, or None.
  """

  def __init__(self, documents_ref, t: int, *, blocks: Blocks, by_key: bool):
    size, width = blocks.chunk, blocks.tile
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, width), axis) for axis in (0, 1))
    column = place_in(column, size)
    self.visible = row <= column if by_key else row >= column
    self.reads = self.writes = None
    self.keeps = [None] * (width // size)
    if documents_ref is None:
      return
    of_column = documents_ref[0, 0, :1, pl.ds(t * width, width)]
    of_row = jnp.broadcast_to(of_column, (width, width)).T
    self.visible = self.visible & (fold(of_row, size) == of_column)
    before = jnp.broadcast_to(documents_ref[0, 0, 1:, pl.ds(t * width, width)], (width, width)).T
    of_row, before = of_row[:, :1], before[:, :1]
    last = last_rows(of_row, size)
    self.reads, self.writes = of_row == before, of_row == last
    keeps = before == last
    self.keeps = [keeps[i : i + 1] for i in range(0, width, size)]


class RowDecay:
  """The decay of one head in a tile where each token has one, or none.

  Attributes:
    since: [L, 1], from the start of its chunk to each token: its share of the state before.
    until: [L, 1], from each token to the end of its chunk: its share of the state after.
    whole: for each chunk [1, 1], over all of it.   None stands for 1.
  """

  def __init__(self, masks: Masks, size: int, rows=(), columns=(), *, by_key: bool):
    def weight(mask, exponent):
      if columns:
        return where(mask, jnp.exp2(exponent))
      return None if mask is None else jnp.where(mask, 1.0, 0.0)

    column = sum(columns) if columns else None
    ends = [
      None if column is None else column[i + size - 1 : i + size]
      for i in range(0, len(masks.keeps) * size, size)
    ]
    self.since = weight(masks.reads, column)
    self.until = weight(
      masks.writes, sum(last_rows(x, size) - x for x in columns) if columns else None
    )
    self.whole = [weight(*pair) for pair in zip(masks.keeps, ends, strict=True)]
    self._pairs = masks.visible
    if columns:
      exponent = sum(spread(c, size) - r for r, c in zip(rows, columns, strict=True))
      exponent = -exponent if by_key else exponent
      self._pairs = jnp.exp2(jnp.where(masks.visible, exponent, HIDDEN))
    self._size = size
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, masks.visible.shape, i) for i in (0, 1))
    self._strict = row != place_in(lane, size)

  def _weigh(self, x):
    return jnp.where(self._pairs, x, 0.0) if self._pairs.dtype == bool else x * self._pairs

  def weights(self, lefts, right):
    """sum_k left_rk right_sk times the decay between r and s: [C, L] for each of `lefts` [L, K]."""
    products = [dot(x, right, (1, 1)) for x in lefts]
    yield
    return [self._weigh(fold(x, self._size)) for x in products]

  def pull(self, q, k, dscores, dcoupling, beta):
    """dq, and the gradients of k as the row, without beta, and as the column of a coupling.

    Args:
      q, k: [L, K].   beta: [1, L].   dscores, dcoupling: [C, L] by key, the cotangents of the
        weights of q, and of those of k, with k.
    """
    dscores, dcoupling = self._weigh(dscores), where(self._strict, self._weigh(dcoupling))
    size = self._size
    turned = jnp.concatenate([dscores, dcoupling]).T.astype(q.dtype)
    yield
    dk = dot(unfold(dscores.astype(q.dtype)), q, (1, 0))
    dk += dot(unfold((dcoupling * beta).astype(q.dtype)), k, (1, 0))
    dq, drows = [], []
    for first in range(0, len(k), size):
      inside = slice(first, first + size)
      dq.append(dot(turned[inside, :size], k[inside], (1, 0)))
      drows.append(dot(turned[inside, size:], k[inside], (1, 0)))
    yield
    return jnp.concatenate(dq), jnp.concatenate(drows), dk

  def gradient(self, terms, dstates, triangle):
    """The gradient of the sums of log-decays from each chunk's start, [L, 1].

    Args:
      terms: [L, K], what pairs give each channel.   dstates: for each chunk, the state after it
        times its cotangent [K, V].
    """
    last = jax.lax.broadcasted_iota(jnp.int32, (self._size, 1), 0) == self._size - 1
    dstates = [
      where(last, jnp.broadcast_to(jnp.sum(x, keepdims=True), (self._size, 1))) for x in dstates
    ]
    return jnp.sum(terms, axis=1, keepdims=True) + jnp.concatenate(dstates)


class Room(NamedTuple):
  """Memory for what one head of a tile wants to know where each channel decays.

  Attributes:
    operands: [2 * sizes + 3, L, K], for each size at which tokens meet in a product its two
      operands; then k and q times the decay since the start of their chunk, k until its end.
    weights: [2, C, L] float32, of q and k, and of k and k.
    whole: [8 * L / C, K] float32, the decay over a chunk in eight rows.
  """

  operands: jax.Array
  weights: jax.Array
  whole: jax.Array

  def chunk(self, m: int, size: int):
    """What the walk wants of a chunk: k since, q since, k until: [C, K]; whole: [K, 1]."""
    rows, count = pl.ds(m * size, size), self.operands.shape[0]
    operands = [self.operands[i, rows] for i in range(count - 3, count)]
    return *operands, self.whole[pl.ds(8 * m, 8)].T[:, :1]


def rooms(blocks: Blocks, key_dim: int, dtype):
  """The memory of a `Room` for each head."""
  heads, size, width = blocks.heads, blocks.chunk, blocks.tile
  shapes = ((2 * len(_products(size)) + 3, width, key_dim), (2, size, width))
  return [
    pltpu.VMEM((heads, *shapes[0]), dtype),
    pltpu.VMEM((heads, *shapes[1]), jnp.float32),
    pltpu.VMEM((heads, 8 * (width // size), key_dim), jnp.float32),
  ]


def _products(size: int) -> list[int]:
  """The halves of blocks whose pairs `ChannelsDecay.meet` takes from products."""
  return [1 << i for i in range(1, size.bit_length() - 1)]


class ChannelsDecay:
  """The same where each token has one for each channel: since, until [L, K], whole [K, 1]."""

  def __init__(self, masks: Masks, size: int, g):
    self._step = min(16, size)
    self._chunks = [
      ChannelDecay.joined(
        [ChannelDecay(g[j : j + self._step]) for j in range(i, i + size, self._step)]
      )
      for i in range(0, len(g), size)
    ]
    self._size, self._masks = size, masks
    meeting = fold(meeting_size(len(g)), size)
    self._meeting = jnp.where(masks.visible, meeting, -1)

  @functools.cached_property
  def since(self):
    """[L, K], from the start of its chunk to each token: its share of the state before."""
    return where(self._masks.reads, jnp.concatenate([c.since for c in self._chunks]))

  @functools.cached_property
  def until(self):
    """[L, K], from each token to the end of its chunk: its share of the state after."""
    return where(self._masks.writes, jnp.concatenate([c.until for c in self._chunks]))

  @functools.cached_property
  def whole(self):
    """For each chunk [K, 1], over all of it."""
    return [
      where(keep, jnp.broadcast_to(c.whole, (8, c.whole.shape[1])).T[:, :1])
      for keep, c in zip(self._masks.keeps, self._chunks, strict=True)
    ]

  def _factor(self, half: int):
    return jnp.concatenate([chunk.factor(half) for chunk in self._chunks])

  def weights(self, lefts, right):
    """As of `RowDecay`, of one left and by key."""
    size, width = self._size, len(right)
    (left,) = lefts
    own, x = (y.astype(jnp.float32) for y in (right, left))
    weights = where(self._meeting == 0, spread(_row_sums(x * own), size))
    for half in self._chunks[0].halves:
      factor = self._factor(half)
      scaled = (factor * own).astype(right.dtype)
      # Where halves are whole tiles of rows, only those that meet others are needed.
      step = half if half >= 8 else width
      starts = range(0, width, 2 * step)
      rows = [factor[i : i + step] * x[i : i + step] for i in starts]
      products = dot(jnp.concatenate(rows).astype(right.dtype), scaled, (1, 1))
      yield
      for j, start in enumerate(starts):
        weights = self._meet(weights, products[j * step : (j + 1) * step], start, half)
    return [weights]

  def stage(self, q, k, room):
    """Puts into a room what `meet` wants, and the walk through the states.

    Of a product's rows, those of later tokens are q, those of earlier tokens the k that stand a
    half later: either is wanted for later tokens only. Tokens meet themselves and the one before
    them in sums over lanes, of which the lane unit has many to spare, instead of products.
    """
    size, step, width = self._size, self._step, len(k)
    of_chunk = block_of(jax.lax.broadcasted_iota(jnp.int32, (8, width), 1), size)
    weights = [[jnp.zeros((8, width), jnp.float32)] * (size // 8) for _ in range(2)]

    def scale(first, q, k, factor, half):
      fq, fk = factor * q, factor * k
      rows, at = pl.ds(first, len(q)), 2 * _products(size).index(half)
      room.operands[at, rows] = alternate(fq, shifted(fk, -half), half).astype(dtype)
      room.operands[at + 1, rows] = fk.astype(dtype)

    dtype = room.operands.dtype
    for m, chunk in enumerate(self._chunks):
      inside = [x[m * size : (m + 1) * size].astype(jnp.float32) for x in (q, k)]
      for i, block in enumerate(chunk.blocks):
        q_of, k_of = (x[i * step : (i + 1) * step] for x in inside)
        before = block.factor(1) * shifted(k_of, 1)
        own, *near = (_row_sums(x) for x in (q_of * k_of, q_of * before, k_of * before))
        for j in range(step // 8):
          r, here = i * step // 8 + j, slice(8 * j, 8 * j + 8)
          meeting = jnp.where(of_chunk == m, self._eights()[r], -1)
          for w, x in zip(weights, near, strict=True):
            w[r] = jnp.where(meeting == 1, x[here], w[r])
          weights[0][r] = jnp.where(meeting == 0, own[here], weights[0][r])
        for half in block.halves[1:]:
          scale(m * size + i * step, q_of, k_of, block.factor(half), half)
        yield
      for half in chunk.halves[len(block.halves) :]:
        scale(m * size, *inside, chunk.factor(half), half)
      rows = pl.ds(m * size, size)
      reads, writes = (
        None if x is None else x[m * size : (m + 1) * size]
        for x in (self._masks.reads, self._masks.writes)
      )
      since, until = where(reads, chunk.since), where(writes, chunk.until)
      for n, x in enumerate((since * inside[1], since * inside[0], until * inside[1])):
        room.operands[2 * len(_products(size)) + n, rows] = x.astype(dtype)
      room.whole[pl.ds(8 * m, 8)] = jnp.broadcast_to(chunk.whole, (8, k.shape[1]))
      yield
    for n, w in enumerate(weights):
      room.weights[n] = jnp.concatenate(w)

  def meet(self, room):
    """Puts into the room the weights of all pairs, from what `stage` has put there."""
    size = self._size
    products = [
      dot(room.operands[2 * i], room.operands[2 * i + 1], (1, 1))
      for i in range(len(_products(size)))
    ]
    yield
    weights = [[room.weights[n, pl.ds(i, 8)] for i in range(0, size, 8)] for n in (0, 1)]
    for half, product in zip(_products(size), products, strict=True):
      of_q = fold(product, size)
      of_k = shifted(of_q, half)
      for r, meeting in enumerate(self._eights()):
        if half < 8 or r & half // 8:
          here = slice(8 * r, 8 * r + 8)
          for w, x in zip(weights, (of_q, of_k), strict=True):
            w[r] = jnp.where(meeting == half, x[here], w[r])
    for n, w in enumerate(weights):
      room.weights[n] = jnp.concatenate(w)

  def _eights(self):
    return [self._meeting[i : i + 8] for i in range(0, self._size, 8)]

  def _meet(self, weights, products, start: int, half: int):
    """Puts those products into the weights [C, L] whose rows, from `start` of the tile on, meet at
    this size."""
    size = self._size
    chunk = block_of(jax.lax.broadcasted_iota(jnp.int32, self._meeting.shape, 1), size)
    met = self._meeting == half
    for first in range(0, len(products), size):
      count = min(size, len(products))
      m, i = divmod(start + first, size)
      here = met[i : i + count] & (chunk[i : i + count] == m)
      inner = jnp.where(here, products[first : first + count], weights[i : i + count])
      weights = jnp.concatenate([x for x in (weights[:i], inner, weights[i + count :]) if len(x)])
    return weights

  def pull(self, q, k, dscores, dcoupling, beta):
    """dq, and the gradients of k; see `RowDecay`."""
    size, dtype = self._size, q.dtype
    both = jnp.concatenate([dscores, dcoupling]).T  # [L, 2 C]
    meeting = self._meeting.T
    dcolumns = [dscores, dcoupling * beta]
    diagonal = where(self._meeting == 0, dscores)
    dk = dot(unfold(diagonal.astype(dtype)), q, (1, 0))
    dq = dot(unfold(diagonal.astype(dtype)), k, (1, 0))
    drows = jnp.zeros_like(dq)
    for half in self._chunks[0].halves:
      factor = self._factor(half)
      fq, fk = ((factor * x.astype(jnp.float32)).astype(dtype) for x in (q, k))
      met = self._meeting == half
      dx = dot(unfold(where(met, dcolumns[0]).astype(dtype)), fq, (1, 0))
      dx += dot(unfold(where(met, dcolumns[1]).astype(dtype)), fk, (1, 0))
      dk += factor * dx
      met = meeting == half
      turned = [where(met, both[:, i * size : (i + 1) * size]).astype(dtype) for i in (0, 1)]
      inner = [[], []]
      for first in range(0, len(k), size):
        inside = slice(first, first + size)
        for i in (0, 1):
          inner[i].append(dot(turned[i][inside], fk[inside], (1, 0)))
      yield
      dq += factor * jnp.concatenate(inner[0])
      drows += factor * jnp.concatenate(inner[1])
    return dq, drows, dk

  def gradient(self, terms, dstates, triangle):
    """The gradient of the log-decays, [L, K]; see `RowDecay`."""
    last = jax.lax.broadcasted_iota(jnp.int32, (self._size, 1), 0) == self._size - 1
    ones = jnp.ones((8, dstates[0].shape[1]), jnp.bfloat16)
    rows = [sum(dot(ones, p, (1, 1)) for p in parts_of(x))[:1] for x in dstates]
    terms += jnp.concatenate(
      [where(last, jnp.broadcast_to(x, (self._size, x.shape[1]))) for x in rows]
    )
    return sum(dot(triangle, p, (0, 0)) for p in parts_of(terms))


class Gates:
  """Write strengths, decays and documents of a block, of all its heads and tiles."""

  def __init__(self, beta_ref, g_ref, documents_ref, load, *, blocks: Blocks, exact, by_key):
    size, width = blocks.chunk, blocks.tile
    self._blocks, self._by_key, self._g_ref, self._load = blocks, by_key, g_ref, load
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (width, width), axis) for axis in (0, 1))
    inside = (row >= column) & (block_of(row, size) == block_of(column, size))
    self.triangle = jnp.where(inside, 1.0, 0.0).astype(jnp.bfloat16)
    one = jnp.where(row == column, 1.0, 0.0).astype(jnp.bfloat16)
    self._beta = _rows_of(beta_ref)
    self._beta_columns = sum(dot(one, part, (1, 1)) for part in parts_of(self._beta))
    self._rows = self._columns = ()
    if g_ref is not None and len(g_ref.shape) == 5:
      g = to_bits(_rows_of(g_ref))
      summed = in_two(g) if exact else [g]
      self._rows = [sum(dot(p, self.triangle, (1, 1)) for p in parts_of(x)) for x in summed]
      self._columns = [sum(dot(self.triangle, p, (1, 1)) for p in parts_of(x)) for x in summed]
    self.masks = [
      Masks(documents_ref, t, blocks=blocks, by_key=by_key) for t in range(blocks.tiles)
    ]

  def beta(self, h: int, t: int):
    """Of a tile of a head: as a row [1, L] and as a column [L, 1]."""
    i = h * self._blocks.tiles + t
    return self._beta[i : i + 1], self._beta_columns[:, i : i + 1]

  def decay(self, h: int, t: int):
    """Of a tile of a head."""
    masks, size = self.masks[t], self._blocks.chunk
    if self._g_ref is not None and len(self._g_ref.shape) == 4:
      g = self._load(self._g_ref, h, t * self._blocks.tile, self._blocks.tile)
      return ChannelsDecay(masks, size, g)
    i = h * self._blocks.tiles + t
    rows, columns = [x[i : i + 1] for x in self._rows], [x[:, i : i + 1] for x in self._columns]
    return RowDecay(masks, size, rows, columns, by_key=self._by_key)


def _rows_of(ref):
  """The rows of a window of `cut_scalars`. A single one is repeated: as an operand it would make a
  product of a matrix with a vector, which Mosaic cannot lower in bfloat16."""
  rows = ref[0, 0, 0]
  return jnp.broadcast_to(rows, (8, rows.shape[1])) if len(rows) == 1 else rows
