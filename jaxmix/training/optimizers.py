"""Optimizers and learning-rate schedules, all optax.

An optimizer here is a function of the parameters' axes: which parameters decay, and along which
axes a stacked weight is a matrix, is read from where each parameter was declared. So is which have
a learning rate of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import optax

from jaxmix.models import BATCHES, Axes

Schedule = Callable[[jax.Array], jax.Array]


def cosine(
  peak: float, *, steps: int, warmup_steps: int = 0, final_fraction: float = 0.1
) -> Schedule:
  """Linear warm-up to `peak`, then half a cosine down to `final_fraction * peak` at `steps`.

  Source: Loshchilov and Hutter 2017 (arXiv 1608.03983), one period.
  """
  _check_schedule("cosine", peak, steps, warmup_steps)
  return optax.warmup_cosine_decay_schedule(
    0.0 if warmup_steps else peak, peak, warmup_steps, steps, final_fraction * peak
  )


def warmup_stable_decay(
  peak: float,
  *,
  steps: int,
  warmup_steps: int = 0,
  decay_steps: int = 0,
  final_fraction: float = 0.0,
) -> Schedule:
  """Linear warm-up to `peak`, constant, then linear down to `final_fraction * peak` over the last
  `decay_steps` of `steps`.

  Source: Hu et al. 2024 (arXiv 2404.06395), section 4.
  """
  _check_schedule("warmup_stable_decay", peak, steps, warmup_steps + decay_steps)
  pieces = [
    optax.linear_schedule(0.0, peak, warmup_steps)
    if warmup_steps
    else optax.constant_schedule(peak),
    optax.constant_schedule(peak),
    optax.linear_schedule(peak, final_fraction * peak, decay_steps),
  ]
  return optax.join_schedules(pieces, [warmup_steps, steps - decay_steps])


def adamw(
  axes: dict,
  *,
  learning_rate: float | Schedule,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.1,
  clip_norm: float | None = 1.0,
  rate_factors: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
  """AdamW with global-norm clipping; matrices decay, norms and biases do not.

  Args:
    axes: from `jaxmix.models.abstract_parameters`.
    learning_rate: a number, or a schedule of the step.
    b1, b2, eps: of Adam.   weight_decay: times the learning rate.   clip_norm: of the whole
      gradient; None means no clipping.
    rate_factors: logical axis -> factor of the learning rate of the parameters that have it, such
      as {"hidden": 1.25, "lag": 0.01} for the networks of implicit filters and their table of lags.
  Raises:
    ValueError: no parameter has such an axis, or one is a point of a manifold.
  Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); defaults of Brown et al. 2020 (arXiv
    2005.14165), appendix B.
  """
  _check_flat("adamw", axes)
  decays = jax.tree.map(lambda axis: axis.is_matrix, axes)
  return optax.chain(
    _clip(clip_norm),
    optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decays),
    *([_scaled("adamw", axes, rate_factors)] if rate_factors else []),
  )


def muon(
  axes: dict,
  *,
  learning_rate: float | Schedule,
  momentum: float = 0.95,
  b1: float = 0.9,
  b2: float = 0.95,
  weight_decay: float = 0.1,
  clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
  """Muon on every linear map of the stack, AdamW on tables, norms and biases, under one learning
  rate.

  A weight is orthogonalised as the matrix (its input axes) x (its output axes), each layer of a
  stack apart, and its update has the size of AdamW's (0.2 sqrt(max(fan in, fan out)) times an
  orthogonal matrix).

  Args:
    axes: from `jaxmix.models.abstract_parameters`.
    learning_rate: a number, or a schedule of the step.
    momentum: of Muon.   b1, b2: of Adam, which optax gives Nesterov momentum here.
    weight_decay: of matrices, times the learning rate.   clip_norm: None means no clipping.
  Source: Jordan et al. 2024, Muon; Liu et al. 2025 (arXiv 2502.16982) for the scale.
  """
  _check_flat("muon", axes)
  decays = jax.tree.map(lambda axis: axis.is_matrix, axes)
  # optax's Muon decays all that it leaves to Adam, norms and biases too. So it gives the direction
  # alone (a rate of -1 keeps its sign), and decay and learning rate follow.
  direction = optax.contrib.muon(
    -1.0,
    beta=momentum,
    adam_b1=b1,
    adam_b2=b2,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=jax.tree.map(matrix_dimensions, axes),
  )
  return optax.chain(
    _clip(clip_norm),
    direction,
    optax.add_decayed_weights(weight_decay, decays),
    optax.scale_by_learning_rate(learning_rate),
  )


def without_frozen(
  optimizer: Callable[[dict], optax.GradientTransformation], axes: dict
) -> optax.GradientTransformation:
  """The optimizer of the parameters that are trained; frozen ones neither step nor decay, and have
  no moments.

  Args:
    optimizer: factory `(axes) -> optax.GradientTransformation`.
    axes: from `jaxmix.models.abstract_parameters`; says which are frozen.
  """
  labels = jax.tree.map(lambda axis: "frozen" if axis.frozen else "trained", axes)
  if "frozen" not in jax.tree.leaves(labels):
    return optimizer(axes)
  return optax.partition({"trained": optimizer(axes), "frozen": optax.set_to_zero()}, labels)


def matrix_dimensions(axes: Axes) -> optax.contrib.MuonDimensionNumbers | None:
  """Which array axes of a parameter are the rows and the columns of its matrix; None where it is
  not a linear map."""
  if not axes.inputs:
    return None
  first = sum(name in BATCHES for name in axes.names)
  split = first + axes.inputs
  return optax.contrib.MuonDimensionNumbers(
    tuple(range(first, split)), tuple(range(split, len(axes.names)))
  )


def _check_flat(name: str, axes: dict) -> None:
  for path, axis in jax.tree_util.tree_leaves_with_path(axes):
    if axis.manifold is not None:
      raise ValueError(
        f"{name}: the parameter {jax.tree_util.keystr(path)} is a point of the manifold "
        f"{axis.manifold!r}, which the steps of {name} leave — expected parameters without a "
        f"manifold — use with_subspaces, with {name} as its optimizer for the others"
      )


def _scaled(name: str, axes: dict, factors: Mapping[str, float]) -> optax.GradientTransformation:
  """Multiplies the step of each parameter by the factors of its axes."""
  known = {axis for each in jax.tree.leaves(axes) for axis in each.names}
  if unknown := sorted(factors.keys() - known):
    raise ValueError(
      f"{name}: rate_factors has the axis {unknown[0]!r}, which no parameter has — expected some "
      f"of {', '.join(sorted(known))} — leave it out, or use one of these"
    )
  scales = jax.tree.map(lambda each: math.prod(factors.get(axis, 1.0) for axis in each.names), axes)

  def scale(updates, _):
    # Frozen parameters have no step: their place holds a tree without leaves.
    return jax.tree.map(lambda by, step: jax.tree.map(lambda x: by * x, step), scales, updates)

  return optax.stateless(scale)


def _clip(norm: float | None) -> optax.GradientTransformation:
  return optax.identity() if norm is None else optax.clip_by_global_norm(norm)


def _check_schedule(name: str, peak: float, steps: int, ramps: int) -> None:
  if peak <= 0 or steps < 1 or ramps > steps:
    raise ValueError(
      f"{name}: peak={peak}, steps={steps}, {ramps} steps of ramps — peak must be above 0 and the "
      "ramps must fit into steps"
    )
