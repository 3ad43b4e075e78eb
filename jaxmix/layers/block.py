"""A residual block: a token mixer and a channel mixer, each with its norm."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

PLACEMENTS = ("pre_norm", "post_norm", "gated_post_norm", "mlp_post_norm")


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); no key, no
  dropout."""
  if key is None or rate == 0:
    return x
  return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class Block(nnx.Module):
  """One layer of a model.

      pre_norm:   x = x + mixer(norm(x));   x = x + mlp(norm(x))       (Xiong et al. 2020, arXiv
        2002.04745)
      post_norm:  x = norm(x + mixer(x));   x = norm(x + mlp(x))       (Vaswani et al. 2017, arXiv
        1706.03762)
      gated_post_norm:  x = norm(mixer(x));   x = norm(x + mlp(x))     (Zhang 2025, arXiv
        2512.19428: only a gate inside the mixer leads past it)
      mlp_post_norm:  x = mixer(x);   x = norm(x + mlp(x))             (Fu et al. 2023, arXiv
        2310.12109: only a long convolution inside the mixer leads past it)

  Args:
    mixer: a mixer (jaxmix.mixers).   mlp: a channel mixer [B, T, D] -> [B, T, D], or None: the
      mixer's branch is then the whole layer.
    norm: makes a norm; called once a branch.
    placement: one of these names.
    dropout_rate: of each branch before it joins the residual stream, where it joins one.
  """

  def __init__(
    self,
    mixer: nnx.Module,
    mlp: nnx.Module | None,
    norm: Callable[[], nnx.Module],
    *,
    placement: str,
    dropout_rate: float,
  ):
    if placement not in PLACEMENTS:
      raise ValueError(
        f"placement={placement!r} is unknown; expected one of {', '.join(PLACEMENTS)}"
      )
    self.mixer, self.mlp = mixer, mlp
    self.mixer_norm = None if placement == "mlp_post_norm" else norm()
    self.mlp_norm = None if mlp is None else norm()
    self.placement = placement
    self.dropout_rate = dropout_rate

  def __call__(self, x, *, state=None, segment_ids=None, positions=None, dropout_key=None):
    """[B, T, D] -> [B, T, D] and the mixer's state; dropout only where a key is given."""
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    pre = self.placement == "pre_norm"
    y, state = self.mixer(
      self.mixer_norm(x) if pre else x, state=state, segment_ids=segment_ids, positions=positions
    )
    if self.placement == "mlp_post_norm":
      x = y
    elif self.placement == "gated_post_norm":
      x = dropout(self.mixer_norm(y), self.dropout_rate, keys[0])
    else:
      x = x + dropout(y, self.dropout_rate, keys[0])
      x = x if pre else self.mixer_norm(x)
    if self.mlp is None:
      return x, state
    y = self.mlp(self.mlp_norm(x) if pre else x)
    x = x + dropout(y, self.dropout_rate, keys[1])
    return (x if pre else self.mlp_norm(x)), state

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two."""
    branches = (self.mixer,) if self.mlp is None else (self.mixer, self.mlp)
    return sum(branch.flops(batch, length) for branch in branches)
