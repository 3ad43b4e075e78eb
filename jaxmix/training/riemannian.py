"""Optimising subspaces: a step along the Grassmann manifold for parameters that are bases of
subspaces, beside any optimizer for the others.

A parameter of the manifold "grassmann" has the orthonormal rows of a basis W [K, D] in its last two
axes. With the gradient D_t, the momentum B and the rate r, a step is

    B = momentum B + D_t                       kept in the space around the manifold
    G = B - (B W^T) W                          its part that turns the subspace
    W = cos(r S) W - sin(r S) / S G,           S = (G G^T)^(1/2)

which is the geodesic that leaves W along -G. All functions of S come from one eigen-decomposition
of G G^T [K, K], so nothing of width D is decomposed. Source: Wang et al. 2023 (arXiv 2308.01547).

What differs from the authors' code: it orthonormalises the basis every few steps by a QR, which
turns the signs of some rows under a momentum that keeps the old ones. Here every step ends with one
Newton-Schulz iteration, which costs little and moves a basis as little as can be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmix.training.optimizers import Schedule

Retraction = Literal["geodesic", "qr", "polar"]


class RiemannianState(NamedTuple):
  """count: steps done, int32; momentum: as the parameters, in the space around the manifold."""

  count: jax.Array
  momentum: optax.Updates


def with_subspaces(
  axes: dict,
  *,
  optimizer: Callable[[dict], optax.GradientTransformation],
  learning_rate: float | Schedule,
  momentum: float = 0.9,
  retraction: Retraction = "geodesic",
) -> optax.GradientTransformation:
  """Riemannian SGD for the parameters that are subspaces, another optimizer for all others.

  Subspaces do not decay, and their gradient is not clipped with that of the others.

  Args:
    axes: from `jaxmix.models.abstract_parameters`; says which parameters are subspaces.
    optimizer: of the others, such as `jaxmix.training.adamw` with its settings.
    learning_rate, momentum, retraction: of the subspaces, see `riemannian_sgd`; the paper uses
      rates of 0.1 to 0.3 at the peak, under the schedule of the others.
  """
  labels = jax.tree.map(lambda axis: axis.manifold or "flat", axes)
  # The others' optimizer sees the whole tree of axes, though no subspace ever reaches it.
  flat = jax.tree.map(lambda axis: dataclasses.replace(axis, manifold=None), axes)
  return optax.partition(
    {
      "flat": optimizer(flat),
      "grassmann": riemannian_sgd(learning_rate, momentum=momentum, retraction=retraction),
    },
    labels,
  )


def riemannian_sgd(
  learning_rate: float | Schedule, *, momentum: float = 0.9, retraction: Retraction = "geodesic"
) -> optax.GradientTransformation:
  """SGD with momentum on the Grassmann manifold; see the head of this file.

  Every parameter that it is given is a stack of bases [..., K, D] with orthonormal rows; steps are
  computed in float32 at least.

  Args:
    learning_rate: a number, or a schedule of the step.
    momentum: of the gradients, 0 for none.
    retraction: how a step comes back to the manifold: "geodesic", the shortest path; "qr" and
      "polar" orthonormalise W - r G by that factorisation: one subspace in two bases, within
      O(r^3) of the geodesic's.
  """
  if retraction not in _RETRACTIONS:
    raise ValueError(
      f"riemannian_sgd: retraction={retraction!r} is unknown — expected one of "
      f"{', '.join(_RETRACTIONS)}"
    )
  retract = _RETRACTIONS[retraction]

  def init(params):
    return RiemannianState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params):
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    buffer = jax.tree.map(lambda b, d: momentum * b + d, state.momentum, grads)

    def step(basis, direction):
      dtype = jnp.promote_types(basis.dtype, jnp.float32)
      wide, direction = basis.astype(dtype), direction.astype(dtype)
      after = retract(wide, _horizontal(wide, direction), -rate)
      return (_orthonormal(after) - wide).astype(basis.dtype)

    updates = jax.tree.map(step, params, buffer)
    return updates, RiemannianState(state.count + 1, buffer)

  return optax.GradientTransformation(init, update)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
  # Full precision: on a TPU a float32 product is otherwise rounded to bfloat16, which would leave
  # the manifold by a hundredth at every step.
  return jnp.matmul(x, y, precision="highest")


def _transposed(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _horizontal(basis: jax.Array, direction: jax.Array) -> jax.Array:
  """The part of a direction that is orthogonal to the subspace: [..., K, D]."""
  return direction - _product(_product(direction, _transposed(basis)), basis)


def _orthonormal(basis: jax.Array) -> jax.Array:
  """The nearest orthonormal basis of the same subspace, to second order in what is amiss."""
  eye = jnp.eye(basis.shape[-2], dtype=basis.dtype)
  return _product(1.5 * eye - 0.5 * _product(basis, _transposed(basis)), basis)


def _geodesic(basis: jax.Array, tangent: jax.Array, rate: jax.Array) -> jax.Array:
  squares, vectors = jnp.linalg.eigh(_product(tangent, _transposed(tangent)))
  angles = rate * jnp.sqrt(jnp.maximum(squares, 0))
  # sin(rate s) / s without a division by a small s.
  turned = _rebuilt(rate * jnp.sinc(angles / jnp.pi), vectors)
  return _product(_rebuilt(jnp.cos(angles), vectors), basis) + _product(turned, tangent)


def _polar(basis: jax.Array, tangent: jax.Array, rate: jax.Array) -> jax.Array:
  squares, vectors = jnp.linalg.eigh(_product(tangent, _transposed(tangent)))
  shrink = jax.lax.rsqrt(1 + rate**2 * jnp.maximum(squares, 0))
  return _product(_rebuilt(shrink, vectors), basis + rate * tangent)


def _qr(basis: jax.Array, tangent: jax.Array, rate: jax.Array) -> jax.Array:
  # The rows of basis + rate tangent have the Gram matrix I + rate^2 G G^T. Its Cholesky factor is
  # that of the QR with a positive diagonal, so no row turns its sign.
  eye = jnp.eye(basis.shape[-2], dtype=basis.dtype)
  factor = jnp.linalg.cholesky(eye + rate**2 * _product(tangent, _transposed(tangent)))
  moved = basis + rate * tangent
  return jax.lax.linalg.triangular_solve(factor, moved, left_side=True, lower=True)


def _rebuilt(values: jax.Array, vectors: jax.Array) -> jax.Array:
  """V diag(values) V^T."""
  return _product(vectors * values[..., None, :], _transposed(vectors))


_RETRACTIONS = {"geodesic": _geodesic, "polar": _polar, "qr": _qr}
