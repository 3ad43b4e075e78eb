"""The ops with a matrix state against published reference programs."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops

IMPLEMENTATIONS = ("xla", "reference")
EXACT = 1e-10  # the tolerance that the golden files are published with
OF_TILES = 2e-6  # their results are stored in float32
INPUTS = {"q": "q", "k": "k", "v": "v", "beta": "beta", "g": "g", "state": "h0"}  # ours -> stored


def load(golden, name) -> dict[str, np.ndarray]:
  data = np.load(golden / "linear_attention" / f"{name}.npz")
  return {key: data[key].astype(np.float64) for key in data.files}


def op_of(data) -> str:
  return "delta_rule" if "beta" in data else "linear_attention"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [
  "linear_attn__basic", "linear_attn__h0", "retention__basic", "lightning__h0",
  "simple_gla__mild", "simple_gla__mild_h0", "simple_gla__strong_h0", "gla__mild", "gla__mild_h0",
  "gla__strong_h0", "tile__gla",
  "delta_rule__basic", "delta_rule__h0_negeig", "delta_rule__near_duplicate_keys",
  "gated_delta_rule__mild", "gated_delta_rule__mild_h0", "gated_delta_rule__strong_h0_negeig",
  "kda__mild", "kda__strong_h0", "kda__gva_h0", "tile__gated_delta_rule", "tile__kda_strong",
])  # fmt: skip
def test_golden(golden, name, implementation, close, outputs_and_gradients):
  """Outputs, states and gradients: no decay, one a head, a token, a channel; the delta rule."""
  data = load(golden, name)
  arrays = {key: data[stored] for key, stored in INPUTS.items() if stored in data}
  gradients = {key: data[f"d{INPUTS[key]}"] for key in arrays}
  constant = next((data[key] for key in ("log_gamma", "g_gamma") if key in data), None)
  with jax.enable_x64(True):
    found = outputs_and_gradients(
      op_of(data),
      arrays if constant is None else arrays | {"g": constant},
      {"y": data["do"], "state": data["dht"]},
      implementation=implementation,
      scale=float(data["scale"]),
    )
  if constant is not None:
    assert np.isfinite(found["gradients"].pop("g")).all()  # the files hold no gradient of it
  expected = {"out": {"y": data["o"], "state": data["ht"]}, "gradients": gradients}
  close(found, expected, tolerance=OF_TILES if name.startswith("tile") else EXACT)


@pytest.mark.parametrize("name", ["simple_gla", "gla", "gated_delta_rule", "kda"])
def test_golden_of_sequences(golden, name, close, outputs_and_gradients):
  """Sequences of several lengths, one of them empty, each with a state of its own."""
  data = load(golden, f"varlen__{name}")
  ends = data["cu_seqlens"].astype(int)
  found, expected = [], []
  with jax.enable_x64(True):
    for n, (start, end) in enumerate(itertools.pairwise(ends)):
      rows = {key: data[key][:, start:end] for key in ("q", "k", "v", "beta", "g") if key in data}
      found.append(
        outputs_and_gradients(
          op_of(data),
          rows | {"state": data["h0"][n : n + 1]},
          {"y": data["do"][:, start:end], "state": data["dht"][n : n + 1]},
          scale=float(data["scale"]),
        )
      )
      gradients = {key: data[f"d{key}"][:, start:end] for key in rows}
      expected.append({
        "out": {"y": data["o"][:, start:end], "state": data["ht"][n : n + 1]},
        "gradients": gradients | {"state": data["dh0"][n : n + 1]},
      })  # fmt: skip
  close(found, expected, tolerance=EXACT)


@pytest.mark.parametrize("name", ["normalized", "normalized_h0"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_golden_normalized(golden, name, implementation, close, outputs_and_gradients):
  """The same with the sum of keys as the last column of the state."""
  data = load(golden, f"linear_attn__{name}")

  def with_sum_of_keys(matrix, vector):  # [B, H, K, V], [B, 1, H, K] -> [B, H, K, V + 1]
    return np.concatenate([data[matrix], np.moveaxis(data[vector], 1, -1)], axis=-1)

  arrays = {key: data[key] for key in ("q", "k", "v")}
  gradients = {key: data[f"d{key}"] for key in ("q", "k", "v")}
  if "h0" in data:
    arrays["state"] = with_sum_of_keys("h0", "z0")
    gradients["state"] = with_sum_of_keys("dh0", "dz0")
  with jax.enable_x64(True):
    found = outputs_and_gradients(
      "linear_attention",
      arrays,
      {"y": data["do"], "state": with_sum_of_keys("dht", "dzt")},
      implementation=implementation,
      normalize=True,
      scale=float(data["scale"]),
    )
  out = {"y": data["o"], "state": with_sum_of_keys("ht", "zt")}
  close(found, {"out": out, "gradients": gradients}, tolerance=EXACT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_golden_of_mamba2(golden, implementation, close):
  """The state space dual of Mamba-2: queries C and keys B shared by groups of heads, values dt *
  x."""
  data = load(golden, "mamba2_ssd__h0")
  names = ("x", "dt", "A", "Bm", "Cm", "D", "h0")

  def loss(arrays):
    x, dt, a, b, c, d, state = (arrays[name] for name in names)
    y, state = ops.linear_attention(
      c, b, dt[..., None] * x, g=dt * a, scale=1.0, state=state, implementation=implementation
    )
    y = y + d[:, None] * x
    return jnp.sum(y * data["dy"]) + jnp.sum(state * data["dht"]), {"y": y, "state": state}

  with jax.enable_x64(True):
    gradients, out = jax.jit(jax.grad(loss, has_aux=True))({name: data[name] for name in names})
  expected = {name: data[f"d{name}"] for name in names}
  close((out, gradients), ({"y": data["y"], "state": data["ht"]}, expected), tolerance=EXACT)


def test_golden_of_hgrn2(golden, close):
  """HGRN2: the key is what the decay leaves of one."""
  data = load(golden, "hgrn2__basic")

  def loss(arrays):
    g = jax.nn.log_sigmoid(arrays["f"])
    y, state = ops.linear_attention(
      jax.nn.silu(arrays["q"]), 1 - jnp.exp(g), arrays["v"], g=g, scale=float(data["scale"])
    )
    return jnp.sum(y * data["do"]) + jnp.sum(state * data["dht"]), {"y": y, "state": state}

  with jax.enable_x64(True):
    gradients, out = jax.jit(jax.grad(loss, has_aux=True))({key: data[key] for key in "qfv"})
  expected = {key: data[f"d{key}"] for key in "qfv"}
  close((out, gradients), ({"y": data["o"], "state": data["ht"]}, expected), tolerance=EXACT)
