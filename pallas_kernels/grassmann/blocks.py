"""How the Grassmann kernels on TPU cut their work, by shape and by the chip's VMEM and cores, and
the order in which they take the rows of the weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grassmann.reference import pairs_of

LANES = 128
ROWS = 8  # of float32 in a register

BIASES = 3  # rows: a bias in float32 is the sum of three numbers in bfloat16

# Of the smallest chip (v4): what a program lowered for TPU without a mesh of TPUs is cut for.
SMALLEST_VMEM = 16 * 2**20

GROUP = 256  # tokens of one product: the widest MXU
# 128 x 128 tiles of the weight that a grid step's straight-line code may meet, for each 128 tokens
# once: enough to hide what a step costs, few enough to compile in seconds. Backward there are two
# products and most of the vector work.
TILES_A_STEP = {"forward": 512, "backward": 256}
TOKENS_A_STEP = {"forward": 1024, "backward": 512}


class Sizes(NamedTuple):
  """What the kernels' work depends on.

  Attributes:
    length: T.   rank: R.   width: D.   most: the largest offset.   offsets: how many there are.
    dtype: of the weight.
  """

  length: int
  rank: int
  width: int
  most: int
  offsets: int
  dtype: str

  @classmethod
  def of(cls, z, weight, offsets: Sequence[int]) -> Sizes:
    """Of z [B, T, ..., R] and weight [P, D]."""
    sizes = z.shape[1], z.shape[-1], weight.shape[1], max(offsets), len(offsets)
    return cls(*sizes, str(weight.dtype))

  @property
  def channels(self) -> int:
    """R, filled up to whole registers."""
    return _ceil(self.rank, ROWS) * ROWS

  @property
  def pairs(self) -> int:
    """Rows of the weight in circulant order, filled up to whole tiles."""
    return _ceil(self.channels * self.channels // 2, LANES) * LANES

  @property
  def halo(self) -> int:
    """Tokens before a block that its own may meet."""
    return _ceil(self.most, LANES) * LANES


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What one grid step holds.

  Attributes:
    tokens: of a block, a multiple of 128.   columns: of the weight, a multiple of 128.
  """

  tokens: int
  columns: int

  @property
  def group(self) -> int:
    """Tokens of one product."""
    return GROUP if self.tokens % GROUP == 0 else LANES

  @property
  def column_groups(self) -> list[tuple[int, int]]:
    """First column and number of columns of each product."""
    starts = range(0, self.columns, GROUP)
    return [(start, min(GROUP, self.columns - start)) for start in starts]

  @property
  def chunks(self) -> int:
    """Of 128 tokens."""
    return self.tokens // LANES


def choose_blocks(
  sizes: Sizes, direction: str, *, tokens: int | None = None, columns: int | None = None
) -> Blocks:
  """The blocks for arrays of these sizes on the chip of `jax.set_mesh`.

  As many columns of the weight as fit, since for each part of them z is read and the pairs are
  made again; where a chip has two cores, half for each. Then as many tokens as fit, but at least
  256 if there are so many and fewer columns allow it.

  Args:
    direction: "forward" or "backward".   tokens, columns: None chooses.
  Raises:
    ValueError: 128 tokens and 128 columns do not fit VMEM; the message gives the bytes.
  """
  vmem, cores = _chip()
  whole = _ceil(sizes.width, LANES)
  parts = range(cores if whole >= cores else 1, whole + 1)
  wide = [columns] if columns else [_ceil(whole, part) * LANES for part in parts]
  most = min(TOKENS_A_STEP[direction], LANES << (_ceil(sizes.length, LANES) - 1).bit_length())
  tall = [tokens] if tokens else [most >> n for n in range(4) if most >> n >= LANES]
  several = [n for n in tall if n >= GROUP]

  def serves(blocks):
    tiles = blocks.chunks * (sizes.pairs // LANES) * (blocks.columns // LANES)
    small = tiles <= TILES_A_STEP[direction] or blocks == Blocks(tall[-1], wide[-1])
    return small and vmem_bytes(blocks, sizes, direction) <= _usable(vmem)

  choices = [Blocks(n, c) for ns in (several, tall) for c in wide for n in ns]
  chosen = next((blocks for blocks in choices if serves(blocks)), None)
  if tokens and columns and chosen is None:
    return choices[0]
  if chosen is None:
    raise ValueError(_shortage(sizes, direction, vmem))
  return chosen


def shortage(sizes: Sizes) -> str | None:
  """Why no blocks fit VMEM, or None."""
  try:
    for direction in TILES_A_STEP:
      choose_blocks(sizes, direction)
  except ValueError as error:
    return str(error)
  return None


def vmem_bytes(blocks: Blocks, sizes: Sizes, direction: str) -> int:
  """Bytes of VMEM that a kernel holds at once: an estimate from above.

  Its windows stand twice, as the next step's are fetched while one is worked on.
  """
  size, rows = jnp.dtype(sizes.dtype).itemsize, sizes.channels
  tokens, columns, pairs = blocks.tokens, blocks.columns, sizes.pairs
  around = sizes.halo + tokens
  windows = rows * around * 4 + 8 * tokens * 4 + pairs * columns * size + tokens * columns * size
  if direction == "forward":
    scratch = (
      (rows + ROWS) * around * 4 + 4 * (rows + ROWS) * tokens * 4 + pairs * (tokens + 256) * 4
    )
    values = blocks.group * (pairs * size + 2 * min(columns, GROUP) * 4)
  else:
    windows += rows * (around + sizes.halo) * 4 + pairs * columns * 4
    scratch = (2 * rows + ROWS) * around * 4 + 256 * (
      4 * (rows + ROWS) + pairs + sizes.offsets * rows
    ) * 4
    scratch += (pairs + columns) * tokens * size + 2 * (rows + ROWS) * rows // 2 * blocks.group * 4
    values = blocks.group * pairs * 4 + pairs * GROUP * 4
  return 2 * windows + scratch + values


def vmem_limit(blocks: Blocks, sizes: Sizes, direction: str) -> int:
  """Bytes of VMEM to grant a kernel: what it needs and half of that again, at least the compiler's
  own default, at most the chip's."""
  vmem, _ = _chip()
  return min(max(vmem_bytes(blocks, sizes, direction) * 3 // 2, SMALLEST_VMEM), vmem)


def _chip() -> tuple[int, int]:
  """Bytes of VMEM of a TensorCore, and how many of them work as one device."""
  if not pltpu.is_tpu_device():
    return SMALLEST_VMEM, 1
  info = pltpu.get_tpu_info()
  return info.vmem_capacity_bytes, info.num_cores


def _usable(vmem: int) -> int:
  return vmem * 3 // 4  # the compiler's own buffers take the rest


def _shortage(sizes: Sizes, direction: str, vmem: int) -> str:
  smallest, usable = Blocks(LANES, LANES), _usable(vmem)

  def fits(rank):
    return vmem_bytes(smallest, sizes._replace(rank=rank), direction) <= usable

  rank = next((rank for rank in range(sizes.rank - 1, 1, -1) if fits(rank)), None)
  return (
    f"rank {sizes.rank} with offsets up to {sizes.most} and a weight in {sizes.dtype} needs "
    f"{vmem_bytes(smallest, sizes, direction):,} bytes of VMEM and {usable:,} are available; "
    + (f"rank {rank} fits" if rank else "smaller offsets fit")
  )


def _ceil(a: int, b: int) -> int:
  return -(-a // b)


@functools.cache
def _order(channels: int, rank: int):
  """Of each circulant row the pair that it holds, R (R - 1) / 2 for none, and its sign; of each
  pair its circulant row."""
  count = len(pairs_of(rank)[0])
  number = np.full((channels, channels), count)
  number[pairs_of(rank)] = np.arange(count)
  i, k = np.arange(channels), np.arange(1, channels // 2 + 1)[:, None]
  j = (i + k) % channels
  pairs, signs = number[np.minimum(i, j), np.maximum(i, j)], np.where(i < j, 1.0, -1.0)
  pairs[-1, channels // 2 :] = count  # these came before
  pairs, signs = pairs.ravel(), signs.ravel()
  rows = np.zeros(count, int)
  rows[pairs[pairs < count]] = np.flatnonzero(pairs < count)
  return pairs, signs, rows


def _bias_rows(sizes: Sizes) -> slice:
  first = sizes.channels * (sizes.channels - 1) // 2
  return slice(first, first + BIASES)


def circulant(weight, bias, sizes: Sizes):
  """Weight and bias -> [pairs, D filled up to whole tiles] in circulant order."""
  pairs, signs, _ = _order(sizes.channels, sizes.rank)
  rows = jnp.pad(weight, ((0, 1), (0, 0)))[pairs] * jnp.asarray(signs, weight.dtype)[:, None]
  parts, rest = [], bias.astype(jnp.float32)
  for _ in range(BIASES):
    parts.append(rest.astype(weight.dtype))
    rest = rest - parts[-1].astype(jnp.float32)
  rows = rows.at[_bias_rows(sizes)].set(jnp.stack(parts))
  return jnp.pad(rows, ((0, sizes.pairs - len(pairs)), (0, -sizes.width % LANES)))


def from_circulant(dweight, sizes: Sizes):
  """[pairs, D] -> gradients of the weight and of the bias."""
  _, signs, rows = _order(sizes.channels, sizes.rank)
  signs = jnp.asarray(signs[rows], dweight.dtype)[:, None]
  return dweight[rows] * signs, dweight[_bias_rows(sizes).start]
