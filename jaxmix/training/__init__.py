"""Training: the loop, the step, optimizers, checkpoints, metrics."""

from jaxmix.training.loop import Result, train
from jaxmix.training.optimizers import adamw, cosine, muon, warmup_stable_decay
from jaxmix.training.plots import plot_comparison
from jaxmix.training.riemannian import riemannian_sgd, with_subspaces
from jaxmix.training.step import TrainStep

__all__ = [
  "Result",
  "TrainStep",
  "adamw",
  "cosine",
  "muon",
  "plot_comparison",
  "riemannian_sgd",
  "train",
  "warmup_stable_decay",
  "with_subspaces",
]
