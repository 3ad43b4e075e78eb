"""What a model is trained for.

An objective is a function `(model, batch, dropout_key=None) -> (summed loss in nats, sum of
weights)`. It may return a third value, name -> further sums over the batch; their means, by the sum
of the weights, are reported beside the loss.
"""

from jaxmix.objectives.causal import causal_loss, cross_entropy
from jaxmix.objectives.classification import binary_figures, classification_loss
from jaxmix.objectives.masked import is_masked, masked_loss

__all__ = [
  "binary_figures",
  "causal_loss",
  "classification_loss",
  "cross_entropy",
  "is_masked",
  "masked_loss",
]
