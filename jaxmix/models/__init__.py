"""Models: stacks of mixers, named by their pattern."""

from jaxmix.models.decoder import Decoder
from jaxmix.models.parameters import (
  Axes,
  abstract_parameters,
  cast_matrices,
  init_parameters,
  parameter_shardings,
)
from jaxmix.models.stack import REMAT_POLICIES, Stack

__all__ = [
  "REMAT_POLICIES",
  "Axes",
  "Decoder",
  "Stack",
  "abstract_parameters",
  "cast_matrices",
  "init_parameters",
  "parameter_shardings",
]
