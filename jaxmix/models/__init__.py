"""Models: stacks of mixers, named by their pattern."""

from jaxmix.models.decoder import Decoder
from jaxmix.models.encoder import Encoder
from jaxmix.models.masked_lm import MaskedLM
from jaxmix.models.parameters import (
  BATCHES,
  Axes,
  abstract_parameters,
  cast_matrices,
  freeze,
  init_parameters,
  parameter_shardings,
)
from jaxmix.models.sentence_pairs import PairHead, SentencePairClassifier
from jaxmix.models.stack import REMAT_POLICIES, Stack
from jaxmix.models.text_classifier import TextClassifier
from jaxmix.models.vision import ImageClassifier

__all__ = [
  "BATCHES",
  "REMAT_POLICIES",
  "Axes",
  "Decoder",
  "Encoder",
  "ImageClassifier",
  "MaskedLM",
  "PairHead",
  "SentencePairClassifier",
  "Stack",
  "TextClassifier",
  "abstract_parameters",
  "cast_matrices",
  "freeze",
  "init_parameters",
  "parameter_shardings",
]
