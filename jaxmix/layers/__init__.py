"""What models share: linear maps, norms, MLPs, embeddings, rotary positions, short convolutions,
projections to heads and back, the residual block, heads of classes."""

from jaxmix.layers.block import Block, dropout
from jaxmix.layers.classifier_heads import LinearHead, SubspaceHead
from jaxmix.layers.decay_gates import SoftplusDecay, log_sigmoid_decay
from jaxmix.layers.embedding import Embedding
from jaxmix.layers.head_mixer import HeadMixer, head_channels
from jaxmix.layers.heads import GatedOutput, HeadProjection, LowRank, l2_norm
from jaxmix.layers.implicit_filter import ImplicitFilter
from jaxmix.layers.learned_offsets import LearnedOffsets
from jaxmix.layers.linear import Linear
from jaxmix.layers.mlp import MLPS, BlockDiagonalMLP, DenseMLP, GatedMLP
from jaxmix.layers.modal_filter import ModalFilter
from jaxmix.layers.monarch_linear import BlockDiagonalLinear, MonarchLinear
from jaxmix.layers.norms import NORMS, LayerNorm, RMSNorm
from jaxmix.layers.rotary import rotary
from jaxmix.layers.short_convolution import ShortConvolution

__all__ = [
  "MLPS",
  "NORMS",
  "Block",
  "BlockDiagonalLinear",
  "BlockDiagonalMLP",
  "DenseMLP",
  "Embedding",
  "GatedMLP",
  "GatedOutput",
  "HeadMixer",
  "HeadProjection",
  "ImplicitFilter",
  "LayerNorm",
  "LearnedOffsets",
  "Linear",
  "LinearHead",
  "LowRank",
  "ModalFilter",
  "MonarchLinear",
  "RMSNorm",
  "ShortConvolution",
  "SoftplusDecay",
  "SubspaceHead",
  "dropout",
  "head_channels",
  "l2_norm",
  "log_sigmoid_decay",
  "rotary",
]
