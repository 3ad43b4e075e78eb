"""Ops: pure functions of arrays, for any JAX code. They know nothing of Flax."""

from jaxmix.ops.attention import attention, attention_state
from jaxmix.ops.causal_monarch import (
  basis_flops,
  causal_monarch,
  causal_monarch_state,
  monarch_base,
)
from jaxmix.ops.circular import low_pass, transform_flops
from jaxmix.ops.delta_rule import delta_rule
from jaxmix.ops.fractional_offsets import fractional_grassmann_mix, offset_taps
from jaxmix.ops.grassmann import grassmann_mix, grassmann_state, offsets_of_groups
from jaxmix.ops.higher_order import higher_order_linear_attention
from jaxmix.ops.implementation import explain_implementation
from jaxmix.ops.linear_attention import linear_attention
from jaxmix.ops.long_convolution import LazyKernel, convolution_state, long_convolution
from jaxmix.ops.modal_convolution import modal_convolution, modal_filters, modal_state
from jaxmix.ops.modal_fit import FilterErrors, fit_modes
from jaxmix.ops.monarch import (
  block_diagonal_multiply,
  fourier_factors,
  monarch_multiply,
  monarch_to_dense,
  project_to_monarch,
)
from jaxmix.ops.segments import document_indices, document_positions, last_token
from jaxmix.ops.short_convolution import short_convolution

__all__ = [
  "FilterErrors",
  "LazyKernel",
  "attention",
  "attention_state",
  "basis_flops",
  "block_diagonal_multiply",
  "causal_monarch",
  "causal_monarch_state",
  "convolution_state",
  "delta_rule",
  "document_indices",
  "document_positions",
  "explain_implementation",
  "fit_modes",
  "fourier_factors",
  "fractional_grassmann_mix",
  "grassmann_mix",
  "grassmann_state",
  "higher_order_linear_attention",
  "last_token",
  "linear_attention",
  "long_convolution",
  "low_pass",
  "modal_convolution",
  "modal_filters",
  "modal_state",
  "monarch_base",
  "monarch_multiply",
  "monarch_to_dense",
  "offset_taps",
  "offsets_of_groups",
  "project_to_monarch",
  "short_convolution",
  "transform_flops",
]
