"""The sequence mixer of Monarch Mixer: gated long convolutions, whose transforms are Monarch
matrices.

    x1, x2, v = convolution(u W_in + b_in)        g = x1 * v
    o = x2 * (k * g + d g)  (+ k' * u + d' u)     y = o W_out + b_out

with filters k that a small network makes from the lag (`jaxmix.layers.ImplicitFilter`). Fu et al.
2023 (arXiv 2310.12109), section 4. Causal and without the sum in brackets it is the Hyena operator
of order 2, Poli et al. 2023 (arXiv 2302.10866); greater orders repeat gate and convolution.

- The short convolution looks back only, also where the long ones look to both sides.
- Filters of later tokens begin with the next token; the token itself has d.
- A row longer than the filters is refused: what they would be there is not known.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import ImplicitFilter, LayerNorm, Linear, ShortConvolution

VISIBILITIES = ("causal", "full")


class MonarchMixer(nnx.Module):
  """Gated long convolutions.

  Args:
    dim: model width D.
    max_length: the longest row, and how far back a token of a stream sees.
    visibility: "causal", or "full", with filters to both sides, which leaves no state.
    order: one more than the number of gated convolutions in a row.
    residual: a long convolution of the input besides, added behind the last gate; it stands for
      the residual connection in models that have none around the mixer.
    norm: a LayerNorm of the input.
    convolution: width of the short convolution.
    features, hidden, sines, frequency, slope: of the filters, see `jaxmix.layers.ImplicitFilter`.
    implementation: see `jaxmix.ops.long_convolution`.
  Raises:
    ValueError: an option is unknown, or a row is longer than the filters.
  """

  def __init__(
    self,
    dim: int,
    *,
    max_length: int = 2048,
    visibility: str = "causal",
    order: int = 2,
    residual: bool = False,
    norm: bool = False,
    convolution: int = 3,
    features: int = 5,
    hidden: int = 128,
    sines: int = 3,
    frequency: float = 10.0,
    slope: float = 1.0,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    if visibility not in VISIBILITIES:
      raise ValueError(
        f"MonarchMixer: visibility={visibility!r} is unknown; expected one of "
        f"{', '.join(VISIBILITIES)}"
      )
    if order < 2:
      raise ValueError(f"MonarchMixer: order={order}, expected at least 2, one gated convolution")
    streams = {"streams": order + 1, "mlp": dim}
    self.norm = LayerNorm(dim) if norm else None
    self.into = Linear({"embed": dim}, streams, bias=True, rngs=rngs)
    self.convolution = ShortConvolution(
      streams, width=convolution, activation=None, bias=True, rngs=rngs
    )

    def filters(shape):
      return _Filters(
        shape,
        directions=1 + (visibility == "full"),
        max_length=max_length,
        features=features,
        hidden=hidden,
        sines=sines,
        frequency=frequency,
        slope=slope,
        rngs=rngs,
      )

    self.gated = filters({"filters": order - 1, "mlp": dim})
    self.residual = filters({"filters": 1, "embed": dim}) if residual else None
    self.out = Linear({"mlp": dim}, {"embed": dim}, bias=True, rngs=rngs)
    self.order, self.max_length, self.visibility = order, max_length, visibility
    self.implementation = implementation

  def __call__(self, x: jax.Array, *, state=None, segment_ids=None, positions=None):
    """Mixes along the length.

    Args:
      x: [B, T, D].   state: from `init_state` or an earlier call; None means the start of a
        document.
      segment_ids: [B, T] int32, 0 is padding.   positions: unused; lags count tokens.
    Returns:
      y: [B, T, D], 0 at padding, and the state; None with visibility="full".
    """
    if x.shape[1] > self.max_length:
      raise ValueError(
        f"MonarchMixer: a row of {x.shape[1]} tokens and filters of max_length={self.max_length}; "
        "make rows shorter, or the model with a greater max_length"
      )
    x = x if self.norm is None else self.norm(x)
    before = {} if state is None else state
    after = {}
    (*gates, v), after["convolution"] = self.convolution.each(
      self.into.each(x), state=before.get("convolution"), segment_ids=segment_ids
    )
    options = {"segment_ids": segment_ids, "implementation": self.implementation}
    for index in range(self.order - 1):
      name = f"gated_{index}"
      v, after[name] = self.gated.convolve(
        index,
        v,
        pre_gate=gates[index],
        post_gate=gates[-1] if index == self.order - 2 else None,
        state=before.get(name),
        **options,
      )
    if self.residual is not None:
      more, after["residual"] = self.residual.convolve(
        0, x, state=before.get("residual"), **options
      )
      v = v + more
    y = self.out(v)
    if segment_ids is not None:
      y = jnp.where((segment_ids != 0)[..., None], y, 0)
    return y, after if self.visibility == "causal" else None

  def init_state(self, batch_size: int, *, dtype=jnp.float32) -> dict:
    """The state before the first token; inputs of the long convolutions are float32 whatever
    `dtype`, the dtype of x."""
    if self.visibility == "full":
      raise ValueError(
        'MonarchMixer: visibility="full" cannot stream, since every token sees later ones; use '
        'visibility="causal"'
      )
    names = [f"gated_{index}" for index in range(self.order - 1)]
    names += [] if self.residual is None else ["residual"]
    wide = jnp.promote_types(dtype, jnp.float32)
    dim = self.out.kernel.shape[-1]
    return {
      "convolution": self.convolution.init_state(batch_size, dtype),
      **{name: ops.convolution_state(batch_size, self.max_length, dim, wide) for name in names},
    }

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two, with
    long convolutions by transforms and filters once a call."""
    tokens = self.into.flops_per_token + self.convolution.flops_per_token + self.out.flops_per_token
    filters = [self.gated] if self.residual is None else [self.gated, self.residual]
    return batch * length * tokens + sum(each.flops(batch, length) for each in filters)


class _Filters(ImplicitFilter):
  """Filters of several long convolutions [filters, D], with the weights of the token itself."""

  def __init__(self, shape, *, rngs: nnx.Rngs, **options):
    super().__init__(shape, rngs=rngs, **options)
    skip = jax.random.normal(rngs.params(), tuple(shape.values()))
    self.skip = nnx.Param(skip, axes=tuple(shape), inputs=0)

  def convolve(self, index: int, u, **options):
    """See `jaxmix.ops.long_convolution`."""
    count, channels = self.skip.shape

    def first(lags: int, direction: int = 0):
      return self(lags)[direction].reshape(count, channels, lags)[index]

    return ops.long_convolution(
      u,
      ops.LazyKernel((channels, self.max_length), first),
      reverse_kernel=first(u.shape[1], 1) if len(self.networks) == 2 else None,
      skip=self.skip[...][index],
      **options,
    )

  def flops(self, batch: int, length: int) -> int:
    """Of the filters and of the convolutions with them."""
    transforms = self.channels * (2 * batch + len(self.networks))
    return super().flops(length) + transforms * ops.transform_flops(length)
