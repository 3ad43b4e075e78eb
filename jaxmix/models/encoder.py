"""An encoder over any pattern of mixers: tokens to features, all tokens of a row at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.layers import NORMS, Embedding, dropout
from jaxmix.mixers import MIXERS, Attention
from jaxmix.models.stack import Stack
from jaxmix.ops import document_positions
from jaxmix.sharding import constrain

# What a pattern means where all of a row is there at once: attention sees the later tokens too.
WHOLE_ROW_MIXERS = {**MIXERS, "attention": functools.partial(Attention, visibility="full")}


class Encoder(Stack):
  """Token embedding, a stack of residual blocks and a norm; no logits and no state.

  Args:
    vocab_size: tokens of the vocabulary.
    mixers: as in `Stack`; None takes `jaxmix.mixers.MIXERS`, attention with visibility="full". A
      mixer that looks back only has its place too: a token's features then tell of what came
      before.
    learned_positions: vectors in a table of learned positions, added to the tokens; None means no
      table.   token_types: the same for types of tokens, such as those of two sentences.
    embedding_norm: a norm of the embedded tokens.
    dropout_rate: of the embedded tokens and of each branch.
    The rest: see `jaxmix.models.stack.Stack`.
  Raises:
    ValueError: a name is unknown, or depth does not hold whole patterns.
  """

  def __init__(
    self,
    vocab_size: int,
    dim: int,
    depth: int,
    *,
    pattern: Sequence[str] = ("attention",),
    mixers: Mapping[str, Callable] | None = None,
    mlp: str = "dense",
    mlp_dim: int | None = None,
    activation: str | None = None,
    norm: str = "layer",
    placement: str = "pre_norm",
    bias: bool = True,
    norm_eps: float | None = None,
    learned_positions: int | None = None,
    token_types: int | None = None,
    embedding_norm: bool = False,
    dropout_rate: float = 0.0,
    remat: str = "none",
    dtype: str = "float32",
    init_std: float | None = None,
    rngs: nnx.Rngs,
  ):
    self.embedding = Embedding(vocab_size, dim, rngs=rngs)
    self.position_embedding = (
      Embedding(learned_positions, dim, axis="position", rngs=rngs) if learned_positions else None
    )
    super().__init__(
      dim,
      depth,
      pattern=pattern,
      mixers=WHOLE_ROW_MIXERS if mixers is None else mixers,
      mlp=mlp,
      mlp_dim=mlp_dim,
      activation=activation,
      norm=norm,
      placement=placement,
      bias=bias,
      dropout_rate=dropout_rate,
      remat=remat,
      dtype=dtype,
      init_std=init_std,
      norm_eps=norm_eps,
      rngs=rngs,
    )
    self.type_embedding = (
      Embedding(token_types, dim, axis="position", rngs=rngs) if token_types else None
    )
    eps = {} if norm_eps is None else {"eps": norm_eps}
    self.embedding_norm = NORMS[norm](dim, **eps) if embedding_norm else None
    self.vocab_size, self.learned_positions = vocab_size, learned_positions

  def __call__(
    self, tokens: jax.Array, *, token_types=None, segment_ids=None, positions=None, dropout_key=None
  ) -> jax.Array:
    """Features of the tokens.

    Args:
      tokens: [B, T] int32.   token_types: [B, T] int32; None means that all are of type 0.
      segment_ids: [B, T] int32, 0 is padding; None means that each row is one document.
      positions: [B, T] int32; None counts them in each document.
      dropout_key: a PRNG key; None means no dropout.
    Returns:
      [B, T, D] in `dtype`, 0 at padding.
    Raises:
      ValueError: a row is longer than the table of learned positions.
    """
    if self.learned_positions is not None and tokens.shape[1] > self.learned_positions:
      raise ValueError(
        f"Encoder: rows of {tokens.shape[1]} tokens, learned_positions={self.learned_positions} — "
        f"expected rows of at most that many — set Encoder.learned_positions={tokens.shape[1]}, or "
        "give shorter rows"
      )
    if positions is None:
      ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
      positions = document_positions(ids, jnp.zeros(tokens.shape[0], jnp.int32))
    embedding_key, layer_keys = None, None
    if dropout_key is not None:
      embedding_key, stack_key = jax.random.split(dropout_key)
      layer_keys = jax.random.split(stack_key, self.periods)

    x = self.embedding(tokens, jnp.dtype(self.dtype))
    if self.position_embedding is not None:
      x = x + self.position_embedding(positions, x.dtype)
    if self.type_embedding is not None:
      types = jnp.zeros_like(tokens) if token_types is None else token_types
      x = x + self.type_embedding(types, x.dtype)
    x = x if self.embedding_norm is None else self.embedding_norm(x)
    x = dropout(x, self.dropout_rate, embedding_key)
    x = constrain(x, "batch", "length", None)
    x, _ = self.apply_layers(x, None, layer_keys, segment_ids=segment_ids, positions=positions)
    return x if segment_ids is None else jnp.where((segment_ids != 0)[..., None], x, 0)

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two."""
    return self.layer_flops(batch, length)
