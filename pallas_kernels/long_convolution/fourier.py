"""What the kernels of the long convolution share on every chip: Fourier transforms as matrices of
real numbers in bfloat16 parts, and the dtypes of rows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

PARTS = {"bfloat16": 2, "float32": 3}  # dtype of rows -> bfloat16 parts of an operand


def mixed_dtypes(u, *gates) -> str | None:
  """Why rows u and gates, some of which may be None, of these dtypes are not taken, or None."""
  if str(u.dtype) not in PARTS:
    return f"u is {u.dtype}, expected float32 or bfloat16"
  unlike = [str(gate.dtype) for gate in gates if gate is not None and gate.dtype != u.dtype]
  return f"a gate is {unlike[0]} and u {u.dtype}" if unlike else None


def angles(i, j, points: int) -> np.ndarray:
  """2 pi i j / points, for each i a row."""
  return np.outer(i, j) % points * (2 * np.pi / points)


def real_matrix(i, j, points: int) -> np.ndarray:
  """exp(-2 pi i i j / points) as a matrix of real and imaginary parts one above another."""
  turns = angles(i, j, points)
  return np.block([[np.cos(turns), np.sin(turns)], [-np.sin(turns), np.cos(turns)]])


def in_parts(x: np.ndarray, parts: int) -> np.ndarray:
  """[parts, ...] bfloat16, whose sum is x."""
  split = []
  for _ in range(parts):
    split.append(x.astype(jnp.bfloat16))
    x = x - split[-1].astype(np.float64)
  return np.stack(split)
