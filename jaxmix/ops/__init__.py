"""Ops: pure functions of arrays, for any JAX code. They know nothing of Flax."""

from jaxmix.ops.attention import attention, attention_state
from jaxmix.ops.implementation import explain_implementation
from jaxmix.ops.linear_attention import linear_attention
from jaxmix.ops.segments import document_indices, document_positions, last_token

__all__ = [
  "attention",
  "attention_state",
  "document_indices",
  "document_positions",
  "explain_implementation",
  "last_token",
  "linear_attention",
]
