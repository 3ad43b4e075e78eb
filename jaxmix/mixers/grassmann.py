"""Grassmann mixing: tokens paired with a few earlier ones, as the planes that their states span.

    z_t = W_r x_t + b_r        g_t = mean over offsets d of W_p p^(z_t, z_{t-d}) + b_p
    a_t = sigmoid(W_g [x_t; g_t] + b_g)        y_t = a_t x_t + (1 - a_t) g_t

with the normalised Plücker coordinates p^ of `jaxmix.ops.grassmann_mix`. Zhang 2025 (arXiv
2512.19428), section 3. The author published no code. What differs from the text, and what the text
leaves open:

- Partners stand at t - d. At t + d, as the text has it, a token would read its own target.
- Offsets across the depth, one a layer, are the default: in the text they are a set in the
  equations and a list over the layers in the experiments. The mean over a set does not know which
  partner stood where.
- Norms of the coordinates are kept from 0 relative to the vectors (`normalization="safe"`).
- Where a token has no partner, g is 0.
- p^ is scaled to entries of size 1. With its norm of 1 the steps of Adam and Muon, whose size does
  not depend on that of the gradient, would change g by sqrt(pairs) less than other maps' outputs.
- The sizes of the author's models need one more D x D map a layer, `output_projection`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import LayerNorm, LearnedOffsets, Linear

SCHEDULE = (1, 2, 4, 8, 12, 16)  # of the paper's six layers
GATES = ("blend", "product", "none")
UNPAIRED = ("zero", "bias")


class Grassmann(nnx.Module):
  """Causal Grassmann mixing with a few reduced states as its state.

  Args:
    dim: model width D.
    rank: channels R of the reduced states.
    heads: groups of rank / heads channels, each with planes of its own.
    schedule: one offset a layer, or a sequence with one a head: of the layers of a model that take
      this mixer, number l takes schedule[l mod len(schedule)]. A mixer by itself is number 0.
    offsets: all offsets of every layer, in place of a schedule; None means the schedule. Offsets
      below 0 point to later tokens, which leaves no state and no streaming.
    learned_reach: offsets are learnt, between 1 and this many tokens back, and begin where the
      schedule or `offsets` has them; None leaves them where they are. They may be fractions: a
      partner is interpolated, see `jaxmix.ops.offset_taps`.
    window: of the interpolation, "triangle", or "gauss" whose width is learnt with it.
    gate: "blend", as above; "product": y = a g; "none": y = g. The last two want a residual.
    norm: a LayerNorm of y.
    output_projection: a map D x D with bias behind it.
    affine: a channel of each group that is constant, the root of their number and so as large as
      all of them: with it the coordinates hold the partner itself, beside its products with the
      token's channels.
    scale: multiplies the coordinates p^; None means the root of their number in a head, as above;
      1 as published.
    unpaired: what g is where a token has no partner, "zero" or the "bias".
    normalization, eps: see `jaxmix.ops.grassmann_mix`.
    implementation: see `jaxmix.ops.grassmann_mix`.
  Raises:
    ValueError: sizes do not divide, or a name is unknown.
  """

  def __init__(
    self,
    dim: int,
    *,
    rank: int = 32,
    heads: int = 1,
    schedule: Sequence[int | Sequence[int]] = SCHEDULE,
    offsets: Sequence[int] | None = None,
    learned_reach: int | None = None,
    window: str = "triangle",
    gate: str = "blend",
    norm: bool = False,
    output_projection: bool = False,
    affine: bool = False,
    scale: float | None = None,
    unpaired: str = "zero",
    normalization: str = "safe",
    eps: float = 1e-8,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    if rank % heads:
      raise ValueError(
        f"Grassmann: rank={rank} is not a multiple of heads={heads}; try "
        f"heads={math.gcd(rank, heads)}"
      )
    for name, value, known in (("gate", gate, GATES), ("unpaired", unpaired, UNPAIRED)):
      if value not in known:
        raise ValueError(
          f"Grassmann: {name}={value!r} is unknown; expected one of {', '.join(known)}"
        )
    if not schedule:
      raise ValueError("Grassmann: schedule is empty, expected at least one offset, such as (1,)")
    self.schedule = tuple(schedule) if offsets is None else None
    self.offsets = _of_layer(schedule[0]) if offsets is None else tuple(offsets)
    self.heads, self.head_rank = heads, rank // heads + affine
    pairs = heads * math.comb(self.head_rank, 2)
    self.reduce = Linear(
      {"embed": dim}, {"rank_heads": heads, "rank": rank // heads}, bias=True, rngs=rngs
    )
    self.expand = Linear({"pairs": pairs}, {"embed": dim}, bias=True, rngs=rngs)
    self.scale = math.comb(self.head_rank, 2) ** 0.5 if scale is None else scale
    gated = gate != "none"
    self.gate_x = Linear({"embed": dim}, {"mlp": dim}, bias=True, rngs=rngs) if gated else None
    self.gate_g = Linear({"embed": dim}, {"mlp": dim}, rngs=rngs) if gated else None
    self.norm = LayerNorm(dim) if norm else None
    self.out = (
      Linear({"mlp": dim}, {"embed": dim}, bias=True, rngs=rngs) if output_projection else None
    )
    if learned_reach is not None and any(isinstance(d, Sequence) for d in self.offsets):
      raise ValueError(
        f"Grassmann: learned_reach={learned_reach} with one offset a head, expected the same for "
        "all heads; set learned_reach=None, or one number a layer in the schedule"
      )
    self.learned = (
      None
      if learned_reach is None
      else LearnedOffsets(self.offsets, reach=learned_reach, window=window)
    )
    self.gate, self.affine, self.unpaired = gate, affine, unpaired
    self.normalization, self.eps, self.implementation = normalization, eps, implementation

  @property
  def variants(self) -> int:
    """After so many layers the offsets come again."""
    return 1 if self.schedule is None else len(self.schedule)

  def vary(self, number: int) -> None:
    """Makes this the mixer of layer `number` of those that take it; called once."""
    if self.schedule is not None:
      self.offsets = _of_layer(self.schedule[number % len(self.schedule)])
    if self.learned is not None:
      self.learned.begin_at(self.offsets)

  def __call__(self, x: jax.Array, *, state=None, segment_ids=None, positions=None):
    """Mixes along the length.

    Args:
      x: [B, T, D].   state: from `init_state` or an earlier call; None means the start of a
        document.
      segment_ids: [B, T] int32, 0 is padding.   positions: unused; offsets count tokens.
    Returns:
      y: [B, T, D], 0 at padding, and the state; None where an offset is below 0.
    """
    z = self.reduce(x, dtype=jnp.promote_types(x.dtype, jnp.float32))
    if self.affine:
      z = jnp.concatenate([z, jnp.full_like(z[..., :1], z.shape[-1] ** 0.5)], -1)
    bias = self.expand.bias[...]
    g, state = self._mix(
      z,
      (self.scale * self.expand.weight(z.dtype)).astype(x.dtype),
      bias if self.unpaired == "zero" else jnp.zeros_like(bias),
      state=state,
      segment_ids=segment_ids,
      eps=self.eps,
      normalization=self.normalization,
    )
    if self.unpaired == "bias":
      g = g + bias.astype(g.dtype)
    y = self._gated(x, g)
    y = y if self.norm is None else self.norm(y)
    y = y if self.out is None else self.out(y)
    if segment_ids is not None:
      y = jnp.where((segment_ids != 0)[..., None], y, 0)
    return y, state

  def _mix(self, *arrays, **options):
    if self.learned is not None:
      return ops.fractional_grassmann_mix(*arrays, self.learned(), **options)
    return ops.grassmann_mix(
      *arrays, offsets=self.offsets, implementation=self.implementation, **options
    )

  def _gated(self, x, g):
    if self.gate == "none":
      return g
    alpha = jax.nn.sigmoid(self.gate_x(x) + self.gate_g(g))
    return alpha * g if self.gate == "product" else g + alpha * (x - g)

  def init_state(self, batch_size: int, *, dtype=jnp.float32) -> dict[str, jax.Array]:
    """The state before the first token; the reduced states are float32 whatever `dtype`, the dtype
    of x."""
    offsets = ops.offsets_of_groups(self.offsets, self.heads)
    if min(map(min, offsets)) < 0:
      raise ValueError(
        f"Grassmann: offsets={self.offsets} cannot stream, since tokens see later ones; use "
        "offsets above 0"
      )
    wide = jnp.promote_types(dtype, jnp.float32)
    reach = offsets if self.learned is None else (self.learned.reach,)
    return ops.grassmann_state(batch_size, reach, (self.heads, self.head_rank), wide)

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two; of the op, a
    coordinate is two products and a difference, whatever the number of offsets."""
    maps = (part for part in vars(self).values() if isinstance(part, Linear))
    coordinates = 3 * self.heads * math.comb(self.head_rank, 2)
    return batch * length * (sum(part.flops_per_token for part in maps) + coordinates)


def _of_layer(entry: int | Sequence[int]) -> tuple:
  """The offsets of a layer by its entry in the schedule: one for all heads, or one for each."""
  return tuple((offset,) for offset in entry) if isinstance(entry, Sequence) else (entry,)
