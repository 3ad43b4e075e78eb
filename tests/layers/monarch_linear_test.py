"""Block-diagonal and Monarch linear maps and the MLPs of them, against public programs."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmix.layers import BlockDiagonalLinear, BlockDiagonalMLP, LayerNorm, MonarchLinear

TOLERANCE = 1e-10  # that of the golden folder for float64


@pytest.fixture(scope="module", autouse=True)
def _float64(float64):
  """All in float64."""


def check(module, data, names, close, call=None):
  """Output, and gradients of x and of every parameter; `names`: ours -> the file's."""
  graph, _ = nnx.split(module)

  def ours(kind):
    def take(path, leaf):
      name = names["/".join(str(key.key) for key in path)]
      x = data[f"{kind}/{name}"]
      return (x.swapaxes(1, 2) if x.ndim == 3 else x).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(take, nnx.to_pure_dict(nnx.state(module)))

  def run(x, parameters):
    return (call or (lambda module, x: module(x)))(nnx.merge(graph, parameters), x)

  y, pull = jax.vjp(run, data["x"], ours("param"))
  close((y, *pull(data["dy"])), (data["y"], data["dx"], ours("grad")), tolerance=TOLERANCE)


def load(golden, file, case):
  data = np.load(golden / "monarch" / f"{file}.npz")
  return {key[len(case) + 1 :]: data[key] for key in data.files if key.startswith(f"{case}/")}


@pytest.mark.parametrize("case", ["linear0", "linear1", "linear2", "linear3"])
def test_golden_block_diagonal(case, golden, close, errors, rounding):
  """Widths that blocks divide and that they do not, shuffled channels; the dense matrix; and in
  float32 as near to the result as the public program, within a factor of two."""
  data = load(golden, "blockdiag", case)
  narrow, wide = int(data["in_features"]), int(data["out_features"])
  module = BlockDiagonalLinear(
    {"embed": narrow},
    {"mlp": wide},
    blocks=int(data["nblocks"]),
    shuffle=bool(data["shuffle"]),
    bias="param/bias" in data,
    rngs=nnx.Rngs(params=0),
  )
  check(module, data, {"kernel": "weight", "bias": "bias"}, close)
  assert module.flops_per_token == 2 * data["param/weight"].size
  module.kernel[...] = data["param/weight"].swapaxes(1, 2)
  bias = data.get("param/bias", np.zeros(wide))
  if module.bias is not None:
    module.bias[...] = bias
  close(module(np.eye(narrow)) - bias, data["dense"], tolerance=TOLERANCE)
  graph, parameters = nnx.split(module)
  x, parameters = jax.tree.map(lambda x: x.astype(np.float32), (data["x"], parameters))
  y = nnx.merge(graph, parameters)(x)
  assert y.dtype == np.float32
  ours, public = (max(errors(each, data["y"])[:2]) for each in (y, data["y_f32"]))
  assert ours <= 2 * public + rounding(np.float32, 2)


@pytest.mark.parametrize("case", ["monarch_linear0", "monarch_linear1", "monarch_linear2"])
def test_golden_monarch(case, golden, close):
  data = load(golden, "monarch", case)
  narrow, wide, blocks = (int(data[name]) for name in ("in_features", "out_features", "nblocks"))
  module = MonarchLinear(
    {"embed": narrow}, {"mlp": wide}, blocks=blocks, bias=True, rngs=nnx.Rngs(params=0)
  )
  check(module, data, {"first": "blkdiag1", "second": "blkdiag2", "bias": "bias"}, close)


@pytest.mark.parametrize("case", ["mlp_glu0", "mlp_mlp1", "mlp_glu2"])
def test_golden_mlp(case, golden, close):
  """With the residual connection and the norm behind it."""
  data = load(golden, "blockdiag", case)
  dim = data["x"].shape[2]
  mlp = BlockDiagonalMLP(
    dim,
    int(data["intermediate"]),
    blocks=int(data["nblocks"]),
    gated="glu" in case,
    activation="exact_gelu",
    bias=True,
    rngs=nnx.Rngs(params=0),
  )
  names = {
    "mlp/up/kernel": "gated_layers.weight",
    "mlp/down/kernel": "wo.weight",
    "mlp/down/bias": "wo.bias",
    "norm/scale": "layernorm.weight",
    "norm/bias": "layernorm.bias",
  }

  class Half(nnx.Module):
    def __init__(self):
      self.mlp, self.norm = mlp, LayerNorm(dim, eps=1e-12)

  check(Half(), data, names, close, lambda half, x: half.norm(x + half.mlp(x)))
