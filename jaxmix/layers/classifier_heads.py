"""What turns features into logits of classes: one vector a class, or one subspace a class.

The second is the Grassmann class representation (Wang et al. 2023, arXiv 2308.01547): class c is a
subspace with the orthonormal basis W_c [K, D] in its rows, and its logit is the length of the
projection of the direction of the feature,

    logit_c = scale |W_c x / |x||,    0 <= logit_c <= scale.

A basis stays orthonormal only under an optimizer that knows it, `jaxmix.training.with_subspaces`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import sharding
from jaxmix.layers.linear import Linear

_SMALLEST_NORM = 1e-12


class LinearHead(nnx.Module):
  """logits = x W + b, one vector a class.

  Args:
    dim: D, width of the features.   classes: C.
    rngs: gives the vectors.
  """

  def __init__(self, dim: int, classes: int, *, rngs: nnx.Rngs):
    self.linear = Linear({"embed": dim}, {"classes": classes}, bias=True, rngs=rngs)
    self.flops_per_feature = self.linear.flops_per_token

  def __call__(self, features: jax.Array) -> jax.Array:
    """[..., D] -> [..., C], in float32 whatever the dtype of the features."""
    return self.linear(_wide(features))


class SubspaceHead(nnx.Module):
  """logits = scale |W_c x / |x||, one subspace of `subspace_dim` dimensions a class.

  A feature of 0 has logits of 0 and passes no gradient on.

  Args:
    dim: D, width of the features.   classes: C.
    subspace_dim: K, of each subspace; the paper tries 1 to 32 and prefers 8.
    scale: the largest logit; 25 in all of the paper.
    rngs: gives the subspaces, each uniform among all of its dimension.
  Raises:
    ValueError: a subspace would be larger than the space.
  """

  def __init__(
    self, dim: int, classes: int, *, subspace_dim: int = 8, scale: float = 25.0, rngs: nnx.Rngs
  ):
    if not 1 <= subspace_dim <= dim:
      raise ValueError(
        f"SubspaceHead: subspace_dim={subspace_dim} in features of dim={dim} — expected from 1 to "
        f"{dim} — set subspace_dim={min(8, dim)}"
      )
    frames, _ = jnp.linalg.qr(jax.random.normal(rngs.params(), (classes, dim, subspace_dim)))
    self.basis = nnx.Param(
      jnp.swapaxes(frames, -1, -2), axes=("classes", "subspace", "embed"), manifold="grassmann"
    )
    self.scale = scale
    self.flops_per_feature = 2 * classes * subspace_dim * dim

  def __call__(self, features: jax.Array) -> jax.Array:
    """[..., D] -> [..., C], in float32 whatever the dtype of the features."""
    x = _wide(features)
    x = x / jnp.maximum(_length(x), _SMALLEST_NORM)[..., None]
    basis = sharding.gather(self.basis[...], ("classes", "subspace", "embed"), whole="embed")
    return self.scale * _length(jnp.einsum("...d,ckd->...ck", x, basis))


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _length(x: jax.Array) -> jax.Array:
  """Euclidean norm over the last axis, with the gradient 0 at 0, where the root has none."""
  squares = jnp.sum(x * x, axis=-1)
  positive = squares > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
