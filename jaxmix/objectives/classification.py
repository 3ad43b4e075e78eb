"""Classification: the cross-entropy of one label an example, and how many are right."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def classification_loss(
  model, batch: dict[str, jax.Array], dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Summed cross-entropy of a batch, the weight it was summed over, and the number of right ones.

  Args:
    model: `(*, dropout_key, **inputs) -> logits [B, classes]`; the inputs are what the batch holds
      beside label and weights, by name, such as image, or premise and hypothesis.
    batch: inputs [B, ...], label [B] int32, weights [B] float32.
    dropout_key: None means no dropout.
  Returns:
    Sum over examples in nats, the sum of the weights, and {"accuracy": the sum of the weights of
    examples whose label has the largest logit}; of two classes also those of examples whose label
    is 1 ("positive"), that are taken for it ("predicted"), and both ("true_positive"); float32
    scalars.
  """
  inputs = {name: x for name, x in batch.items() if name not in ("label", "weights")}
  logits = model(**inputs, dropout_key=dropout_key)
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  label, weights = batch["label"], batch["weights"]
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=-1)[:, 0]
  guess = jnp.argmax(logits, axis=-1)
  sums = {"accuracy": jnp.sum(weights * (guess == label))}
  if logits.shape[-1] == 2:
    sums["positive"] = jnp.sum(weights * label)
    sums["predicted"] = jnp.sum(weights * guess)
    sums["true_positive"] = jnp.sum(weights * label * guess)
  return -jnp.sum(weights * log_p), weights.sum(), sums


def binary_figures(positive: float, predicted: float, true_positive: float) -> dict[str, float]:
  """F1 of class 1, and Matthews' correlation of labels and guesses, 0 where one of them is always
  the same; from the shares of examples that `classification_loss` sums up."""
  variance = positive * (1 - positive) * predicted * (1 - predicted)
  covariance = true_positive - positive * predicted
  return {
    "f1": 2 * true_positive / (positive + predicted) if positive + predicted else 0.0,
    "matthews": covariance / math.sqrt(variance) if variance > 0 else 0.0,
  }
