"""The op modal_convolution: published vectors, the definition with documents and a state."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops

TOLERANCE = 1e-10  # that of the golden folder for float64
IDS = np.array([[0, 4, 4, 0, 4, 4, 7, 7, 7, 0, 7], [1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0]], np.int32)


@functools.partial(jax.jit, static_argnames="implementation")
def run(arrays, state=None, ids=None, implementation=None):
  return ops.modal_convolution(
    **arrays, state=state, segment_ids=ids, implementation=implementation
  )


def inputs(length: int, channels: int = 3, modes: int = 4):
  random = np.random.default_rng(0)
  rows = (2, length, channels)
  arrays = {name: random.normal(size=rows) for name in ("u", "pre_gate", "post_gate")}
  angles = random.uniform(-np.pi, np.pi, size=(channels, modes))
  arrays["log_poles"] = -random.uniform(0.01, 1, size=angles.shape) + 1j * angles
  arrays["residues"] = random.normal(size=angles.shape) + 1j * random.normal(size=angles.shape)
  return arrays | {"skip": random.normal(size=channels)}


def by_definition(u, log_poles, residues, skip, pre_gate, post_gate, ids, x):
  """Token by token with numpy."""
  y, g = np.zeros_like(u), pre_gate * u
  for row, documents in enumerate(ids):
    before = None
    for t, document in enumerate(documents):
      if document == 0:
        continue
      x[row] = 0 if before not in (None, document) else x[row]
      before = document
      x[row] = np.exp(log_poles) * x[row] + g[row, t, :, None]
      y[row, t] = post_gate[row, t] * ((residues * x[row]).sum(-1).real + skip * g[row, t])
  return y, {"modes": x}


def test_golden(golden, float64, close):
  """Filters, a whole row, and a prompt with tokens behind it."""
  data = np.load(golden / "monarch" / "decode.npz")
  lam, c, k, g, y, state = (
    data[f"modal/{name}"] for name in ("lam", "c", "k", "g", "y", "final_state")
  )
  arrays = {"u": g.swapaxes(1, 2), "log_poles": np.log(lam), "residues": c}
  close(ops.modal_filters(arrays["log_poles"], c, k.shape[1]), k, tolerance=TOLERANCE)
  expected = y.swapaxes(1, 2), {"modes": state}
  close(run(arrays), expected, tolerance=TOLERANCE)
  first, after = run(arrays | {"u": arrays["u"][:, :30]})
  found = [first]
  for t in range(30, k.shape[1]):
    step, after = run(arrays | {"u": arrays["u"][:, t : t + 1]}, after)
    found.append(step)
  close((np.concatenate(found, 1), after), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("length", [1, 2, 6, 11])
def test_definition(length, implementation, float64, close):
  """Behind a state, with documents and padding; and nothing behind none."""
  arrays, ids = inputs(length), IDS[:, :length]
  x = np.random.default_rng(1).normal(size=(2, 3, 4)) * (1 + 1j)
  found = run(arrays, {"modes": jnp.asarray(x)}, ids, implementation)
  close(found, by_definition(**arrays, ids=ids, x=x.copy()), tolerance=1e-12)
  found = run(arrays, None, ids, implementation)
  close(found, by_definition(**arrays, ids=ids, x=np.zeros_like(x)), tolerance=1e-12)


def test_no_token(close):
  """A row without tokens hands on the state, or one of zeros."""
  arrays = jax.tree.map(lambda x: x.astype("c8" if np.iscomplexobj(x) else "f4"), inputs(0))
  state = {"modes": jnp.ones((2, 3, 4), jnp.complex64)}
  close(run(arrays, state)[1], state, tolerance=0)
  close(run(arrays)[1], ops.modal_state(2, 3, 4), tolerance=0)


def test_bfloat16(errors):
  """Inputs and results in bfloat16, sums in float32: one rounding of the result, and one more where
  a state adds to it."""
  arrays = inputs(100)
  poles = {name: arrays.pop(name).astype(np.complex64) for name in ("log_poles", "residues")}
  arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
  wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
  state = {"modes": jnp.ones((2, 3, 4), jnp.complex64)}
  for before, roundings in ((None, 1), (state, 2)):
    (y, after), (expected, _) = (run(each | poles, before) for each in (arrays, wide))
    assert y.dtype == jnp.bfloat16 and after["modes"].dtype == jnp.complex64
    assert max(errors(y.astype(jnp.float32), expected)[:2]) < roundings * 2**-8


def test_errors():
  u, poles = jnp.zeros((2, 8, 3)), jnp.zeros((3, 4), jnp.complex64)
  with pytest.raises(ValueError, match="give every channel as many modes"):
    ops.modal_convolution(u, poles, poles[:, :2])
  with pytest.raises(ValueError, match="are float32 and complex64, expected complex numbers"):
    ops.modal_convolution(u, poles.real, poles)
  with pytest.raises(ValueError, match="make it by modal_state"):
    ops.modal_convolution(u, poles, poles, state=ops.modal_state(2, 3, 5))
  with pytest.raises(ValueError, match="segment_ids"):
    ops.modal_convolution(u, poles, poles, segment_ids=jnp.ones((2, 7), jnp.int32))
