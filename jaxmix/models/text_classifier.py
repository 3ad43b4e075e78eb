"""Classes, and vectors, of texts by the features of an encoder."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.layers import LinearHead, dropout

POOLINGS = ("mean", "first")


class TextClassifier(nnx.Module):
  """Encoder -> one vector a text -> logits.

  Args:
    vocab_size: tokens of the vocabulary.   classes: C.
    encoder: factory `(vocab_size, *, rngs) -> Encoder`.
    pooling: how features of tokens become one vector: their "mean", padding left out, or that of
      the "first" token.
    head: factory `(dim, classes, *, rngs) -> head`.
    dropout_rate: of the vector.
    rngs: gives the initial parameters.
  Raises:
    ValueError: the pooling is unknown.
  """

  def __init__(
    self,
    vocab_size: int,
    classes: int,
    *,
    encoder: Callable[..., nnx.Module],
    pooling: str = "mean",
    head: Callable[..., nnx.Module] = LinearHead,
    dropout_rate: float = 0.0,
    rngs: nnx.Rngs,
  ):
    if pooling not in POOLINGS:
      raise ValueError(
        f"TextClassifier: pooling={pooling!r} is unknown; expected one of {', '.join(POOLINGS)}"
      )
    self.encoder = encoder(vocab_size, rngs=rngs)
    self.head = head(self.encoder.dim, classes, rngs=rngs)
    self.pooling, self.dropout_rate = pooling, dropout_rate

  def __call__(self, *, tokens, token_types=None, segment_ids=None, dropout_key=None) -> jax.Array:
    """Logits of the classes.

    Args:
      tokens: [B, T] int32, a text a row.   token_types: [B, T] int32, see `Encoder`.
      segment_ids: [B, T] int32, 1 at the text and 0 at padding; None means no padding.
      dropout_key: a PRNG key; None means no dropout.
    Returns:
      [B, C] float32.
    """
    encoder_key = head_key = None
    if dropout_key is not None:
      encoder_key, head_key = jax.random.split(dropout_key)
    x = self.embed(
      tokens, token_types=token_types, segment_ids=segment_ids, dropout_key=encoder_key
    )
    return self.head(dropout(x, self.dropout_rate, head_key))

  def embed(self, tokens, *, token_types=None, segment_ids=None, dropout_key=None) -> jax.Array:
    """The vector of each text, [B, D], whatever padding follows it; arguments as of the call."""
    x = self.encoder(
      tokens, token_types=token_types, segment_ids=segment_ids, dropout_key=dropout_key
    )
    if self.pooling == "first":
      return x[:, 0]
    if segment_ids is None:
      return jnp.mean(x, axis=1)
    live = (segment_ids != 0).astype(jnp.promote_types(x.dtype, jnp.float32))
    total = jnp.einsum("bt,btd->bd", live, x, precision="highest")
    return (total / jnp.maximum(live.sum(1, keepdims=True), 1)).astype(x.dtype)

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two."""
    return self.encoder.flops(batch, length) + batch * self.head.flops_per_feature
