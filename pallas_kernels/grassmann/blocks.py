"""How the Grassmann kernels on TPU cut their work."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128
ROWS = 8


class Sizes(NamedTuple):
  length: int
  rank: int
  width: int
  most: int
  count: int
  dtype: str

  @classmethod
  def of(cls, z, weight, offsets):
    return cls(z.shape[1], z.shape[2], weight.shape[1], max(offsets), len(offsets), str(weight.dtype))

  @property
  def channels(self):
    return -(-self.rank // ROWS) * ROWS

  @property
  def pairs(self):
    return -(-self.channels * self.channels // 2 // LANES) * LANES

  @property
  def halo(self):
    return -(-self.most // LANES) * LANES


@dataclasses.dataclass(frozen=True)
class Blocks:
  tokens: int
  group: int
  columns: int


def choose_blocks(sizes, tokens=None):
  tokens = tokens or min(1024 if sizes.rank <= 32 else 512, -(-sizes.length // LANES) * LANES)
  return Blocks(tokens, 256 if tokens % 256 == 0 else 128, -(-sizes.width // LANES) * LANES)


def vmem_limit(blocks, sizes):
  return 100 * 2**20
