"""A masked language model: an encoder that is asked which tokens were there."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.layers import LayerNorm, Linear


class MaskedLM(nnx.Module):
  """Encoder -> map and norm -> logits by the table of the tokens.

      h = norm(gelu(x W + b))        logits = h E^T + c

  Args:
    vocab_size: tokens of the vocabulary.
    encoder: factory `(vocab_size, *, rngs) -> Encoder`.
    norm_eps: of the norm.
    rngs: gives the initial parameters.
  Source: Devlin et al. 2018 (arXiv 1810.04805), section 3.1.
  """

  def __init__(
    self,
    vocab_size: int,
    *,
    encoder: Callable[..., nnx.Module],
    norm_eps: float = 1e-12,
    rngs: nnx.Rngs,
  ):
    self.encoder = encoder(vocab_size, rngs=rngs)
    dim = self.encoder.dim
    self.transform = Linear({"embed": dim}, {"mlp": dim}, bias=True, std=0.02, rngs=rngs)
    self.norm = LayerNorm(dim, axis="mlp", eps=norm_eps)
    self.output_bias = nnx.Param(jnp.zeros(vocab_size), axes=("vocab",), inputs=0)
    self.vocab_size = vocab_size

  def __call__(self, tokens: jax.Array, **options) -> jax.Array:
    """Logits [B, T, V] float32 of the tokens; arguments as of the encoder."""
    h = self.predictions(self.encoder(tokens, **options))
    table, dtype = self.output_table.astype(h.dtype), jnp.promote_types(h.dtype, jnp.float32)
    return jnp.einsum("btd,vd->btv", h, table, preferred_element_type=dtype)

  def predictions(self, features: jax.Array) -> jax.Array:
    """Features of tokens [..., D] -> [..., D + 1], whose products with the rows of `output_table`
    are their logits."""
    h = self.norm(jax.nn.gelu(self.transform(features), approximate=False))
    return jnp.concatenate([h, jnp.ones_like(h[..., :1])], -1)

  @property
  def output_table(self) -> jax.Array:
    """[V, D + 1]: the table of the tokens, and the bias of each."""
    return jnp.concatenate([self.encoder.embedding.table[...], self.output_bias[...][:, None]], 1)

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two, with the logits
    of all tokens."""
    head = self.transform.flops_per_token + 2 * (self.encoder.dim + 1) * self.vocab_size
    return self.encoder.flops(batch, length) + batch * length * head
