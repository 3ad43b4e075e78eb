"""Named shapes of the delta rule, for the tests and the benchmarks of every implementation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from pallas_kernels.linear_attention import cases as linear_attention
from pallas_kernels.linear_attention.cases import PACKED


@dataclasses.dataclass(frozen=True)
class Case(linear_attention.Case):
  """One shape; see the cases of linear attention.

  Attributes:
    largest_beta: of the write strengths.
    repeated: whether every key of a row is the same, the hardest case for the triangular inverse.
  """

  # Arrays that are float32 whatever the others are.
  float32: ClassVar[tuple[str, ...]] = (
    "beta",
    "g",
    "state",
  )

  largest_beta: float = 2.0
  repeated: bool = False

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Those of linear attention, and beta [B, T, H]."""
    return {**super().shapes(), "beta": (self.batch, self.length, self.heads)}

  def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays in float64: q and k of length one, beta uniform from 0 to its largest; else standard
    normal, but g. Repeated keys are written with the largest beta throughout."""
    arrays = super().inputs(seed)
    beta = np.random.default_rng(seed + 1000).uniform(0, self.largest_beta, arrays["beta"].shape)
    if self.repeated:
      arrays["k"] = np.broadcast_to(arrays["k"][:, :1], arrays["k"].shape)
      beta = np.full_like(beta, self.largest_beta)
    for name in ("q", "k"):
      arrays[name] = arrays[name] / np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    return {**arrays, "beta": beta}


CASES = (
  Case("one_token", 2, 1, 2, 8, 8, decay="scalar"),
  Case("two_tokens", 2, 2, 1, 4, 8, (((1, 1), (2, 1)), ((0, 1), (1, 1)))),
  Case("below_a_chunk", 1, 63, 2, 8, 12),
  Case("above_a_chunk", 2, 65, 1, 8, 4, decay="vector"),
  Case("many_documents", 2, 130, 2, 8, 12, PACKED),
  Case("constant", 2, 130, 2, 8, 12, decay="constant"),
  Case("scalar", 2, 130, 2, 8, 12, PACKED, decay="scalar"),
  Case("vector", 2, 130, 2, 8, 12, PACKED, decay="vector"),
  Case("shared_keys", 1, 70, 4, 8, 12, decay="vector", key_heads=2),
  Case("repeated_keys", 1, 130, 2, 16, 16, repeated=True, largest_beta=1.0),
)

BENCHMARKS = (
  Case("cpu", 1, 4096, 8, 64, 64, decay="scalar"),
  Case("cpu_vector", 1, 4096, 8, 64, 64, decay="vector"),
  Case("train", 4, 4096, 16, 128, 128),
  Case("train_scalar", 4, 4096, 16, 128, 128, decay="scalar"),
  Case("train_vector", 4, 4096, 16, 128, 128, decay="vector"),
  Case("train_2k_scalar", 4, 2048, 16, 128, 128, decay="scalar"),
  Case("train_2k_vector", 4, 2048, 16, 128, 128, decay="vector"),
  Case("train_16k_scalar", 1, 16384, 16, 128, 128, decay="scalar"),
  Case("train_16k_vector", 1, 16384, 16, 128, 128, decay="vector"),
)
