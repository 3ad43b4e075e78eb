"""Sequence mixers: thin Flax modules around one op each, used as immutable pytrees.

    mixer(x, *, state=None, segment_ids=None, positions=None) -> (y, state)     # x, y [B, T, D]
    mixer.init_state(batch_size, *, dtype=float32) -> state
    mixer.flops(batch, length) -> int

`MIXERS` names them for the patterns of models.
"""

from jaxmix.mixers.attention import Attention
from jaxmix.mixers.linear_attention import LinearAttention

MIXERS = {"attention": Attention, "linear_attention": LinearAttention}

__all__ = ["MIXERS", "Attention", "LinearAttention"]
