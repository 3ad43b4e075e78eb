"""A stack of residual blocks over any pattern of mixers: what every model has in its middle.

The layers of one period of the pattern are one pytree; the periods are stacked along a leading axis
and scanned, so that compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.layers import MLPS, NORMS, Block
from jaxmix.mixers import MIXERS
from jaxmix.sharding import constrain

# name -> what the backward pass finds saved of each period; everything else is computed again
REMAT_POLICIES: dict[str, Callable | None] = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nnx.Module):
  """The base of models: their blocks, and how these are applied.

  Args:
    dim: model width D.   depth: number of layers, a multiple of the pattern's length.
    pattern: names of mixers, repeated over the depth, such as ("linear_attention",
      "linear_attention", "attention").
    mixers: name -> factory `(dim, *, rngs) -> mixer` for the names in the pattern; None takes
      `jaxmix.mixers.MIXERS` with their defaults. Give `{"local": partial(Attention, window=128)}`
      to configure one.
    mlp: a name in `jaxmix.layers.MLPS`, or "none", where a layer is its mixer alone.
    mlp_dim: hidden width of the MLP; None means 4 D, or 8 D / 3 rounded up to 64 when "gated".
    activation: of the MLP; None means "silu" when "gated", else "gelu".
    norm: "rms" or "layer".   norm_eps: of the norms; None leaves them their own.
    placement: see `jaxmix.layers.Block`.
    bias: biases in the MLPs (mixers have their own setting).
    dropout_rate: of each branch.
    remat: what is saved for the backward pass: "none" (all is), "dots" (results of weight matmuls),
      "full" (only the inputs of each period).
    dtype: of the activations, "float32" or "bfloat16"; parameters are float32.
    init_std: standard deviation of every linear map at first; None leaves each its own,
      1 / sqrt(inputs).
    rngs: gives the initial parameters.
  Raises:
    ValueError: a name is unknown, or depth does not hold whole patterns.
  """

  def __init__(
    self,
    dim: int,
    depth: int,
    *,
    pattern: Sequence[str],
    mixers: Mapping[str, Callable] | None,
    mlp: str,
    mlp_dim: int | None,
    activation: str | None,
    norm: str,
    placement: str,
    bias: bool,
    dropout_rate: float,
    remat: str,
    dtype: str,
    init_std: float | None,
    norm_eps: float | None = None,
    rngs: nnx.Rngs,
  ):
    mixers = MIXERS if mixers is None else mixers
    kind = type(self).__name__
    for name, value, known in (
      *(("pattern", mixer, mixers) for mixer in pattern),
      ("mlp", mlp, (*MLPS, "none")),
      ("norm", norm, NORMS),
      ("remat", remat, REMAT_POLICIES),
      ("dtype", dtype, ("float32", "bfloat16")),
    ):
      if value not in known:
        raise ValueError(
          f"{kind}: {name} names {value!r}, which is unknown; expected one of {', '.join(known)}"
        )
    if not pattern or depth < 1 or depth % len(pattern):
      raise ValueError(
        f"{kind}: depth={depth} does not hold the pattern of {len(pattern)} mixers a whole "
        "number of times; change one of them"
      )
    if not 0 <= dropout_rate < 1:
      raise ValueError(f"{kind}: dropout_rate={dropout_rate}, expected at least 0 and below 1")
    mlp_dim = mlp_dim or (-(-8 * dim // 3 // 64) * 64 if mlp == "gated" else 4 * dim)
    activation = activation or ("silu" if mlp == "gated" else "gelu")
    pattern = _whole_cycles(tuple(pattern), depth, {name: mixers[name] for name in pattern}, dim)

    eps = {} if norm_eps is None else {"eps": norm_eps}

    def make_norm() -> nnx.Module:
      return NORMS[norm](dim, **eps)

    def make_mixer(index: int, first: jax.Array, rngs: nnx.Rngs) -> nnx.Module:
      name = pattern[index]
      mixer = mixers[name](dim, rngs=rngs)
      if hasattr(mixer, "place"):
        mixer.place(first + index, depth)
      if hasattr(mixer, "vary"):
        mixer.vary(pattern[:index].count(name))
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
            make_mixer(index, first, rngs),
            make_mlp(rngs),
            make_norm,
            placement=placement,
            dropout_rate=dropout_rate,
          )
          for index, name in enumerate(pattern)
        }
      )

    keys = jax.random.split(rngs.params(), depth // len(pattern))
    self.layers = jax.vmap(make_period)(keys, jnp.arange(0, depth, len(pattern)))
    for parameter in _parameters(self.layers):
      own = parameter.get_metadata().get("std")
      if init_std is not None and own is not None:
        parameter[...] = parameter[...] * (init_std / own)
      parameter.set_metadata(axes=("layers", *parameter.get_metadata()["axes"]))
    self.final_norm = None if placement in ("post_norm", "mlp_post_norm") else make_norm()
    self.dim, self.depth, self.pattern = dim, depth, pattern
    self.dropout_rate, self.remat, self.dtype = dropout_rate, remat, dtype

  def apply_layers(self, x, states, keys, *, segment_ids, positions):
    """[B, T, D] through all layers and the last norm.

    Args:
      states: of `init_layer_states` or an earlier call; None means none, which keeps the mixers on
        their path for whole rows.
      keys: [periods] PRNG keys of the dropout, or None.
      segment_ids, positions: [B, T] int32 or None, as the mixers take them.
    Returns:
      [B, T, D] and the states, the mixers' stacked over the periods.
    """

    def apply_period(x, blocks, states, key):
      after = {}
      for index, name in enumerate(self.block_names):
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
    x, states = self._scan_periods(apply_period, x, states, keys)
    return x if self.final_norm is None else self.final_norm(x), states

  def init_layer_states(self, batch_size: int) -> dict:
    """The mixers' states before the first token."""

    def stacked(block: Block):
      state = block.mixer.init_state(batch_size, dtype=jnp.dtype(self.dtype))
      return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.periods, *x.shape)), state)

    return {name: stacked(block) for name, block in self.layers.items()}

  def layer_flops(self, batch: int, length: int) -> int:
    """Floating-point operations of the layers forward, a multiply-add counted as two."""
    return self.periods * sum(block.flops(batch, length) for block in self.layers.values())

  @property
  def periods(self) -> int:
    """How often the pattern stands in the depth."""
    return self.depth // len(self.pattern)

  @property
  def block_names(self) -> list[str]:
    """The keys of `layers`, in the order in which they are applied."""
    return [f"{index}_{name}" for index, name in enumerate(self.pattern)]

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

    periods = (self.layers, jnp.arange(self.periods), keys)
    return jax.lax.scan(step, (x, states), periods)[0]


def _whole_cycles(pattern: tuple, depth: int, mixers: Mapping[str, Callable], dim: int) -> tuple:
  """The pattern, so often that layers which differ by their number (`vary`) repeat with it; the
  whole depth where that is never."""
  variants = {}
  for name, factory in mixers.items():
    mixer = jax.eval_shape(lambda factory=factory: factory(dim, rngs=nnx.Rngs(params=0)))
    variants[name] = getattr(mixer, "variants", 1)
  for times in range(1, depth // len(pattern) + 1):
    repeated = pattern * times
    whole = all(repeated.count(name) % count == 0 for name, count in variants.items())
    if depth % len(repeated) == 0 and whole:
      return repeated
  return pattern * (depth // len(pattern))


def _parameters(tree) -> list[nnx.Param]:
  return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Param))
