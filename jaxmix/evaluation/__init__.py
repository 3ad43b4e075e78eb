"""How good a model is."""

from jaxmix.evaluation.perplexity import Evaluator, figures

__all__ = ["Evaluator", "figures"]
