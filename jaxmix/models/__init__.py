"""Models: stacks of mixers, named by their pattern."""

from jaxmix.models.decoder import REMAT_POLICIES, Decoder
from jaxmix.models.parameters import (
  Axes,
  abstract_parameters,
  cast_matrices,
  init_parameters,
  parameter_shardings,
)

__all__ = [
  "REMAT_POLICIES",
  "Axes",
  "Decoder",
  "abstract_parameters",
  "cast_matrices",
  "init_parameters",
  "parameter_shardings",
]
