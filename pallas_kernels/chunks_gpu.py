"""What the GPU kernels of chunked recurrences share: how the work is cut, loads and stores of
tiles, what a chunk's tokens are to one another, and decays.

Kernels are written for Pallas's Triton backend, the only one with tensor cores on every GPU since
Ampere. Arrays stay as callers have them, [B, T, heads, K]: a row of a head is one contiguous piece
of memory. Pallas computes offsets in 64 bits where an array is larger than 4 GiB.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

DTYPES = ("float32", "bfloat16")
WIDEST = 512  # key channels whose states fit the registers

LOG2E = 1 / math.log(2)  # decays are powers of two inside, one instruction each
# Log-decays of a token in powers of two: below this they are 0 in float32 all the same. So bounded,
# sums of multiples of 1 / GRAIN are exact in float32.
STRONGEST = -160.0
GRAIN = 256.0
HIDDEN = -1e4  # exponent of a pair that must not see each other


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How the work is cut.

  Attributes:
    chunk: tokens of one chunk (C).
    keys, values: channels of one tile of keys, of values. A program that carries a state holds all
      tiles of keys and one of values.
    warps: of a program that carries a state.
  """

  chunk: int
  keys: int
  values: int
  warps: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of a call.

  Attributes:
    batch, length, key_dim, value_dim: B, T, K, V.
    heads: of the state (H).   most: of the array that has the most.
    blocks: how it is cut.
  """

  batch: int
  length: int
  heads: int
  most: int
  key_dim: int
  value_dim: int
  blocks: Blocks

  @property
  def chunks(self) -> int:
    """Chunks of a row."""
    return pl.cdiv(self.length, self.blocks.chunk)

  @property
  def group(self) -> int:
    """Queries that read one state."""
    return self.most // self.heads

  @property
  def key_tiles(self) -> int:
    """Tiles of keys."""
    return pl.cdiv(self.key_dim, self.blocks.keys)

  @property
  def value_tiles(self) -> int:
    """Tiles of values."""
    return pl.cdiv(self.value_dim, self.blocks.values)

  def with_keys(self, most: int) -> Plan:
    """The same with tiles of so many keys at most."""
    blocks = dataclasses.replace(self.blocks, keys=min(self.blocks.keys, most))
    return dataclasses.replace(self, blocks=blocks)

  def head(self, ref, user):
    """Where in an array of [B, T, heads, ...] stands what a head of the array with the most uses.
    """
    return user // (self.most // ref.shape[2])

  def keys(self, tile):
    """Channels of a tile of keys, and which of them exist."""
    return _channels(tile, self.blocks.keys, self.key_dim)

  def values(self, tile):
    """Channels of a tile of values, and which of them exist."""
    return _channels(tile, self.blocks.values, self.value_dim)


def make_plan(q, k, v, blocks: Blocks | None) -> Plan:
  """The plan for q, k [B, T, heads, K] and v [B, T, heads, V]."""
  batch, length, _, key_dim = q.shape
  heads, value_dim = max(k.shape[2], v.shape[2]), v.shape[3]
  blocks = blocks or choose_blocks(batch * heads, key_dim, value_dim, q.dtype)
  most = max(q.shape[2], heads)
  return Plan(batch, length, heads, most, key_dim, value_dim, blocks)


def choose_blocks(states: int, key_dim: int, value_dim: int, dtype) -> Blocks:
  """The blocks for so many states (B * H).

  A state lies in the registers of a program's warps, in tiles. Wide keys leave fewer values for
  each program, and where states are few, values are cut finer so that there are more programs.
  """
  exact = jnp.dtype(dtype) == jnp.float32
  keys = min(64, tile_size(key_dim))
  held = keys * pl.cdiv(key_dim, keys)
  room = 4096 if exact else 8192  # numbers of a state that four warps hold beside their work
  values = min(64, tile_size(value_dim), max(16, 1 << (room // held).bit_length() - 1))
  while values > 32 and states * pl.cdiv(value_dim, values) < 256:
    values //= 2
  return Blocks(chunk=32 if exact else 64, keys=keys, values=values, warps=4)


def tile_size(dim: int) -> int:
  """The least power of two from 16 on, the least that a tensor core multiplies, that is not
  below."""
  return max(16, 1 << (dim - 1).bit_length())


def shortage(key_dim: int) -> str | None:
  """Why a state does not fit the registers, or None."""
  if key_dim <= WIDEST:
    return None
  return (
    f"key_dim={key_dim} needs a state of {key_dim} x 16 float32 in the registers of one program "
    f"and {WIDEST} x 16 fit; split the heads"
  )


def mixed_dtypes(**arrays) -> str | None:
  """Why arrays of these dtypes are not taken, or None."""
  dtypes = [str(x.dtype) for x in arrays.values()]
  if dtypes[0] in DTYPES and len(set(dtypes)) == 1:
    return None
  names = ", ".join(arrays)
  return f"{names} are {', '.join(dtypes)}, expected all float32 or all bfloat16"


def compiler_params(warps: int, stages: int) -> plgpu.CompilerParams:
  """Without which Pallas would take another backend."""
  return plgpu.CompilerParams(num_warps=warps, num_stages=stages)


def _channels(tile, size: int, dim: int):
  first = tile * size
  exists = None if dim % size == 0 else first + jnp.arange(size) < dim
  return pl.ds(first, size), exists


def load(ref, index: tuple, *masks):
  """The tile at an index; zeros where a mask, one an axis or None, does not hold."""
  mask = _all(masks)
  return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0)


def store(ref, index: tuple, tile, *masks):
  """Writes a tile where the masks hold."""
  plgpu.store(ref.at[index], tile.astype(ref.dtype), mask=_all(masks))


def _all(masks):
  """The tile of where one mask an axis holds; None where all do."""
  found = None
  for axis, mask in enumerate(masks):
    if mask is not None:
      shape = [1] * len(masks)
      shape[axis] = mask.shape[0]
      mask = mask.reshape(shape)
      found = mask if found is None else found & mask
  return found


def dot(a, b, axes: tuple[int, int] = (1, 0)):
  """Contracts axes[0] of a with axes[1] of b on tensor cores, accumulating in float32; float32
  operands are not rounded."""
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((axes[0],), (axes[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def times(x, factor, axis: int):
  """x [., .] times a vector along an axis; None is all ones."""
  if factor is None:
    return x
  return x * (factor[:, None] if axis == 0 else factor[None, :])


class Chunk:
  """One chunk of C tokens of a row of the batch.

  Attributes:
    number: of the chunk.   rows: its tokens.
    exists: [C], which of them are not beyond the length; None means all.
    documents: [C], the document of each; None means one.
    reads, writes: [C], which queries read the state before the chunk, and which keys stay in the
      state after it; None means all.
    keeps: whether the state before is part of the state after; None means yes.
  """

  def __init__(self, plan: Plan, documents_ref, batch, number):
    size, length = plan.blocks.chunk, plan.length
    first = number * size
    self._first, self._size = first, size
    self.number, self.rows = number, pl.ds(first, size)
    self.exists = None if length % size == 0 else first + jnp.arange(size) < length
    self.documents = self.reads = self.writes = self.keeps = None
    if documents_ref is not None:
      self.documents = load(documents_ref, (batch, self.rows), self.exists)
      last = documents_ref[batch, jnp.minimum(first + size, length) - 1]
      before = documents_ref[batch, jnp.maximum(first - 1, 0)]
      before = jnp.where(number > 0, before, 0)  # the state given belongs to document 0
      self.reads, self.writes = self.documents == before, self.documents == last
      self.keeps = last == before

  def visible(self, *, by_key: bool = False):
    """[C, C], which key (column) a query (row) sees; the other way round with `by_key`."""
    of_query, of_key = orient(by_key)
    # Counted from the row's beginning: what is the same in each chunk would be kept in registers.
    token = self._first + jnp.arange(self._size)
    visible = of_query(token) >= of_key(token)
    if self.documents is not None:
      visible &= of_query(self.documents) == of_key(self.documents)
    return visible


def orient(by_key: bool):
  """How a vector over queries, and one over keys, lie in a matrix of pairs."""
  row, column = (lambda x: x[:, None]), (lambda x: x[None, :])
  return (column, row) if by_key else (row, column)


class Weights:
  """What a chunk's tokens weigh for one another and for the state, with one decay a token.

  Attributes:
    read, write: [C], what is left of the state before the chunk where a query reads it, and of a
      key in the state after the chunk.
    keep: what is left of the state before in the state after.
  """

  def __init__(self, chunk: Chunk, g):
    """g: [C], zeros beyond the length."""
    self._chunk = chunk
    # A difference of sums would lose the digits that the larger sum lacks. In two parts it does
    # not: the one adds and subtracts exactly, the other stays small.
    g = jnp.maximum(g * LOG2E, STRONGEST)
    coarse = jnp.floor(g * GRAIN) / GRAIN
    fine = g - coarse
    total = jnp.sum(coarse), jnp.sum(fine)
    self._sums = coarse, fine = jnp.cumsum(coarse), jnp.cumsum(fine)
    self.read = kept(chunk.reads, jnp.exp2(coarse + fine))
    self.write = kept(chunk.writes, jnp.exp2((total[0] - coarse) + (total[1] - fine)))
    self.keep = kept(chunk.keeps, jnp.exp2(total[0] + total[1]))

  def decay(self, scores):
    """scores [C, C] of queries (rows) and keys, weighted."""
    row, column = orient(False)
    coarse, fine = (row(x) - column(x) for x in self._sums)
    return scores * jnp.exp2(jnp.where(self._chunk.visible(), coarse + fine, HIDDEN))


def kept(mask, x):
  """x where the mask holds, else 0; None holds everywhere."""
  return x if mask is None else jnp.where(mask, x, 0)


class Levels:
  """Sums of vector decays within aligned blocks of a chunk: of 2, 4, ... tokens, or of all.

  A pair of tokens is met at the size of block whose halves part them. With the boundary between the
  halves as anchor the decay is one factor of the query times one of the key, neither above 1, so
  each size is a matrix product. The sums are products too, with matrices of zeros and ones: only
  numbers of one sign are added, so no decay, however strong, costs digits of another.
  """

  def __init__(self, size: int, load_g: Callable, dtype):
    """size: C.   load_g: returns g [C, K], zeros beyond the length. It is called for each sum: held
    over all of them, what the tensor cores take of g would fill the registers.   dtype: of the
    rows, which says how exact to be."""
    self.size, self.count = size, size.bit_length() - 1
    self._load_g, self._dtype = load_g, dtype

  def until(self):
    """[C, K], what is left after the tokens from the first to this one."""
    row, column, token = self._pairs()
    return self._left(column(token) <= row(token))

  def after(self):
    """[C, K], what is left after the tokens behind this one."""
    row, column, token = self._pairs()
    return self._left(column(token) > row(token))

  def total(self):
    """[K], what is left after all."""
    return jnp.exp2(jnp.sum(self._logs(), axis=0))

  def at(self, level):
    """Of blocks of 2 ** (level + 1) tokens: [C, K], what is left between each token and the
    boundary between the halves; [C, 1], which tokens are in the second half; [C, C], which pairs
    are in one block."""
    row, column, token = self._pairs()
    half, block = token >> level, token >> (level + 1)
    second = row((half & 1) == 1)
    before, behind = column(token) <= row(token), column(token) > row(token)
    between = ((second & before) | (~second & behind)) & (row(half) == column(half))
    return self._left(between), second, row(block) == column(block)

  def _pairs(self):
    return *orient(False), jnp.arange(self.size)

  def _logs(self):
    return jnp.maximum(self._load_g() * LOG2E, STRONGEST)

  def _left(self, which):
    return jnp.exp2(add_rows(which, split(self._logs(), self._dtype)))


def split(x, dtype) -> list:
  """x in float32 as a sum of parts that the tensor cores take as they are: exactly, or, where
  `dtype` is bfloat16, to 16 digits."""
  parts = []
  for _ in range(3 if dtype == jnp.float32 else 2):
    # Cut off, not rounded: a compiler may take a number rounded and widened again for itself.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
    part = jax.lax.bitcast_convert_type(bits, jnp.float32)
    parts.append(part.astype(jnp.bfloat16))
    x = x - part
  return parts


def add_rows(which, parts: list):
  """Row r: the sum of the rows s of x with which[r, s], x being the sum of `parts`."""
  which = which.astype(jnp.bfloat16)
  return functools.reduce(jnp.add, [dot(which, part) for part in parts])


def sum_passed(read, written):
  """[C]: for each token the sum of `read` [C] from it on and of `written` [C] before it: of all
  that its decay stands between."""
  row, column = orient(False)
  token = jnp.arange(read.shape[0])
  return jnp.sum(jnp.where(column(token) >= row(token), column(read), column(written)), axis=1)


def both(one, other):
  """Where two masks hold, None being everywhere."""
  if one is None or other is None:
    return other if one is None else one
  return one & other


def add(terms):
  """The sum of arrays, of which there is one at least."""
  return functools.reduce(jnp.add, terms)
