"""What the TPU kernels of linear attention refuse, and how they cut their work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.linear_attention import blocks, tpu


def test_refusals():
  """A kernel that cannot run says why, and what can."""

  def refusal(heads, size, dtype):
    q, k, v = (jax.ShapeDtypeStruct((1, 128, h, size), dtype) for h in heads)
    return tpu.refusal(q, k, v, None)

  sizes = blocks.Sizes(128, (2, 2, 2), 4096, 4096, "float32", None)
  needed = blocks.vmem_bytes(blocks.Blocks(16, 1, 1), sizes)
  assert needed > 3 * 4096 * 4096 * 4  # a state and its cotangents
  assert refusal((2, 2, 2), 4096, jnp.float32) == (
    f"key_dim=4096, value_dim=4096 in float32 need {needed:,} bytes of VMEM and 12,582,912 are "
    "available; heads of 512 x 512 fit"
  )
  sizes = blocks.Sizes(128, (512, 1, 1), 128, 128, "float32", None)
  needed = blocks.vmem_bytes(blocks.Blocks(16, 1, 512), sizes)
  assert refusal((512, 1, 1), 128, jnp.float32) == (
    f"key_dim=128, value_dim=128 in float32 with 512 heads that share one need {needed:,} bytes of "
    "VMEM and 12,582,912 are available; let fewer share one"
  )
  assert refusal((2, 2, 2), 8, jnp.float16) == (
    "q, k, v are float16, float16, float16, expected all float32 or all bfloat16"
  )
  assert refusal((2, 2, 2), 512, jnp.float32) is None
  assert refusal((1, 1, 24), 128, jnp.bfloat16) is None


@pytest.mark.parametrize("length", [1, 2, 63, 200, 513, 100_000])
@pytest.mark.parametrize("size", [4, 64, 128, 256, 512])
def test_blocks(length, size):
  """Blocks hold whole groups of heads or parts of one, no chunk that is not needed, and fit the
  smallest chip."""
  for dtype in ("float32", "bfloat16"):
    for heads in ((6, 6, 6), (6, 2, 2), (2, 2, 6)):
      for decay in (None, "token", "channel"):
        sizes = blocks.Sizes(length, heads, size, size, dtype, decay)
        try:
          chosen = blocks.choose_blocks(sizes)
        except ValueError:
          assert size == 512, "head size 256 fits every chip"
          continue
        assert 6 % chosen.heads == 0 and chosen.chunk % 16 == 0
        assert sizes.heads == 6 or chosen.heads % 3 == 0
        assert chosen.tokens < 2 * length + max(chosen.chunk, 16)
        assert blocks.vmem_bytes(chosen, sizes) <= blocks.SMALLEST_VMEM
