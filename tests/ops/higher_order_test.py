"""Higher-order linear attention against brute force over pairs and triples of tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops

EXACT = 1e-10  # the tolerance that the golden files are published with
STATES = {  # order -> our name of a state -> the name in the files
  "second": {"covariance": "S", "outer": "F"},
  "asymmetric": {"values": "P", "outer": "E"},
  "third": {"covariance": "S", "values": "P", "outer": "F"},
}
GATES = {  # order -> the decay of the outer and of the inner memories in the files
  "second": ("gF", "gS"),
  "asymmetric": ("gE", "gP"),
  "third": ("g", "g"),
}


@functools.partial(jax.jit, static_argnames=("order", "normalize", "implementation"))
def outputs_and_gradients(arrays, weights, **options):
  """y and the states, and the gradients of their weighted sum with respect to every array."""

  def weighted(arrays):
    y, state = ops.higher_order_linear_attention(**arrays, **options)
    out = {"y": y, **state}
    return sum(jnp.sum(out[name] * weights[name]) for name in weights), out

  gradients, out = jax.grad(weighted, has_aux=True)(arrays)
  return {name: out[name] for name in weights}, gradients


def load(golden, name) -> dict[str, np.ndarray]:
  """The arrays of a file. Its covariances read their columns, ours their rows; grown from nothing
  they are symmetric."""
  data = np.load(golden / "hla" / f"{name}.npz")
  data = {key: data[key].astype(np.float64) for key in data.files}
  return {
    key: np.swapaxes(x, -1, -2) if key in ("S0", "S", "dS0", "dS") else x for key, x in data.items()
  }


ORDER_OF = {"hla2": "second", "ahla": "asymmetric", "hla3": "third"}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", [
  "hla2__masked", "hla2__h0", "hla2__gated", "hla2__gated_h0", "ahla__masked", "ahla__gated_h0",
  "hla3__masked", "hla3__gated_h0",
])  # fmt: skip
def test_golden(golden, name, implementation, close):
  """Outputs, states and gradients by the definitions, with and without decay and first states."""
  data, order = load(golden, name), ORDER_OF[name.split("__")[0]]
  names = {ours: stored for ours, stored in STATES[order].items() if f"d{stored}" in data}
  outer, inner = GATES[order]
  arrays = {key: data[key] for key in ("q", "k", "v")}
  gradients = {key: data[f"d{key}"] for key in ("q", "k", "v")}
  if f"{names['outer']}0" in data:
    arrays["state"] = {ours: data[f"{stored}0"] for ours, stored in names.items()}
    gradients["state"] = {ours: data[f"d{stored}0"] for ours, stored in names.items()}
  if outer in data:
    arrays |= {"g": data[outer], "g_inner": data[inner]}
    gradients |= {"g": data[f"d{outer}"], "g_inner": data[f"d{inner}"]}
  weights = {"y": data["do"]} | {ours: data[f"d{stored}"] for ours, stored in names.items()}
  with jax.enable_x64(True):
    found, of_arrays = outputs_and_gradients(
      arrays, weights, order=order, implementation=implementation
    )
  if outer == inner and outer in data:  # one gate for all in the files
    of_arrays["g"] = of_arrays["g"] + of_arrays.pop("g_inner")
    gradients.pop("g_inner")
  expected = {"y": data["o"]} | {ours: data[stored] for ours, stored in names.items()}
  close((found, of_arrays), (expected, gradients), tolerance=EXACT)


def test_golden_of_decayed_weights(golden, close):
  """Inner decay twice the outer: the masked form of decayed first-order weights."""
  data = load(golden, "hla2__decayed_affinity")
  decay = np.full(data["q"].shape[2], np.log(data["gamma"]))
  arrays = {key: data[key] for key in ("q", "k", "v")}
  with jax.enable_x64(True):
    found, gradients = outputs_and_gradients(
      arrays | {"g": decay, "g_inner": 2 * decay}, {"y": data["do"]}, order="second"
    )
  expected = {key: data[f"d{key}"] for key in arrays}
  gradients = {key: gradients[key] for key in arrays}
  close((found, gradients), ({"y": data["o"]}, expected), tolerance=EXACT)


@pytest.mark.parametrize("name", ["hla2", "ahla"])
def test_golden_normalized(golden, name, close):
  """Divided by the sum of weights, to which the files add more than we do: 1e-6 of sums from 0.1
  up."""
  data = load(golden, f"{name}__masked_normalized")
  arrays = {key: data[key] for key in ("q", "k", "v")}
  with jax.enable_x64(True):
    found, gradients = outputs_and_gradients(
      arrays, {"y": data["do"]}, order=ORDER_OF[name], normalize=True
    )
  expected = {"y": data["o"]}, {key: data[f"d{key}"] for key in arrays}
  close((found, gradients), expected, tolerance=10 * float(data["eps"]))


@pytest.mark.parametrize(
  ("name", "order"),
  [("hla2__published_decay_serial", "second"), ("hla3__published_correction_form", "third")],
)
def test_published_recurrences_are_other_operators(golden, name, order, errors):
  """What the paper's recurrences compute with decay, and for the third order, is not the masked
  form."""
  data = load(golden, name)
  arrays = {key: data[key] for key in ("q", "k", "v")}
  if "gamma" in data:
    arrays["g"] = arrays["g_inner"] = np.full(data["q"].shape[2], np.log(data["gamma"]))
  with jax.enable_x64(True):
    y, _ = ops.higher_order_linear_attention(**arrays, order=order)
  assert errors(y, data["o"])[0] > 0.1


def test_unknown_order():
  q = np.zeros((1, 4, 2, 8), np.float32)
  with pytest.raises(ValueError) as error:
    ops.higher_order_linear_attention(q, q, q, order="fourth")
  assert str(error.value) == (
    "higher_order_linear_attention: order='fourth' is unknown; expected one of second, "
    "asymmetric, third"
  )
