"""How good a model is."""

from jaxmix.evaluation.evaluator import Evaluator, figures

__all__ = ["Evaluator", "figures"]
