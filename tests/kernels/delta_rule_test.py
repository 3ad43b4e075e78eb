"""The inverse inside the TPU kernels of the delta rule, what they refuse, and how they cut their
work."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.ops.products import invert_unit_lower
from pallas_kernels.delta_rule import blocks, tpu
from pallas_kernels.delta_rule.tiles_tpu import unit_lower_inverses


@pytest.mark.parametrize("exact", [True, False], ids=["float32", "three passes"])
@pytest.mark.parametrize("size", [64, 128])
def test_repeated_keys(size, exact, no_worse, errors, rounding):
  """The inverse keeps its digits where all keys of a chunk are one, and powers of the matrix would
  overflow: as many as that of the matmul form, or, where it is rounded to bfloat16 afterwards, so
  many that only a 32nd of that rounding is missing."""

  def run(matrix):
    task = unit_lower_inverses(matrix, exact=exact)
    while True:
      try:
        next(task)
      except StopIteration as end:
        return end.value

  invert = jax.jit(run)
  lower = np.tril(np.ones((size, size)), -1)
  row, column = np.indices((size, size))
  beside = max(128 // size, 1)
  for beta in (1.0, 2.0):
    for g in (0.0, -0.1):
      matrix = (beta * lower * np.exp(g * (row - column) * lower)).astype(np.float32)
      expected = np.linalg.inv(np.eye(size) + matrix.astype(np.float64))
      by_xla = np.asarray(jax.jit(invert_unit_lower)(matrix))
      found = np.asarray(invert(np.concatenate([matrix] * beside, axis=1)))
      for part in np.split(found, beside, axis=1):
        if exact:
          no_worse({"X": part}, {"X": by_xla}, {"X": expected}, f"beta={beta}, g={g}")
          continue
        rms, largest, _ = errors(part, expected)
        assert max(rms, largest) <= rounding(jnp.bfloat16, 1) / 32, f"beta={beta}, g={g}: {largest}"


def test_refusals():
  """A kernel that cannot run says why, and what can."""

  def refused(queries=2, keys=2, values=2, dim=8, dtype=jnp.float32):
    q, k, v = (
      jax.ShapeDtypeStruct((1, 128, heads, dim), dtype) for heads in (queries, keys, values)
    )
    beta = jax.ShapeDtypeStruct((1, 128, max(keys, values)), jnp.float32)
    return tpu.refusal(q, k, v, beta, None)

  assert refused() is None
  assert refused(dtype=jnp.float16) == (
    "q, k, v are float16, float16, float16, expected all float32 or all bfloat16"
  )
  assert refused(queries=4) == "q has 4 heads and there are 2 states, expected at most as many"
  needed = blocks.vmem_bytes(blocks.Blocks(64, 128, 1, 1), 2048, 2048, jnp.float32, None)
  assert needed > 6 * 2048 * 2048 * 4  # a state, those within a block, and their cotangents
  assert refused(dim=2048) == (
    f"a head with key_dim=2048, value_dim=2048 in float32 need {needed:,} bytes of VMEM and "
    "14,680,064 are available; a head of 384 x 384 fits"
  )
  text = refused(queries=1, keys=1, values=32, dim=128)
  assert re.fullmatch(
    r"32 heads that share rows with key_dim=128, value_dim=128 in float32 need [\d,]+ bytes of "
    r"VMEM and 14,680,064 are available; \d heads may share",
    text,
  )


@pytest.mark.parametrize("length", [1, 63, 200, 100_000])
@pytest.mark.parametrize(
  ("size", "groups"), [(4, (1, 3)), (64, (1, 3)), (128, (1, 2)), (256, (1,))]
)
def test_blocks(length, size, groups):
  """Blocks divide the heads into whole groups, and fit the smallest chip."""
  for dtype in (jnp.float32, jnp.bfloat16):
    for decay in (None, "row", "channel"):
      for group in groups:
        chosen = blocks.choose_blocks(length, 6, group, size, size, dtype, decay)
        assert 6 % chosen.heads == 0 and chosen.heads % group == 0
        assert chosen.tokens < length + 128
        needed = blocks.vmem_bytes(chosen, size, size, dtype, decay)
        assert needed <= blocks.SMALLEST_VMEM
