"""Higher-order linear attention: the key of linear attention is itself the result of one.

    u = LA(q, k, k),  o = LA(q, u, v)        (second order; the others in `jaxmix.ops.higher_order`)

Zhang et al. 2025 (arXiv 2510.27258). The authors publish no layer: the norm of q and k, the decays,
the norm of each head and the gate of the output are those of gated linear attention, which keep
weights of fourth degree and sums over the length in scale.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import (
  GatedOutput,
  HeadMixer,
  Linear,
  head_channels,
  l2_norm,
  log_sigmoid_decay,
)
from jaxmix.ops.higher_order import ORDERS

DECAYS = ("none", "constant", "token")


class HLA(HeadMixer):
  """Multi-head higher-order linear attention.

  Args:
    dim: model width D.
    heads: number of heads.
    key_dim, value_dim: channels of a head; None means D / heads.
    order: "second", "asymmetric" or "third".
    decay: of the inner and of the outer memories, one a head: "none"; "constant", as in RetNet; or
      "token", gates of the token as in SimpleGLA.
    normalize: divide by the sum of weights; q and k then pass elu + 1 before their norm.
    temperature: divides the logarithm of the gates.
    convolution: width of short convolutions of q, k and v; None means none.
    implementation: see `jaxmix.ops.linear_attention`.
  Raises:
    ValueError: sizes do not divide, or a name is unknown.
  """

  def __init__(
    self,
    dim: int,
    *,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    order: str = "second",
    decay: str = "token",
    normalize: bool = False,
    temperature: float = 16.0,
    convolution: int | None = None,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    for name, value, known in (("order", order, ORDERS), ("decay", decay, DECAYS)):
      if value not in known:
        raise ValueError(f"HLA: {name}={value!r} is unknown; expected one of {', '.join(known)}")
    key_dim = head_channels("HLA", key_dim, dim, heads, argument="key_dim")
    value_dim = head_channels("HLA", value_dim, dim, heads, argument="value_dim")
    super().__init__(
      dim,
      heads=(heads, heads, heads),
      key_dim=key_dim,
      value_dim=value_dim,
      convolution=convolution,
      implementation=implementation,
      rngs=rngs,
    )
    self.gates = (
      Linear({"embed": dim}, {"memory": 2, "heads": heads}, rngs=rngs) if decay == "token" else None
    )
    self.output = GatedOutput(dim, heads, value_dim, rngs=rngs)
    self.order, self.decay, self.normalize = order, decay, normalize
    self.temperature = temperature

  def mix(self, x, q, k, v, **options):
    """See `HeadMixer.mix`."""
    g = g_inner = None
    if self.decay == "token":
      g = log_sigmoid_decay(self.gates(x), temperature=self.temperature)
      g, g_inner = g[:, :, 0], g[:, :, 1]
    if self.decay == "constant":
      heads = jnp.arange(k.shape[2], dtype=jnp.promote_types(k.dtype, jnp.float32))
      g = g_inner = jnp.log1p(-jnp.exp2(-5 - heads))
    if self.normalize:
      q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
    return ops.higher_order_linear_attention(
      l2_norm(q),
      l2_norm(k),
      v,
      order=self.order,
      g=g,
      g_inner=g_inner,
      normalize=self.normalize,
      **options,
    )

  def init_memory(self, batch_size: int, dtype) -> dict[str, jax.Array]:
    """See `HeadMixer.init_memory`."""
    heads, key_dim, value_dim = self.memory_shape
    values = (heads, key_dim, value_dim + self.normalize)
    shapes = {"outer": values}
    if self.order != "asymmetric":
      shapes["covariance"] = (heads, key_dim, key_dim)
    if self.order != "second":
      shapes["values"] = values
    return {name: jnp.zeros((batch_size, *shape), dtype) for name, shape in shapes.items()}

  @property
  def mix_flops(self) -> int:
    """Each memory is written and read once."""
    memories = jax.eval_shape(lambda: self.init_memory(1, jnp.float32))
    return 4 * sum(memory.size for memory in memories.values())
