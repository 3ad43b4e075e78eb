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
- Filters may be sums of decaying waves instead, Massaroli et al. 2023 (arXiv 2310.18780): a stream
  then holds one number a wave. `MonarchMixer.distilled` makes them from a trained network's.
- The basis of the convolutions may be learnt, from section 4 of the paper; no published model does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmix import ops
from jaxmix.layers import ImplicitFilter, LayerNorm, Linear, ModalFilter, ShortConvolution

VISIBILITIES = ("causal", "full")
BASES = ("powers", "monarch")


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
    modes: waves of each filter, see `jaxmix.layers.ModalFilter`; None makes filters by a network.
    basis: "powers", in which products of polynomials are convolutions; or "monarch", one for each
      convolution that is learnt, see `jaxmix.ops.causal_monarch`: powers at first, so that training
      starts from the convolution. A token of a stream then costs O(max_length D), streams end at
      max_length, and rows of documents take the weights of all pairs of tokens.
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
    modes: int | None = None,
    basis: str = "powers",
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    for name, value, known in (
      ("visibility", visibility, VISIBILITIES),
      ("basis", basis, BASES),
    ):
      if value not in known:
        raise ValueError(
          f"MonarchMixer: {name}={value!r} is unknown; expected one of {', '.join(known)}"
        )
    if order < 2:
      raise ValueError(f"MonarchMixer: order={order}, expected at least 2, one gated convolution")
    if modes is not None and visibility != "causal":
      raise ValueError(
        f"MonarchMixer: modes={modes} and visibility={visibility!r}, but waves decay forward only; "
        'use visibility="causal", or modes=None'
      )
    if basis == "monarch" and (visibility != "causal" or modes is not None):
      raise ValueError(
        f'MonarchMixer: basis="monarch" with visibility={visibility!r} and modes={modes}, but it '
        'is of causal convolutions with filters made by a network; use visibility="causal" and '
        'modes=None, or basis="powers"'
      )
    streams = {"streams": order + 1, "mlp": dim}
    self.norm = LayerNorm(dim) if norm else None
    self.into = Linear({"embed": dim}, streams, bias=True, rngs=rngs)
    self.convolution = ShortConvolution(
      streams, width=convolution, activation=None, bias=True, rngs=rngs
    )

    def filters(shape):
      if modes is not None:
        return _ModalFilters(shape, modes=modes, max_length=max_length, rngs=rngs)
      return (_Filters if basis == "powers" else _BasisFilters)(
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
    self.order, self.max_length, self.implementation = order, max_length, implementation
    self.visibility, self.basis = visibility, basis

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
    filters = {f"gated_{index}": self.gated for index in range(self.order - 1)}
    filters |= {} if self.residual is None else {"residual": self.residual}
    wide = jnp.promote_types(dtype, jnp.float32)
    return {
      "convolution": self.convolution.init_state(batch_size, dtype),
      **{name: each.init_state(batch_size, wide) for name, each in filters.items()},
    }

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two, with
    long convolutions by transforms and filters once a call."""
    tokens = self.into.flops_per_token + self.convolution.flops_per_token + self.out.flops_per_token
    filters = [self.gated] if self.residual is None else [self.gated, self.residual]
    return batch * length * tokens + sum(each.flops(batch, length) for each in filters)

  def distilled(self, modes: int) -> tuple[MonarchMixer, dict[str, ops.FilterErrors]]:
    """This mixer with filters of so many modes, fitted to its own, of which a token of a stream
    costs O(modes D), and the errors of "gated" filters and "residual" ones.

    Raises:
      ValueError: it sees later tokens, has a learnt basis or modes already, or too few lags for so
        many.
    """
    if self.visibility == "full" or type(self.gated) is not _Filters:
      raise ValueError(
        f"MonarchMixer: distilled with visibility={self.visibility!r}, basis={self.basis!r} and "
        f"modes={getattr(self.gated, 'modes', None)} — expected causal convolutions with filters "
        "made by a network — distil another mixer"
      )
    result, errors = nnx.merge(*nnx.split(self)), {}
    for name in ("gated",) if self.residual is None else ("gated", "residual"):
      fitted, errors[name] = _ModalFilters.fitted(getattr(self, name), modes)
      setattr(result, name, fitted)
    return result, errors


def _skip(shape, rngs: nnx.Rngs) -> nnx.Param:
  """Weights of the token itself."""
  values = jax.random.normal(rngs.params(), tuple(shape.values()))
  return nnx.Param(values, axes=tuple(shape), inputs=0)


class _Filters(ImplicitFilter):
  """Filters of several long convolutions [filters, D], with the weights of the token itself."""

  def __init__(self, shape, *, rngs: nnx.Rngs, **options):
    super().__init__(shape, rngs=rngs, **options)
    self.skip = _skip(shape, rngs)

  def convolve(self, index: int, u, **options):
    """See `jaxmix.ops.long_convolution`."""
    reverse = self.kernel(index, 1).first(u.shape[1]) if len(self.networks) == 2 else None
    skip = self.skip[...][index]
    return ops.long_convolution(u, self.kernel(index), reverse_kernel=reverse, skip=skip, **options)

  def kernel(self, index: int, direction: int = 0) -> ops.LazyKernel:
    """The filters of one convolution and direction."""
    count, channels = self.skip.shape

    def first(lags: int):
      return self(lags)[direction].reshape(count, channels, lags)[index]

    return ops.LazyKernel((channels, self.max_length), first)

  def init_state(self, batch: int, dtype):
    """That of one of the convolutions."""
    return ops.convolution_state(batch, self.max_length, self.skip.shape[-1], dtype)

  def flops(self, batch: int, length: int) -> int:
    """Of the filters and of the convolutions with them."""
    transforms = self.channels * (2 * batch + len(self.networks))
    return super().flops(length) + transforms * ops.transform_flops(length)


class _BasisFilters(_Filters):
  """The same with a learnt basis for each convolution, one for all channels."""

  def __init__(self, shape, *, max_length: int, rngs: nnx.Rngs, **options):
    super().__init__(shape, max_length=max_length, rngs=rngs, **options)
    count, base = next(iter(shape.values())), ops.monarch_base(max_length)
    low = jnp.broadcast_to(jnp.eye(base), (count, base, base))
    high = jnp.broadcast_to(jnp.eye(base // 2), (count, base, base // 2, base // 2))
    self.low = nnx.Param(low, axes=("filters", "digit", "power"), inputs=0)
    self.high = nnx.Param(high, axes=("filters", "digit", "high_digit", "high_power"), inputs=0)

  def convolve(self, index: int, u, **options):
    """See `jaxmix.ops.causal_monarch`."""
    basis, skip = (self.low[...][index], self.high[...][index]), self.skip[...][index]
    return ops.causal_monarch(u, self.kernel(index), *basis, skip=skip, **options)

  def init_state(self, batch: int, dtype):
    """That of one of the convolutions."""
    return ops.causal_monarch_state(batch, self.low.shape[-1], self.skip.shape[-1], dtype)

  def flops(self, batch: int, length: int) -> int:
    """With those of the rows and of the filters in the basis."""
    basis = self.channels * (batch + 1) * ops.basis_flops(length, self.low.shape[-1])
    return super().flops(batch, length) + basis


class _ModalFilters(ModalFilter):
  """The same of decaying waves."""

  def __init__(self, shape, *, rngs: nnx.Rngs, **options):
    super().__init__(shape, rngs=rngs, **options)
    self.skip = _skip(shape, rngs)

  @classmethod
  def fitted(cls, filters: _Filters, modes: int) -> tuple[_ModalFilters, ops.FilterErrors]:
    """Filters of so many modes that come near to given ones, and how near."""
    exact = np.asarray(filters()[0], np.float64)
    axes = filters.skip.get_metadata()["axes"][-2:]  # a model puts "layers" before them
    shape = dict(zip(axes, filters.skip.shape, strict=True))
    length = filters.max_length
    result = jax.eval_shape(
      lambda: cls(shape, modes=modes, max_length=length, rngs=nnx.Rngs(params=0))
    )
    result.set_modes(*ops.fit_modes(exact, modes))
    result.skip.set_value(filters.skip[...])
    found = ops.modal_filters(*result(), length)
    return result, ops.FilterErrors.of(np.asarray(found, np.float64), exact)

  def convolve(self, index: int, u, **options):
    """See `jaxmix.ops.modal_convolution`."""
    count, channels = self.skip.shape
    modes = (x.reshape(count, channels, -1)[index] for x in self())
    return ops.modal_convolution(u, *modes, skip=self.skip[...][index], **options)

  def init_state(self, batch: int, dtype):
    """That of one of the convolutions."""
    return ops.modal_state(batch, self.skip.shape[-1], self.modes, dtype)

  def flops(self, batch: int, length: int) -> int:
    """Of the filters, complex, and of the convolutions with them."""
    transforms = self.channels * (2 * batch + 1)
    filters = 8 * self.channels * self.modes * length
    return filters + transforms * ops.transform_flops(length)
