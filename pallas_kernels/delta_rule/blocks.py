"""How the delta-rule kernels on TPU cut their work: by shape, and by the chip's VMEM."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

# Of the smallest chip (v4): what a program lowered for TPU without a mesh of TPUs is cut for.
SMALLEST_VMEM = 16 * 2**20
CHUNK = 64
TILE = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What one grid step holds.

  Attributes:
    chunk: tokens between two states (C), 8 times a power of two.
    tile: tokens whose matrices of pairs stand side by side (L), a multiple of the chunk.
    tiles: tiles of a block. The state is kept for the backward pass once a block.
    heads: heads of a block; a multiple of those that share keys, and divides H.
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
    """The same block with a whole tile as its chunk."""
    return dataclasses.replace(self, chunk=self.tile)


def choose_blocks(
  length: int, heads: int, group: int, key_dim: int, value_dim: int, dtype, decay: str | None
) -> Blocks:
  """The blocks for arrays [B, length, heads, key_dim or value_dim] on the chip of `jax.set_mesh`."""
  tiles = 2
  if length <= TILE:
    tiles = 1
  choices = [h for h in range(group, min(heads, 8) + 1, group) if heads % h == 0] or [group]
  return Blocks(CHUNK, TILE, tiles, choices[-1])


def vmem_limit(blocks: Blocks, key_dim: int, value_dim: int, dtype) -> int:
  return 100 * 2**20
