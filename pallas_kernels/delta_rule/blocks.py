"""How the delta-rule kernels on TPU cut their work: by shape, and by the chip's VMEM."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

# Of the smallest chip (v4): what a program lowered for TPU without a mesh of TPUs is cut for.
SMALLEST_VMEM = 16 * 2**20

CHUNK = 64  # longer ones cost more in the inverse, shorter ones more in the states between them
TILE = 128  # lanes of a register
# Steps of one head wait for one another: others fill the gaps, up to so many. More bundles than
# those of so many tiles take minutes to compile.
HEADS = 8
TILES_A_STEP = {None: 16, "row": 16, "channel": 8}


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What one grid step holds.

  Attributes:
    chunk: tokens between two states (C), 8 times a power of two.
    tile: tokens whose matrices of pairs stand side by side (L), a multiple of the chunk.
    tiles: tiles of a block. The state is kept for the backward pass once a block.
    heads: heads of a block; a multiple of those that share rows, and divides H.
  """

  chunk: int
  tile: int
  tiles: int
  heads: int

  @property
  def tokens(self) -> int:
    """Tokens of a block."""
    return self.tile * self.tiles

  @property
  def chunks(self) -> int:
    """Chunks of a block."""
    return self.tokens // self.chunk

  @property
  def by_tile(self) -> Blocks:
    """The same block with whole tiles as its chunks."""
    return dataclasses.replace(self, chunk=self.tile)


def choose_blocks(
  length: int,
  heads: int,
  group: int,
  key_dim: int,
  value_dim: int,
  dtype,
  decay: str | None,
) -> Blocks:
  """The blocks for H heads of `length` tokens on the chip of `jax.set_mesh`.

  As many heads as fill the gaps of the schedule, at least a group; then two tiles, if they fit, so
  that one is prepared while the states walk through the other.

  Args:
    group: heads that share rows of q, k or v.
    decay: None, "row" or "channel": what has a decay of its own.
  Raises:
    ValueError: one tile of one group does not fit VMEM; the message gives bytes and what fits.
  """
  vmem = _vmem()
  counts = [h for h in range(group, heads + 1, group) if heads % h == 0]
  few = [h for h in counts if h <= HEADS] or counts[:1]
  for count in reversed(few):
    for tiles in (2, 1) if length > TILE else (1,):
      blocks = Blocks(CHUNK, TILE, tiles, count)
      small = count * tiles <= TILES_A_STEP[decay] or tiles == 1
      if small and vmem_bytes(blocks, key_dim, value_dim, dtype, decay) <= _usable(vmem):
        return blocks
  raise ValueError(_shortage(group, key_dim, value_dim, dtype, decay, _usable(vmem)))


def forward_blocks(
  blocks: Blocks, heads: int, key_dim: int, value_dim: int, dtype, decay: str | None
) -> Blocks:
  """The blocks of the forward kernel. Where channels decay it weighs pairs in a loop over heads, so
  that it can have twice as many in the steps that wait for one another."""
  twice = dataclasses.replace(blocks, heads=2 * blocks.heads)
  if decay != "channel" or heads % twice.heads:
    return blocks
  fits = vmem_bytes(twice, key_dim, value_dim, dtype, decay) <= _usable(_vmem())
  return twice if fits else blocks


def heads_together(blocks: Blocks) -> int:
  """How many heads weigh their pairs at a time: on chips whose matrix units answer late, two."""
  late = pltpu.is_tpu_device() and pltpu.get_tpu_info().generation >= 6
  return 2 if late and blocks.heads % 2 == 0 else 1


def vmem_bytes(blocks: Blocks, key_dim: int, value_dim: int, dtype, decay: str | None) -> int:
  """Bytes of VMEM that the backward kernel, the larger of the two, holds at once: an estimate from
  above.

  Its windows stand twice, as the next step's are fetched while one is worked on.
  """
  size = jnp.dtype(dtype).itemsize
  k, v = _ceil(key_dim, 128) * 128, _ceil(value_dim, 128) * 128
  rows = blocks.tokens * (4 * k + 4 * v) * size  # q, k, dq, dk; v, dv, dy, pseudo-values
  rows += blocks.tokens * (blocks.chunk * size + 4 * 4)  # inverses; beta, g and their gradients
  if decay == "channel":
    rows += blocks.tokens * 2 * k * 4
  states = k * v * (size + 8)  # the state kept; the cotangents of the last and of the first state
  within = (blocks.chunks + 1) * k * v * size
  # Values that outgrow the registers, between the tasks of each head: measured, at most so many
  # matrices of a tile in float32.
  temporaries = (12 if decay == "channel" else 8) * blocks.tile * max(k, v) * 4
  shared = blocks.tokens * 8 * 4 * 2 + 16 * blocks.tile * max(blocks.tile, k, v) * 4
  return blocks.heads * (2 * (rows + states) + within + temporaries) + shared


def vmem_limit(blocks: Blocks, key_dim: int, value_dim: int, dtype, decay: str | None) -> int:
  """Bytes of VMEM to grant a kernel: what it needs and half of that again, at least the compiler's
  own default, at most the chip's."""
  needed = vmem_bytes(blocks, key_dim, value_dim, dtype, decay)
  return min(max(needed * 3 // 2, SMALLEST_VMEM), _vmem())


def _vmem() -> int:
  """Bytes of VMEM of a TensorCore."""
  return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else SMALLEST_VMEM


def _usable(vmem: int) -> int:
  return vmem * 7 // 8  # the compiler's own buffers take the rest


def _shortage(group: int, key_dim: int, value_dim: int, dtype, decay: str | None, usable: int):
  def needed(heads: int, *dims: int) -> int:
    return vmem_bytes(Blocks(CHUNK, TILE, 1, heads), *dims, dtype, decay)

  heads = f"{group} heads that share rows" if group > 1 else "a head"
  fitting = max((n for n in range(1, group) if needed(n, key_dim, value_dim) <= usable), default=0)
  size = 128
  while needed(1, size + 128, size + 128) <= usable:
    size += 128
  repair = f"{fitting} heads may share" if fitting else f"a head of {size} x {size} fits"
  return (
    f"{heads} with key_dim={key_dim}, value_dim={value_dim} in {jnp.dtype(dtype)} need "
    f"{needed(group, key_dim, value_dim):,} bytes of VMEM and {usable:,} are available; {repair}"
  )


def _ceil(a: int, b: int) -> int:
  return -(-a // b)
