"""What a model is trained for."""

from jaxmix.objectives.causal import causal_loss, cross_entropy

__all__ = ["causal_loss", "cross_entropy"]
