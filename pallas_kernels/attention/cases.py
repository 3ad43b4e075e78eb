"""Shapes of softmax attention."""

from pallas_kernels.cases import Case

CASES = (
  Case("small", batch=2, length=130, heads=4, key_heads=2, key_dim=8, value_dim=12),
  Case("small_packed", batch=2, length=130, heads=2, key_dim=8, value_dim=12, documents=3),
  Case("cpu", batch=1, length=4096, heads=8, key_dim=64, value_dim=64),
  Case("train", batch=4, length=4096, heads=16, key_dim=128, value_dim=128, dtype="bfloat16"),
)
