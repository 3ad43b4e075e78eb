"""Whole mixers against published layers: the projections, gates and norms around the ops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.mixers import GLA, KDA, GatedDeltaNet

EXACT = 1e-10  # the tolerance that the golden files are published with

# Our parameter -> the one in the file, where heads and their channels are one axis.
SHARED = {
  "q/linear/kernel": "wq", "k/linear/kernel": "wk", "v/linear/kernel": "wv",
  "output/out/kernel": "wo", "output/norm/scale": "norm_w",
}  # fmt: skip
CONVOLUTIONS = {
  "q/convolution/weight": "cq", "k/convolution/weight": "ck", "v/convolution/weight": "cvw",
}  # fmt: skip
LAYERS = {
  "gla": (
    lambda sizes: GLA(16, heads=2, gate_rank=4, rngs=nnx.Rngs(params=0)),
    {
      **SHARED, "output/gate/kernel": "wg",
      "decay/down/kernel": "wgk1", "decay/up/kernel": "wgk2", "decay/up/bias": "bgk",
    },
  ),
  "gated_deltanet": (
    lambda sizes: GatedDeltaNet(16, heads=2, key_dim=8, value_dim=8, rngs=nnx.Rngs(params=0)),
    {
      **SHARED, **CONVOLUTIONS, "output/gate/kernel": "wg", "beta/kernel": "wb",
      "step/kernel": "wa", "decay/log_rate": "A_log", "decay/bias": "dt_bias",
    },
  ),
  "kda": (
    lambda sizes: KDA(16, heads=2, rngs=nnx.Rngs(params=0)),
    {
      **SHARED, **CONVOLUTIONS, "beta/kernel": "wb",
      "step/down/kernel": "wf1", "step/up/kernel": "wf2",
      "decay/log_rate": "A_log", "decay/bias": "dt_bias",
      "output/gate/down/kernel": "wg1", "output/gate/up/kernel": "wg2",
      "output/gate/up/bias": "bg",
    },
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_golden(golden, name, close):
  """Output, memory, and the gradients of the input and of every parameter."""
  data = np.load(golden / "linear_attention" / f"layer__{name}.npz")
  data = {key: data[key].astype(np.float64) for key in data.files}
  make, stored = LAYERS[name]
  with jax.enable_x64(True):
    graph, state = nnx.split(make(data))
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    assert flat.keys() == stored.keys()
    for path, parameter in flat.items():
      parameter.set_value(jnp.asarray(data[stored[path]]).reshape(parameter[...].shape))

    def loss(state, x):
      y, after = nnx.merge(graph, state)(x)
      return jnp.sum(y * data["dy"]), (y, after["memory"])

    (dstate, dx), (y, memory) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
      state, data["x"]
    )
  close((y, memory, dx), (data["y"], data["ht"], data["dx"]), tolerance=EXACT)
  for path, gradient in nnx.to_flat_state(dstate):
    expected = data[f"d{stored['/'.join(map(str, path))]}"]
    close(gradient[...].reshape(expected.shape), expected, tolerance=EXACT)
