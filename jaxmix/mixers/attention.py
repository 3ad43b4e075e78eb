"""Softmax attention: the baseline that every other mixer is measured against.

    y = merge_heads(softmax(q k^T / sqrt(K) over the visible keys) v) W_o,      q, k, v = x W_q, x
    W_k, x W_v

Vaswani et al. 2017 (arXiv 1706.03762); rotary positions: Su et al. 2021 (arXiv 2104.09864); grouped
heads: Ainslie et al. 2023 (arXiv 2305.13245); sliding window: Beltagy et al. 2020 (arXiv
2004.05150).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import Linear, rotary

POSITION_ENCODINGS = ("rotary", "none")


class Attention(nnx.Module):
  """Multi-head softmax attention with a KV cache as its state.

  Args:
    dim: model width D.
    heads: query heads.   key_heads: heads of keys and values that they share; None means `heads`.
    head_dim: channels of a head; None means D / heads.
    position_encoding: "rotary" or "none".   rotary_base: slowest wavelength.
    window: newest tokens that a token sees, itself among them; None means all.
    visibility: "causal" or "full"; with "full" there is no state and no streaming.
    max_length: slots of the cache, the longest stream that can be continued; a window needs only as
      many as it sees.
    bias: biases on the four maps.
    implementation: see `jaxmix.ops.attention`.
  Raises:
    ValueError: dim, heads and key_heads do not divide, or a name is unknown.
  """

  def __init__(
    self,
    dim: int,
    *,
    heads: int = 8,
    key_heads: int | None = None,
    head_dim: int | None = None,
    position_encoding: str = "rotary",
    rotary_base: float = 10_000.0,
    window: int | None = None,
    visibility: str = "causal",
    max_length: int = 2048,
    bias: bool = False,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    key_heads = heads if key_heads is None else key_heads
    if head_dim is None:
      if dim % heads:
        raise ValueError(
          f"Attention: dim={dim} is not a multiple of heads={heads}; try "
          f"heads={math.gcd(dim, heads)} or set head_dim"
        )
      head_dim = dim // heads
    if heads % key_heads:
      raise ValueError(
        f"Attention: heads={heads} is not a multiple of key_heads={key_heads}; try "
        f"key_heads={math.gcd(heads, key_heads)}"
      )
    if position_encoding not in POSITION_ENCODINGS:
      raise ValueError(
        f"Attention: position_encoding={position_encoding!r} is unknown; expected one of "
        f"{', '.join(POSITION_ENCODINGS)}"
      )
    if position_encoding == "rotary" and head_dim % 2:
      raise ValueError(
        f"Attention: rotary positions turn pairs of channels, head_dim={head_dim} is odd; use an "
        "even head_dim"
      )
    self.q = Linear({"embed": dim}, {"heads": heads, "head": head_dim}, bias=bias, rngs=rngs)
    self.k = Linear({"embed": dim}, {"heads": key_heads, "head": head_dim}, bias=bias, rngs=rngs)
    self.v = Linear({"embed": dim}, {"heads": key_heads, "head": head_dim}, bias=bias, rngs=rngs)
    self.out = Linear({"heads": heads, "head": head_dim}, {"embed": dim}, bias=bias, rngs=rngs)
    self.heads, self.key_heads, self.head_dim = heads, key_heads, head_dim
    self.position_encoding, self.rotary_base = position_encoding, rotary_base
    self.window, self.visibility, self.max_length = window, visibility, max_length
    self.implementation = implementation

  def __call__(self, x: jax.Array, *, state=None, segment_ids=None, positions=None):
    """Mixes along the length.

    Args:
      x: [B, T, D].   state: from `init_state` or an earlier call; None means empty.
      segment_ids: [B, T] int32, 0 is padding.   positions: [B, T] int32; None counts from the start
        of each document.
    Returns:
      y: [B, T, D] and the state; the state is None when visibility is "full".
    """
    q, k, v = self.q(x), self.k(x), self.v(x)
    if self.position_encoding == "rotary":
      if positions is None:
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions = ops.document_positions(
          ids, jnp.zeros(x.shape[0], jnp.int32) if state is None else state["length"]
        )
      q, k = (rotary(z, positions, base=self.rotary_base) for z in (q, k))
    y, state = ops.attention(
      q,
      k,
      v,
      state=state,
      segment_ids=segment_ids,
      visibility=self.visibility,
      window=self.window,
      capacity=max(self._capacity, 0 if self.window else x.shape[1]),
      implementation=self.implementation,
    )
    return self.out(y), state

  @property
  def _capacity(self) -> int:
    return self.window or self.max_length

  def init_state(self, batch_size: int, *, dtype=jnp.float32) -> dict[str, jax.Array]:
    """An empty cache of keys and values in `dtype`, the dtype of x."""
    if self.visibility != "causal":
      raise ValueError(
        'Attention: visibility="full" cannot stream, since every token sees the later ones; use '
        'visibility="causal"'
      )
    shape = (self.key_heads, self.head_dim)
    return ops.attention_state(batch_size, self._capacity, shape, shape, dtype)

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two; each visible pair
    counted once."""
    span = min(self.window or length, length)
    pairs = length * length if self.visibility == "full" else span * length - span * (span - 1) // 2
    projections = sum(part.flops_per_token for part in (self.q, self.k, self.v, self.out))
    return batch * (length * projections + 4 * pairs * self.heads * self.head_dim)
