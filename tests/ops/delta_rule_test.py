"""The op delta_rule against published reference programs, and where its inverse is hardest."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops
from jaxmix.ops.products import invert_unit_lower

EXACT = 1e-10  # the tolerance that the golden files are published with
OF_TILES = 2e-6  # their results are stored in float32
INPUTS = {"q": "q", "k": "k", "v": "v", "beta": "beta", "g": "g", "state": "h0"}  # ours -> stored


@functools.partial(jax.jit, static_argnames=("implementation", "scale"))
def outputs_and_gradients(arrays, weights, **options):
  """y, S_T, and the gradients of their weighted sum with respect to every array."""

  def weighted(arrays):
    y, state = ops.delta_rule(**arrays, **options)
    out = {"y": y, "state": state}
    return sum(jnp.sum(out[name] * weights[name]) for name in out), out

  gradients, out = jax.grad(weighted, has_aux=True)(arrays)
  return {"out": out, "gradients": gradients}


def load(golden, name) -> dict[str, np.ndarray]:
  data = np.load(golden / "linear_attention" / f"{name}.npz")
  return {key: data[key].astype(np.float64) for key in data.files}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", [
  "delta_rule__basic", "delta_rule__h0_negeig", "delta_rule__near_duplicate_keys",
  "gated_delta_rule__mild", "gated_delta_rule__mild_h0", "gated_delta_rule__strong_h0_negeig",
  "kda__mild", "kda__strong_h0", "kda__gva_h0", "tile__gated_delta_rule", "tile__kda_strong",
])  # fmt: skip
def test_golden(golden, name, implementation, close):
  """Outputs, states and gradients of reference programs: DeltaNet, Gated DeltaNet, KDA."""
  data = load(golden, name)
  arrays = {key: data[stored] for key, stored in INPUTS.items() if stored in data}
  with jax.enable_x64(True):
    found = outputs_and_gradients(
      arrays,
      {"y": data["do"], "state": data["dht"]},
      implementation=implementation,
      scale=float(data["scale"]),
    )
  gradients = {key: data[f"d{INPUTS[key]}"] for key in arrays}
  expected = {"out": {"y": data["o"], "state": data["ht"]}, "gradients": gradients}
  close(found, expected, tolerance=OF_TILES if name.startswith("tile") else EXACT)


@pytest.mark.parametrize("name", ["gated_delta_rule", "kda"])
def test_golden_of_sequences(golden, name, close):
  """Sequences of several lengths, one of them empty, each with a state of its own."""
  data = load(golden, f"varlen__{name}")
  ends = data["cu_seqlens"].astype(int)
  found, expected = [], []
  with jax.enable_x64(True):
    for n, (start, end) in enumerate(itertools.pairwise(ends)):
      rows = {key: data[key][:, start:end] for key in ("q", "k", "v", "beta", "g")}
      found.append(
        outputs_and_gradients(
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


@pytest.mark.parametrize(("beta", "decay"), [(0.5, 0.1), (1.0, 0.1), (1.0, 0.0), (2.0, 0.0)])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_repeated_keys(size, beta, decay, errors):
  """One key at every token, where series in powers of M lose all digits: the inverse keeps
  float32's."""
  row, column = np.indices((size, size))
  m = np.where(row > column, beta * np.exp(-decay * np.maximum(row - column, 0)), 0)
  exact = np.linalg.inv(np.eye(size) + m)
  (found,) = invert_unit_lower(jnp.asarray(m, jnp.float32)[None, None, None, None])[0, 0, 0]
  rms, largest, worst = errors(found, exact)
  # Entries are sums of products of at most four numbers of order one in each of log2(C) levels.
  assert max(rms, largest) <= 4 * np.log2(size) * np.finfo(np.float32).eps, (rms, largest, worst)


@pytest.mark.parametrize("chunk_size", [64, 256])
def test_repeated_keys_in_chunks(chunk_size, close):
  """The whole op on one key repeated, beta 1: what is read is the newest value."""
  random = np.random.default_rng(0)
  key = random.normal(size=16)
  k = np.broadcast_to(key / np.linalg.norm(key), (1, 300, 2, 16)).astype(np.float32)
  v = random.normal(size=(1, 300, 2, 8)).astype(np.float32)
  beta = np.ones((1, 300, 2), np.float32)
  y, _ = ops.delta_rule(k, k, v, beta, scale=1.0, chunk_size=chunk_size)
  # The lengths of the keys are off by rounding, and each token of a chunk adds that much.
  close(y, v, tolerance=chunk_size * np.finfo(np.float32).eps)


def test_write_strength_of_zero(close, rounding):
  """With beta 0 nothing is written: the state only decays."""
  random = np.random.default_rng(0)
  q, k, v = (random.normal(size=(1, 70, 2, 8)).astype(np.float32) for _ in range(3))
  g = -random.uniform(0, 0.1, (1, 70, 2)).astype(np.float32)
  state = random.normal(size=(1, 2, 8, 8)).astype(np.float32)
  _, after = ops.delta_rule(q, k, v, np.zeros_like(g), g=g, state=state)
  close(after, np.exp(g.sum(1))[..., None, None] * state, tolerance=rounding(jnp.float32, 70))
