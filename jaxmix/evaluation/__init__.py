"""How good a model is."""

from jaxmix.evaluation.perplexity import Evaluator, perplexity

__all__ = ["Evaluator", "perplexity"]
