"""Learning rates of their own for parameters by their axes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxmix.mixers import MonarchMixer
from jaxmix.models import Axes, abstract_parameters
from jaxmix.training import adamw
from jaxmix.training.optimizers import without_frozen

OPTIONS = {"learning_rate": 0.1, "weight_decay": 0.5, "clip_norm": None}
FACTORS = {"hidden": 1.25, "lag": 0.0125}


def step(optimizer, parameters):
  """What the first step adds, gradients and parameters random."""
  random = np.random.default_rng(0)
  draw = lambda x: random.normal(size=x.shape).astype(np.float32)  # noqa: E731
  parameters, gradients = (jax.tree.map(draw, parameters) for _ in range(2))

  @jax.jit
  def run(parameters, gradients):
    return optimizer.update(gradients, optimizer.init(parameters), parameters)[0]

  return run(parameters, gradients)


def test_filters_have_rates_of_their_own(rounding):
  """The whole step, decay too, of the networks and of the tables of lags, in both long
  convolutions, and of nothing else in the mixer."""
  _, parameters, axes = abstract_parameters(functools.partial(MonarchMixer, 8, residual=True))
  plain, scaled = (
    step(adamw(axes, rate_factors=factors, **OPTIONS), parameters) for factors in (None, FACTORS)
  )
  expected = {"networks": 1.25, "frequency": 1.25, "positions": 0.0125}
  met = set()
  for (path, one), other in zip(
    jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(scaled), strict=True
  ):
    names = [str(entry.key) for entry in path]
    inside = names[0] in ("gated", "residual")
    factor = expected.get(names[1], 1.0) if inside else 1.0
    np.testing.assert_allclose(other, factor * one, rtol=rounding(np.float32, 4))
    met.add((names[0], factor))
  assert {(name, x) for name in ("gated", "residual") for x in (1.0, 1.25, 0.0125)} <= met
  assert ("into", 1.0) in met


def test_factors_of_several_axes_multiply_and_frozen_parameters_stay():
  axes = {
    "both": Axes(("lag", "hidden"), 1),
    "one": Axes(("lag", "embed"), 1),
    "frozen": Axes(("lag", "embed"), 1, frozen=True),
  }
  parameters = {name: np.zeros((2, 3)) for name in axes}
  plain, scaled = (
    step(
      without_frozen(functools.partial(adamw, rate_factors=factors, **OPTIONS), axes), parameters
    )
    for factors in (None, {"lag": 0.5, "hidden": 0.5})
  )
  for name, factor in (("both", 0.25), ("one", 0.5)):
    np.testing.assert_array_equal(scaled[name], factor * plain[name])
  assert not np.any(scaled["frozen"])


def test_a_factor_of_no_parameter_is_refused():
  axes = {"table": Axes(("vocab", "embed"), None)}
  with pytest.raises(ValueError, match=r"'hiden', which no parameter has — .* of embed, vocab"):
    adamw(axes, rate_factors={"hiden": 2.0}, **OPTIONS)
