"""What the GPU kernels of chunked recurrences share: how the work is cut, loads and stores of
tiles, what a chunk's tokens are to one another, and decays.

Kernels are for Pallas's Triton backend, the only one with tensor cores on every GPU since Ampere.
Arrays stay [B, T, heads, K]. Pallas computes offsets in 64 bits for arrays above 4 GiB.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.chunks import HIDDEN, in_two, to_bits

WIDEST = 256  # key channels whose states, and tiles of q and k, fit registers and shared memory
NARROW = 32  # channels of a tile of keys beside so much else that wider ones overfill the registers
NARROWEST = 16  # the same beside vector decays, or float32 in three parts, and two gradients


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How the work is cut.

  Attributes:
    chunk: tokens of one chunk (C).
    keys, values: channels of one tile of keys, of values. A program that carries a state holds all
      tiles of keys and one of values.
  """

  chunk: int
  keys: int
  values: int


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
    """Where in an array [B, T, heads, ...] stands what a head of the array with the most uses."""
    return user // (self.most // ref.shape[2])

  def keys(self, tile):
    """Channels of a tile of keys, and which exist."""
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
  """The blocks for so many states (B * H). Wide keys leave registers for fewer values in each
  program, and where states are few, values are cut finer so that there are more programs. The parts
  of float32 (`split`) leave room for half as much in a step."""
  exact = jnp.dtype(dtype) == jnp.float32
  keys = min(NARROW if exact else 64, tile_size(key_dim))
  held = keys * pl.cdiv(key_dim, keys)
  room = 2048 if exact else 8192  # numbers of a state that registers hold beside the work
  values = min(64, tile_size(value_dim), max(16, 1 << (room // held).bit_length() - 1))
  while values > 32 and states * pl.cdiv(value_dim, values) < 256:
    values //= 2
  return Blocks(chunk=32 if exact else 64, keys=keys, values=values)


def tile_size(dim: int) -> int:
  """The least power of two that is not below, from 16 on, which a tensor core wants."""
  return max(16, 1 << (dim - 1).bit_length())


def shortage(key_dim: int) -> str | None:
  """Why the tiles of a walk do not fit, or None."""
  if key_dim <= WIDEST:
    return None
  return (
    f"key_dim={key_dim}: one program holds all channels of a key, and registers and shared memory "
    f"have room for {WIDEST}; split the heads"
  )


def compiler_params(warps: int) -> plgpu.CompilerParams:
  """Those of a kernel whose programs have so many warps."""
  return plgpu.CompilerParams(num_warps=warps, num_stages=2)


def _channels(tile, size: int, dim: int):
  first = tile * size
  if dim % size == 0:
    return pl.ds(first, size), None
  # As an array: a number that reaches beyond the channels would be refused, mask or no mask.
  return pl.ds(jnp.int32(first), size), first + jnp.arange(size) < dim


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


def dot(a, b, axes: tuple[int, int] = (1, 0), dtype=jnp.float32):
  """Contracts axes[0] of a with axes[1] of b on tensor cores, accumulating in float32. float32
  operands go as sums of bfloat16 (see `split`), in the products that matter: whole, they would
  pass by the tensor cores and overfill the registers."""
  if a.dtype == jnp.bfloat16:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
  a, b = split(a, dtype), split(b, dtype)
  pairs = sorted(((i, j) for i in range(len(a)) for j in range(len(a) - i)), key=sum)
  return add(dot(a[i], b[j], axes) for i, j in reversed(pairs))  # the small ones first


def times(x, factor, axis: int):
  """x [., .] times a vector along an axis; None is all ones."""
  if factor is None:
    return x
  return x * (factor[:, None] if axis == 0 else factor[None, :])


class Chunk:
  """One chunk of C tokens of a row of the batch.

  Attributes:
    rows: its tokens.
    exists: [C], which of them are not beyond the length; None means all.
    packed: whether there are documents. What depends on them is loaded when it is asked for: held,
      it would take registers from everything between.
  """

  def __init__(self, plan: Plan, documents_ref, batch, number):
    self._length, self._size = plan.length, plan.blocks.chunk
    self._documents_ref, self._batch = documents_ref, batch
    self._number, self._first = number, number * self._size
    self.packed = documents_ref is not None
    self.rows = pl.ds(self._first, self._size)
    self.exists = None
    if plan.length % self._size:
      self.exists = self._first + jnp.arange(self._size) < plan.length

  @property
  def reads(self):
    """[C], which queries read the state before the chunk; None means all."""
    return self._documents() == self._before() if self.packed else None

  @property
  def writes(self):
    """[C], which keys stay in the state after the chunk; None means all."""
    return self._documents() == self._last() if self.packed else None

  @property
  def keeps(self):
    """Whether the state before is part of the state after; None means yes."""
    return self._before() == self._last() if self.packed else None

  def visible(self, *, by_key: bool = False):
    """[C, C], which key (column) a query (row) sees; the other way round with `by_key`."""
    of_query, of_key = orient(by_key)
    # Counted from the row's beginning: what is the same in each chunk would be kept in registers.
    token = self._first + jnp.arange(self._size)
    visible = of_query(token) >= of_key(token)
    if self.packed:
      documents = self._documents()
      visible &= of_query(documents) == of_key(documents)
    return visible

  def _documents(self):
    return load(self._documents_ref, (self._batch, self.rows), self.exists)

  def _before(self):
    """The document of the state before; the state given belongs to document 0."""
    before = self._documents_ref[self._batch, jnp.maximum(self._first - 1, 0)]
    return jnp.where(self._number > 0, before, 0)

  def _last(self):
    end = jnp.minimum(self._first + self._size, self._length)
    return self._documents_ref[self._batch, end - 1]


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
    coarse, fine = in_two(to_bits(g))
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
    return to_bits(self._load_g())

  def _left(self, which):
    return jnp.exp2(add_rows(which, split(self._logs(), self._dtype)))


def split(x, dtype) -> list:
  """x in float32 as a sum of bfloat16: exactly, or, where `dtype` is bfloat16, to 16 digits."""
  parts = []
  for _ in range(3 if dtype == jnp.float32 else 2):
    # Rounded by hand: a compiler may take a number rounded and widened again for itself.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) + jnp.int32(2**15)
    bits &= jnp.int32(-(2**16))
    part = jax.lax.bitcast_convert_type(bits, jnp.float32)
    parts.append(part.astype(jnp.bfloat16))
    x = x - part
  return parts


def add_rows(which, parts: list):
  """Row r: the sum of the rows s of x with which[r, s], x being the sum of `parts`."""
  which = which.astype(jnp.bfloat16)
  return functools.reduce(jnp.add, [dot(which, part) for part in parts])


def sum_passed(read, written):
  """[C], what each token's decay stands between: the sum of `read` from it on and of `written`
  before it."""
  row, column = orient(False)
  token = jnp.arange(read.shape[0])
  return jnp.sum(jnp.where(column(token) >= row(token), column(read), column(written)), axis=1)


def apart(pairs):
  """Pairs [C, C] of tokens with earlier ones, and with themselves [C], which nothing decays."""
  row, column = orient(False)
  token = jnp.arange(pairs.shape[0])
  own = jnp.where(row(token) == column(token), pairs.astype(jnp.float32), 0)
  return jnp.where(row(token) > column(token), pairs, 0), jnp.sum(own, axis=1)


def both(one, other):
  """Where two masks hold, None being everywhere."""
  if one is None or other is None:
    return other if one is None else one
  return one & other


def add(terms):
  """The sum of arrays, of which there is one at least."""
  return functools.reduce(jnp.add, terms)


def is_vector(g) -> bool:
  """Whether g has a decay for each key channel."""
  return g is not None and g.ndim == 4


def sum_shared(dx, x):
  """The gradient of x from those of its heads' users, summed in float32."""
  if dx.shape == x.shape:
    return dx.astype(x.dtype)
  shared = dx.reshape(*x.shape[:3], -1, x.shape[3])
  return shared.sum(axis=3).astype(x.dtype)


def gradient_of(x, heads: int):
  """What a kernel writes the gradient of x to: a head for each user, float32 where it is summed."""
  batch, length, own, dim = x.shape
  shape = (batch, length, max(own, heads), dim)
  return jax.ShapeDtypeStruct(shape, x.dtype if own >= heads else jnp.float32)


def call(
  kernel,
  plan: Plan,
  grid,
  out_shape,
  *,
  name: str,
  flops: int,
  exponentials: int = 0,
  warps: int = 4,
  interpret=False,
):
  """A `pallas_call` of `kernel(*refs, plan=plan)`, which sees whole arrays, as a GPU does. Four
  warps are one product of 64 rows on Hopper; eight hold some tiles twice, and the others in half
  the registers."""

  def run(*arrays):
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, out_shape)))
    return pl.pallas_call(
      functools.partial(kernel, plan=plan),
      grid=grid,
      out_shape=out_shape,
      compiler_params=compiler_params(warps),
      cost_estimate=pl.CostEstimate(
        flops=flops, transcendentals=exponentials, bytes_accessed=moved
      ),
      name=name,
      interpret=interpret,
    )(*arrays)

  return run
