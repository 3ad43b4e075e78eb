"""Ops: pure functions of arrays, for any JAX code. They know nothing of Flax."""

from jaxmix.ops.attention import attention, attention_state
from jaxmix.ops.delta_rule import delta_rule
from jaxmix.ops.grassmann import grassmann_mix, grassmann_state
from jaxmix.ops.higher_order import higher_order_linear_attention
from jaxmix.ops.implementation import explain_implementation
from jaxmix.ops.linear_attention import linear_attention
from jaxmix.ops.segments import document_indices, document_positions, last_token
from jaxmix.ops.short_convolution import short_convolution

__all__ = [
  "attention",
  "attention_state",
  "delta_rule",
  "document_indices",
  "document_positions",
  "explain_implementation",
  "grassmann_mix",
  "grassmann_state",
  "higher_order_linear_attention",
  "last_token",
  "linear_attention",
  "short_convolution",
]
