"""The frame of mixers with a matrix state: projections to heads, an op, a gated output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers.heads import HeadProjection
from jaxmix.layers.rotary import rotary


def head_channels(
  mixer: str, channels: int | None, width: float, heads: int, *, argument: str
) -> int:
  """Channels of a head: those given, or width / heads.

  Args:
    mixer: its name, for messages.   channels: as given; None means width / heads.
    width: channels of all heads.   argument: what sets `channels`.
  Raises:
    ValueError: width is not a multiple of heads.
  """
  if channels is not None:
    return channels
  if width % heads:
    raise ValueError(
      f"{mixer}: {width:g} channels are not a multiple of heads={heads}; change heads or set "
      f"{argument}"
    )
  return int(width) // heads


class HeadMixer(nnx.Module):
  """q, k, v = projections of x; o = op(q, k, v); y = output(x, o).

  A mixer derives from it, sets `output`, and says in `mix` which op it is.

  Args:
    dim: model width D.
    heads: of q, k and v; two numbers at most, one a multiple of the other.
    key_dim, value_dim: channels of a head.
    convolution: width of the short convolutions behind the projections; None means none.
    convolution_bias: biases in them.
    rotary_base: slowest wavelength of rotary positions on q and k; None means no positions.
    implementation: see `jaxmix.ops`.
    rngs: gives the initial parameters.
  """

  def __init__(
    self,
    dim: int,
    *,
    heads: tuple[int, int, int],
    key_dim: int,
    value_dim: int,
    convolution: int | None = None,
    convolution_bias: bool = False,
    rotary_base: float | None = None,
    implementation: str | None,
    rngs: nnx.Rngs,
  ):
    channels = {"q": (key_dim, "key"), "k": (key_dim, "key"), "v": (value_dim, "value")}
    self.q, self.k, self.v = (
      HeadProjection(
        dim, count, size, axis=axis, convolution=convolution, bias=convolution_bias, rngs=rngs
      )
      for count, (size, axis) in zip(heads, channels.values(), strict=True)
    )
    self.memory_shape = (max(heads[1:]), key_dim, value_dim)
    self.readers = max(heads)  # heads that read the memories of as many heads or fewer
    self.rotary_base, self.implementation = rotary_base, implementation

  def mix(self, x, q, k, v, **options):
    """o and the memory after the last token.

    Args:
      x: [B, T, D].   q, k, v: [B, T, heads, K or V].
      options: state (the memory, or None), segment_ids, implementation.
    """
    raise NotImplementedError

  def init_memory(self, batch_size: int, dtype):
    """The memory before the first token; `dtype` is float32, or float64 where x is."""
    return jnp.zeros((batch_size, *self.memory_shape), dtype)

  @property
  def mix_flops(self) -> int:
    """Floating-point operations of a token in `mix`: memories are written and read, in the
    recurrence, not in chunks."""
    heads, key_dim, value_dim = self.memory_shape
    return 2 * (heads + self.readers) * key_dim * value_dim

  def __call__(self, x: jax.Array, *, state=None, segment_ids=None, positions=None):
    """Mixes along the length.

    Args:
      x: [B, T, D].   state: from `init_state` or an earlier call; None means the beginning.
      segment_ids: [B, T] int32, 0 is padding.   positions: [B, T] int32, read where the mixer has
        rotary positions; None counts from the start of each document.
    Returns:
      y: [B, T, D] and the state: "memory"; "q", "k", "v" of the convolutions; "length", the
      position of the next token.
    """
    before, after, rows = state or {}, {}, []
    for name in ("q", "k", "v"):
      row, carried = getattr(self, name)(x, state=before.get(name), segment_ids=segment_ids)
      rows.append(row)
      if carried is not None:
        after[name] = carried
    if self.rotary_base is not None:
      nothing = jnp.zeros(x.shape[0], jnp.int32)
      length = before.get("length", nothing)
      ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
      counted = ops.document_positions(ids, length)
      after["length"] = ops.last_token(ids, counted + 1, length)
      positions = counted if positions is None else positions
      rows[:2] = (rotary(row, positions, base=self.rotary_base) for row in rows[:2])
    o, after["memory"] = self.mix(
      x,
      *rows,
      state=before.get("memory"),
      segment_ids=segment_ids,
      implementation=self.implementation,
    )
    return self.output(x, o), after

  def init_state(self, batch_size: int, *, dtype=jnp.float32) -> dict:
    """The state before the first token; the memory is float32 whatever `dtype`, the dtype of x."""
    memory = self.init_memory(batch_size, jnp.promote_types(dtype, jnp.float32))
    rest = {name: getattr(self, name).init_state(batch_size, dtype) for name in ("q", "k", "v")}
    if self.rotary_base is not None:
      rest["length"] = jnp.zeros(batch_size, jnp.int32)
    return {"memory": memory} | {name: x for name, x in rest.items() if x is not None}

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two: the recurrence,
    not the chunks."""
    maps = (part for part in vars(self).values() if hasattr(part, "flops_per_token"))
    return batch * length * (sum(part.flops_per_token for part in maps) + self.mix_flops)
