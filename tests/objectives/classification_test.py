"""The loss of a classifier against plain float64 numpy, and what it reports beside it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.objectives import binary_figures, classification_loss


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_loss_weight_and_right_ones(close, rounding, dtype):
  random = np.random.default_rng(0)
  logits = np.asarray(jnp.asarray(3 * random.normal(size=(8, 5)), dtype), np.float64)
  label = random.integers(0, 5, 8)
  label[:3] = logits[:3].argmax(-1)
  weights = np.array([1, 1, 0, 1, 1, 1, 0, 0.5])
  seen = {}

  def model(*, premise, hypothesis, dropout_key=None):
    seen.update(premise=premise, hypothesis=hypothesis, dropout_key=dropout_key)
    return jnp.asarray(logits, dtype)

  batch = {
    "premise": jnp.zeros((8, 3), jnp.int32),
    "hypothesis": jnp.ones((8, 3), jnp.int32),
    "label": jnp.asarray(label, jnp.int32),
    "weights": jnp.asarray(weights, jnp.float32),
  }
  key = jax.random.key(0)
  loss, weight, further = classification_loss(model, batch, key)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  # Sums over 5 classes and 8 examples, and the functions between them.
  tolerance = rounding(np.float32, 5 + 8 + 10)
  close(loss, -np.sum(weights * log_p[np.arange(8), label]), tolerance=tolerance)
  close(weight, weights.sum(), tolerance=0)
  right = np.sum(weights * (logits.argmax(-1) == label))
  assert list(further) == ["accuracy"] and right >= 2
  close(further["accuracy"], right, tolerance=0)
  assert loss.dtype == weight.dtype == further["accuracy"].dtype == jnp.float32
  assert seen["dropout_key"] is key
  assert seen["premise"] is batch["premise"] and seen["hypothesis"] is batch["hypothesis"]


def test_binary_figures_are_those_of_the_counts():
  """Of 10 examples: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives."""
  found = binary_figures(positive=0.5, predicted=0.4, true_positive=0.3)
  assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
  matthews = (3 * 4 - 1 * 2) / np.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
  assert found["matthews"] == pytest.approx(matthews)
  assert binary_figures(0.5, 0.0, 0.0) == {"f1": 0.0, "matthews": 0.0}
  assert binary_figures(0.0, 0.0, 0.0) == {"f1": 0.0, "matthews": 0.0}
