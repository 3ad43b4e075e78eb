"""Models: stacks of mixers, named by their pattern."""

from jaxmix.models.decoder import REMAT_POLICIES, Decoder

__all__ = ["REMAT_POLICIES", "Decoder"]
