"""How the linear-attention kernels on TPU cut their work: by shape, by kind of decay, and by the
chip's VMEM and MXU."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

# Of the smallest chip (v4): what a program lowered for TPU without a mesh of TPUs is cut for.
SMALLEST_VMEM = 16 * 2**20
SMALLEST_MXU = 128

# 128 x 128 matrix tiles that a grid step's straight-line code may work through: enough to fill the
# slots of the schedule and to hide the step's own cost, few enough to compile in seconds. Decays of
# channels make more code of a tile.
TILES_A_STEP = {None: 16, "token": 16, "channel": 4}
TOKENS_A_STEP = 512


class Sizes(NamedTuple):
  """What the kernels' work depends on.

  Attributes:
    length: T.   of_rows: heads of q, k and v.   key_dim, value_dim: K, V.   dtype: of q, k and v.
    decay: None, one log-decay a "token" and head, or a "channel" of keys.
  """

  length: int
  of_rows: tuple[int, int, int]
  key_dim: int
  value_dim: int
  dtype: str
  decay: str | None

  @classmethod
  def of(cls, q, k, v, g) -> Sizes:
    """Of q [B, T, heads, K], k, v [B, T, heads, V] and g, as `forward` takes them."""
    decay = None if g is None else "channel" if g.ndim == 4 else "token"
    heads = tuple(x.shape[2] for x in (q, k, v))
    return cls(q.shape[1], heads, q.shape[3], v.shape[3], str(q.dtype), decay)

  @property
  def most(self) -> int:
    """Heads of the arrays that have the most."""
    return max(self.of_rows)

  @property
  def fewest(self) -> int:
    """Heads of those that have the fewest."""
    return min(self.of_rows)

  @property
  def heads(self) -> int:
    """States."""
    return max(self.of_rows[1:])

  @property
  def state(self) -> tuple[int, int, int]:
    """Shape of the states of a row: H, K, V."""
    return self.heads, self.key_dim, self.value_dim

  @property
  def carried(self) -> tuple[int, int]:
    """Shape of a state inside the kernels."""
    dims = (self.key_dim, self.value_dim)
    return dims[::-1] if self.decay == "channel" else dims


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What one grid step holds.

  Attributes:
    chunk: tokens of one matrix of scores (C).
    chunks: chunks of a block.
    heads: heads of a block, counted in the arrays with the most; whole groups of heads that share
      others, or a part of one such group, where each has a state.
  """

  chunk: int
  chunks: int
  heads: int

  @property
  def tokens(self) -> int:
    """Tokens of a block."""
    return self.chunk * self.chunks


def choose_blocks(sizes: Sizes) -> Blocks:
  """The blocks for arrays of these sizes on the chip of `jax.set_mesh`.

  A chunk is as wide as the MXU; with decays of channels it is a power of two and at most 128, as
  wider ones only add sizes at which pairs of tokens meet. A block spans 512 tokens where it fits,
  so that the states kept for the backward pass are a 16th of q, k, v and y at head size 128 in
  bfloat16. Heads then fill the step. What does not fit VMEM loses heads first, then chunks, then
  the length of its chunk.

  Raises:
    ValueError: one chunk of 16 tokens of the fewest heads does not fit; the message gives bytes and
      a head size that fits.
  """
  vmem, mxu = _chip()
  limit = TILES_A_STEP[sizes.decay]
  choices = _choices(sizes)

  def fits(blocks):
    return vmem_bytes(blocks, sizes) <= _usable(vmem)

  def serves(blocks):
    return _tiles(blocks, sizes) <= limit and fits(blocks)

  if sizes.decay == "channel":
    chunk = min(128, max(16, 1 << (sizes.length - 1).bit_length()))
  else:
    chunk = min(mxu, _ceil(sizes.length, 16) * 16)
  chunks = min(TOKENS_A_STEP // max(chunk, SMALLEST_MXU), _ceil(sizes.length, chunk))
  while chunks > 1 and not serves(Blocks(chunk, chunks, choices[0])):
    chunks //= 2
  while chunk > 16 and not fits(Blocks(chunk, chunks, choices[0])):
    chunk = _ceil(chunk, 32) * 16
  if not fits(Blocks(chunk, chunks, choices[0])):
    raise ValueError(_shortage(sizes, choices[0], vmem))
  return next(
    blocks
    for heads in reversed(choices)
    if serves(blocks := Blocks(chunk, chunks, heads)) or heads == choices[0]
  )


def _choices(sizes: Sizes) -> list[int]:
  """Numbers of heads that a block may have, from the least."""
  group = sizes.most // sizes.fewest
  whole = [group * n for n in range(1, sizes.fewest + 1) if sizes.fewest % n == 0]
  if sizes.heads < sizes.most:  # queries that share a state are read together
    return whole
  return [n for n in range(1, group) if group % n == 0] + whole


def _tiles(blocks: Blocks, sizes: Sizes) -> int:
  """128 x 128 matrix tiles of a grid step."""
  exact = 3 if sizes.dtype == "float32" else 1  # more passes through the MXU
  dims = _ceil(sizes.key_dim, 128) * _ceil(sizes.value_dim, 128)
  return exact * blocks.heads * _ceil(blocks.tokens, 128) * dims


def vmem_bytes(blocks: Blocks, sizes: Sizes) -> int:
  """Bytes of VMEM that the backward kernel, the larger of the two, holds at once: an estimate from
  above.

  Its windows stand twice, as the next step's are fetched while one is worked on.
  """
  size = jnp.dtype(sizes.dtype).itemsize
  k, v = _ceil(sizes.key_dim, 128) * 128, _ceil(sizes.value_dim, 128) * 128
  of_q, of_k, of_v, states = (
    max(blocks.heads * heads // sizes.most, 1) for heads in (*sizes.of_rows, sizes.heads)
  )
  cell = max(states, sizes.most // sizes.fewest if sizes.heads == sizes.most else 1)
  # q, k, v and their gradients; dy, at most float32; g and dg.
  rows = 2 * ((of_q + of_k) * k + of_v * v) * size + blocks.heads * v * 4
  if sizes.decay == "channel":
    rows += 2 * states * k * 4
  kept = blocks.chunks if sizes.decay == "channel" else 1
  windows = blocks.tokens * (rows + 8 * 4) + k * v * (states * kept * size + cell * 8)
  within = k * v * (cell * 4 + states * blocks.chunks * size)
  shared = [
    of * dim
    for of, dim, heads in zip((of_q, of_k, of_v), (k, k, v), sizes.of_rows, strict=True)
    if heads < sizes.heads
  ]
  sums = blocks.tokens * sum(shared) * 4
  # Values that outgrow the registers: measured, at most so many matrices of C rows.
  matrices = 28 if size == 4 else 24
  if sizes.decay == "channel":  # on v4, whose registers are half of the others'
    matrices *= 3 * blocks.chunks * blocks.heads
  temporaries = matrices * blocks.chunk * max(blocks.chunk, k, v) * size
  return 2 * windows + within + sums + temporaries


def vmem_limit(blocks: Blocks, sizes: Sizes) -> int:
  """Bytes of VMEM to grant a kernel: what it needs and half of that again, at least the compiler's
  own default, at most the chip's."""
  vmem, _ = _chip()
  return min(max(vmem_bytes(blocks, sizes) * 3 // 2, SMALLEST_VMEM), vmem)


def _chip() -> tuple[int, int]:
  """Bytes of VMEM of a TensorCore, and the side of its MXU."""
  if not pltpu.is_tpu_device():
    return SMALLEST_VMEM, SMALLEST_MXU
  info = pltpu.get_tpu_info()
  return info.vmem_capacity_bytes, info.mxu_column_size


def _usable(vmem: int) -> int:
  return vmem * 3 // 4  # the compiler's own buffers take the rest


def _shortage(sizes: Sizes, heads: int, vmem: int) -> str:
  smallest = Blocks(16, 1, heads)
  needed, usable = vmem_bytes(smallest, sizes), _usable(vmem)

  def fits(size):
    return vmem_bytes(smallest, sizes._replace(key_dim=size, value_dim=size)) <= usable

  size = 128
  while fits(size + 128):
    size += 128
  repair = f"heads of {size} x {size} fit" if fits(size) else "let fewer share one"
  group = sizes.most // sizes.fewest
  together = f" with {group} heads that share one" if group > 1 else ""
  return (
    f"key_dim={sizes.key_dim}, value_dim={sizes.value_dim} in {sizes.dtype}{together} need "
    f"{needed:,} bytes of VMEM and {usable:,} are available; {repair}"
  )


def _ceil(a: int, b: int) -> int:
  return -(-a // b)
