"""Classification: the cross-entropy of one label an example, and how many are right."""

from __future__ import annotations

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
    examples whose label has the largest logit}; float32 scalars.
  """
  inputs = {name: x for name, x in batch.items() if name not in ("label", "weights")}
  logits = model(**inputs, dropout_key=dropout_key)
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  label, weights = batch["label"], batch["weights"]
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=-1)[:, 0]
  right = weights * (jnp.argmax(logits, axis=-1) == label)
  return -jnp.sum(weights * log_p), weights.sum(), {"accuracy": right.sum()}
