"""A causal language model over any pattern of mixers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.layers import Embedding, dropout
from jaxmix.models.stack import Stack
from jaxmix.ops import document_positions, last_token
from jaxmix.sharding import constrain


class Decoder(Stack):
  """Token embedding, a stack of residual blocks, a norm, and logits.

  Args:
    vocab_size: tokens of the vocabulary.
    tied_embeddings: the logits read the table of the token embedding.
    learned_positions: vectors in a table of learned positions, added to the tokens; None means no
      table.
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
    mlp: str = "gated",
    mlp_dim: int | None = None,
    activation: str | None = None,
    norm: str = "rms",
    placement: str = "pre_norm",
    bias: bool = False,
    tied_embeddings: bool = True,
    learned_positions: int | None = None,
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
      mixers=mixers,
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
      rngs=rngs,
    )
    self.output = None if tied_embeddings else Embedding(vocab_size, dim, rngs=rngs)
    self.vocab_size = vocab_size

  def __call__(self, tokens: jax.Array, *, state=None, segment_ids=None, positions=None):
    """Logits of the next token.

    Args:
      tokens: [B, T] int32.   state: from `init_state` or an earlier call; None means the start of a
        document.
      segment_ids: [B, T] int32, 0 is padding; None means that each row is one document, that of
        the state.   positions: [B, T] int32; None counts them.
    Returns:
      logits [B, T, vocab_size] float32 and the state.
    """
    x, state = self.features(tokens, state=state, segment_ids=segment_ids, positions=positions)
    return self.logits(x), state

  def features(
    self, tokens: jax.Array, *, state=None, segment_ids=None, positions=None, dropout_key=None
  ):
    """What the logits are read from: [B, T] -> [B, T, D] in `dtype`, and the state.

    Args:
      dropout_key: a PRNG key; None means no dropout.
      The rest: see `__call__`.
    """
    # A missing state stays None for the mixers, which keeps them on their path for whole rows.
    layer_states, last_id, first = self._resume(state, segment_ids, tokens.shape[0])
    ids = segment_ids
    if ids is None:
      ids = jnp.broadcast_to(jnp.where(last_id == 0, 1, last_id)[:, None], tokens.shape)
    counted = document_positions(ids, first)
    positions = counted if positions is None else positions
    embedding_key, layer_keys = None, None
    if dropout_key is not None:
      embedding_key, *layer_keys = jax.random.split(dropout_key, 1 + self.periods)
      layer_keys = jnp.stack(layer_keys)

    x = self.embedding(tokens, jnp.dtype(self.dtype))
    if self.position_embedding is not None:
      x = x + self.position_embedding(positions, x.dtype)
    x = dropout(x, self.dropout_rate, embedding_key)
    x = constrain(x, "batch", "length", None)

    x, layer_states = self.apply_layers(
      x, layer_states, layer_keys, segment_ids=segment_ids, positions=positions
    )
    state = {
      "layers": layer_states,
      "segment_id": last_token(ids, ids, last_id),
      "position": last_token(ids, counted + 1, first),
    }
    return x, state

  @property
  def output_table(self) -> jax.Array:
    """[vocab_size, D] float32: row i dot a feature vector is the logit of token i."""
    return (self.embedding if self.output is None else self.output).table[...]

  def logits(self, features: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, vocab_size] float32."""
    return jnp.einsum(
      "btd,vd->btv",
      features,
      self.output_table.astype(features.dtype),
      preferred_element_type=jnp.float32,
    )

  def init_state(self, batch_size: int) -> dict:
    """The state before the first token: the mixers' and the document and position reached."""

    return {
      "layers": self.init_layer_states(batch_size),
      "segment_id": jnp.zeros(batch_size, jnp.int32),
      "position": jnp.zeros(batch_size, jnp.int32),
    }

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass with logits, a multiply-add counted as two."""
    logits = 2 * batch * length * self.dim * self.vocab_size
    return self.layer_flops(batch, length) + logits

  def _resume(self, state: dict | None, ids: jax.Array | None, batch: int):
    """States of the layers, the document they belong to and the position it has reached.

    Where a call begins with another document than the last one ended with, a row starts afresh.
    """
    nothing = jnp.zeros(batch, jnp.int32)
    if state is None:
      return None, nothing, nothing
    last_id = state["segment_id"]
    if ids is None:  # nothing to clear, which would read and write the whole state
      return state["layers"], last_id, state["position"]
    first_id = last_token(ids[:, ::-1], ids[:, ::-1], nothing)
    leaves = (first_id != 0) & (last_id != 0) & (first_id != last_id)

    def clear(now, empty):  # [periods, B, ...]
      return jnp.where(leaves.reshape(1, batch, *(1,) * (now.ndim - 2)), empty, now)

    layers = jax.tree.map(clear, state["layers"], self.init_state(batch)["layers"])
    return layers, last_id, jnp.where(leaves, 0, state["position"])
