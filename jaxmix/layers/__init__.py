"""What models share: linear maps, norms, MLPs, embeddings, rotary positions, the residual block."""

from jaxmix.layers.block import Block, dropout
from jaxmix.layers.embedding import Embedding
from jaxmix.layers.linear import Linear
from jaxmix.layers.mlp import MLPS, DenseMLP, GatedMLP
from jaxmix.layers.norms import NORMS, LayerNorm, RMSNorm
from jaxmix.layers.rotary import rotary

__all__ = [
  "MLPS",
  "NORMS",
  "Block",
  "DenseMLP",
  "Embedding",
  "GatedMLP",
  "LayerNorm",
  "Linear",
  "RMSNorm",
  "dropout",
  "rotary",
]
