"""How the ops with a matrix state are run under test."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxmix import ops

STATIC = ("op", "implementation", "chunk_size", "normalize", "scale")


@functools.partial(jax.jit, static_argnames=STATIC)
def _run(op, arrays, weights, **options):
  def weighted(arrays):
    y, state = getattr(ops, op)(**arrays, **options)
    out = {"y": y, "state": state}
    return sum(jnp.sum(out[name] * weights[name]) for name in weights), out

  gradients, out = jax.grad(weighted, has_aux=True)(arrays)
  return {"out": out, "gradients": gradients}


@pytest.fixture(scope="session")
def outputs_and_gradients():
  """(op, arrays, weights, **options) -> "out": y and S_T, and "gradients": those of their weighted
  sum with respect to every array."""
  return _run
