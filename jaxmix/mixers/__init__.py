"""Sequence mixers: thin Flax modules around one op each, used as immutable pytrees.

    mixer(x, *, state=None, segment_ids=None, positions=None) -> (y, state)     # x, y [B, T, D]
    mixer.init_state(batch_size, *, dtype=float32) -> state
    mixer.flops(batch, length) -> int
    mixer.place(layer, layers)      # where something at first depends on the depth; called once
    mixer.vary(number)              # where layers differ by their number; they repeat after
                                    # mixer.variants of them

`MIXERS` names them for the patterns of models.
"""

from jaxmix.mixers.attention import Attention
from jaxmix.mixers.deltanet import KDA, DeltaNet, GatedDeltaNet
from jaxmix.mixers.gla import GLA
from jaxmix.mixers.grassmann import Grassmann
from jaxmix.mixers.hgrn2 import HGRN2
from jaxmix.mixers.hla import HLA
from jaxmix.mixers.lightning import Lightning
from jaxmix.mixers.linear_attention import LinearAttention
from jaxmix.mixers.mamba2 import Mamba2
from jaxmix.mixers.monarch import MonarchMixer
from jaxmix.mixers.retnet import RetNet
from jaxmix.mixers.simple_gla import SimpleGLA

MIXERS = {
  "attention": Attention,
  "deltanet": DeltaNet,
  "gated_deltanet": GatedDeltaNet,
  "gla": GLA,
  "grassmann": Grassmann,
  "hgrn2": HGRN2,
  "hla": HLA,
  "kda": KDA,
  "lightning": Lightning,
  "linear_attention": LinearAttention,
  "mamba2": Mamba2,
  "monarch": MonarchMixer,
  "retnet": RetNet,
  "simple_gla": SimpleGLA,
}

__all__ = ["MIXERS", *(mixer.__name__ for mixer in MIXERS.values())]
