"""A causal language model over any pattern of mixers.

The layers of one period of the pattern are one pytree; the periods are stacked along a leading axis
and scanned, so that compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.layers import MLPS, NORMS, Block, Embedding, dropout
from jaxmix.mixers import MIXERS
from jaxmix.ops import document_positions, last_token
from jaxmix.sharding import constrain

# name -> what the backward pass finds saved of each period; everything else is computed again
REMAT_POLICIES: dict[str, Callable | None] = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Decoder(nnx.Module):
  """Token embedding, a stack of residual blocks, a norm, and logits.

  Args:
    vocab_size: tokens of the vocabulary.   dim: model width D.   depth: number of layers, a
      multiple of the pattern's length.
    pattern: names of mixers, repeated over the depth, such as ("linear_attention",
      "linear_attention", "attention").
    mixers: name -> factory `(dim, *, rngs) -> mixer` for the names in the pattern; None takes
      `jaxmix.mixers.MIXERS` with their defaults. Give `{"local": partial(Attention, window=128)}`
      to configure one.
    mlp: "gated", "dense", or "none", where a layer is its mixer alone.
    mlp_dim: hidden width of the MLP; None means 4 D, or 8 D / 3 rounded up to 64 when gated.
    activation: of the MLP; None means "silu" when gated and "gelu" when dense.
    norm: "rms" or "layer".   placement: "pre_norm" or "post_norm".
    bias: biases in the MLPs (mixers have their own setting).
    tied_embeddings: the logits read the table of the token embedding.
    learned_positions: vectors in a table of learned positions, added to the tokens; None means no
      table.
    dropout_rate: of the embedded tokens and of each branch.
    remat: what is saved for the backward pass: "none" (all is), "dots" (results of weight matmuls),
      "full" (only the inputs of each period).
    dtype: of the activations, "float32" or "bfloat16"; parameters are float32.
    rngs: gives the initial parameters.
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
    rngs: nnx.Rngs,
  ):
    mixers = MIXERS if mixers is None else mixers
    for name, value, known in (
      *(("pattern", mixer, mixers) for mixer in pattern),
      ("mlp", mlp, (*MLPS, "none")),
      ("norm", norm, NORMS),
      ("remat", remat, REMAT_POLICIES),
      ("dtype", dtype, ("float32", "bfloat16")),
    ):
      if value not in known:
        raise ValueError(
          f"Decoder: {name} names {value!r}, which is unknown; expected one of {', '.join(known)}"
        )
    if not pattern or depth < 1 or depth % len(pattern):
      raise ValueError(
        f"Decoder: depth={depth} does not hold the pattern of {len(pattern)} mixers a whole "
        "number of times; change one of them"
      )
    if not 0 <= dropout_rate < 1:
      raise ValueError(f"Decoder: dropout_rate={dropout_rate}, expected at least 0 and below 1")
    mlp_dim = mlp_dim or (-(-8 * dim // 3 // 64) * 64 if mlp == "gated" else 4 * dim)
    activation = activation or ("silu" if mlp == "gated" else "gelu")

    def make_mixer(name: str, layer: jax.Array, rngs: nnx.Rngs) -> nnx.Module:
      mixer = mixers[name](dim, rngs=rngs)
      if hasattr(mixer, "place"):
        mixer.place(layer, depth)
      return mixer

    def make_mlp(rngs: nnx.Rngs) -> nnx.Module | None:
      if mlp == "none":
        return None
      return MLPS[mlp](dim, mlp_dim, activation=activation, bias=bias, rngs=rngs)

    def make_period(key: jax.Array, first: jax.Array) -> nnx.Dict:
      rngs = nnx.Rngs(params=key)
      return nnx.Dict(
        {
          f"{index}_{name}": Block(
            make_mixer(name, first + index, rngs),
            make_mlp(rngs),
            lambda: NORMS[norm](dim),
            placement=placement,
            dropout_rate=dropout_rate,
          )
          for index, name in enumerate(pattern)
        }
      )

    self.embedding = Embedding(vocab_size, dim, rngs=rngs)
    self.position_embedding = (
      Embedding(learned_positions, dim, axis="position", rngs=rngs) if learned_positions else None
    )
    keys = jax.random.split(rngs.params(), depth // len(pattern))
    self.layers = jax.vmap(make_period)(keys, jnp.arange(0, depth, len(pattern)))
    for parameter in jax.tree.leaves(self.layers, is_leaf=lambda x: isinstance(x, nnx.Param)):
      parameter.set_metadata(axes=("layers", *parameter.get_metadata()["axes"]))
    self.final_norm = NORMS[norm](dim) if placement == "pre_norm" else None
    self.output = None if tied_embeddings else Embedding(vocab_size, dim, rngs=rngs)
    self.vocab_size, self.dim, self.depth, self.pattern = vocab_size, dim, depth, tuple(pattern)
    self.dropout_rate, self.remat, self.dtype = dropout_rate, remat, dtype

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
      embedding_key, *layer_keys = jax.random.split(dropout_key, 1 + self._periods)
      layer_keys = jnp.stack(layer_keys)

    x = self.embedding(tokens, jnp.dtype(self.dtype))
    if self.position_embedding is not None:
      x = x + self.position_embedding(positions, x.dtype)
    x = dropout(x, self.dropout_rate, embedding_key)
    x = constrain(x, "batch", "length", None)

    def apply_period(x, blocks, states, key):
      after = {}
      for index, name in enumerate(self._block_names):
        x, after[name] = blocks[name](
          x,
          state=None if states is None else states[name],
          segment_ids=segment_ids,
          positions=positions,
          dropout_key=None if key is None else jax.random.fold_in(key, index),
        )
        x = constrain(x, "batch", "length", None)
      return x, after

    if self.remat != "none":
      policy = REMAT_POLICIES[self.remat]
      apply_period = jax.checkpoint(apply_period, policy=policy, prevent_cse=False)
    x, layer_states = self._scan_periods(apply_period, x, layer_states, layer_keys)
    state = {
      "layers": layer_states,
      "segment_id": last_token(ids, ids, last_id),
      "position": last_token(ids, counted + 1, first),
    }
    return x if self.final_norm is None else self.final_norm(x), state

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

    def stacked(block: Block):
      state = block.mixer.init_state(batch_size, dtype=jnp.dtype(self.dtype))
      return jax.tree.map(lambda x: jnp.broadcast_to(x, (self._periods, *x.shape)), state)

    return {
      "layers": {name: stacked(block) for name, block in self.layers.items()},
      "segment_id": jnp.zeros(batch_size, jnp.int32),
      "position": jnp.zeros(batch_size, jnp.int32),
    }

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass with logits, a multiply-add counted as two."""
    period = sum(block.flops(batch, length) for block in self.layers.values())
    return self._periods * period + 2 * batch * length * self.dim * self.vocab_size

  def _scan_periods(self, apply_period, x, states, keys):
    """Applies the periods one after the other; states stacked over the periods, or None."""
    if states is None:
      return jax.lax.scan(lambda x, at: apply_period(x, at[0], None, at[1]), x, (self.layers, keys))

    # States that go on are carried, not scanned over: a period then updates its part in place,
    # where a scan would copy every cache for every token.
    def step(carry, at):
      x, states = carry
      blocks, index, key = at
      now = jax.tree.map(lambda z: jax.lax.dynamic_index_in_dim(z, index, keepdims=False), states)
      x, after = apply_period(x, blocks, now, key)
      states = jax.tree.map(
        lambda z, new: jax.lax.dynamic_update_index_in_dim(z, new.astype(z.dtype), index, 0),
        states,
        after,
      )
      return (x, states), None

    periods = (self.layers, jnp.arange(self._periods), keys)
    return jax.lax.scan(step, (x, states), periods)[0]

  @property
  def _periods(self) -> int:
    return self.depth // len(self.pattern)

  @property
  def _block_names(self) -> list[str]:
    return [f"{index}_{name}" for index, name in enumerate(self.pattern)]

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
