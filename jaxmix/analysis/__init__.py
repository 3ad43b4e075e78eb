"""What a mixer does with a text."""

from jaxmix.analysis.subspaces import plane_bases, principal_angles, reduced_states

__all__ = ["plane_bases", "principal_angles", "reduced_states"]
