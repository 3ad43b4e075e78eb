"""Linear maps, norms, MLPs, embeddings, rotary positions and dropout, against plain float64
numpy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix import layers

RNGS = nnx.Rngs(params=0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture(scope="module")
def exact(rounding) -> float:
  # Two maps of 48 and 32 channels, and what is done to each result.
  return rounding(np.float32, 48 + 32 + 20)


def test_linear_contracts_trailing_axes(close, exact):
  """Several axes in and out, with bias, computed in the dtype of x."""
  linear = layers.Linear({"heads": 4, "head": 8}, {"mlp": 3, "embed": 5}, bias=True, rngs=RNGS)
  linear.bias[...] = jnp.asarray(normal(3, 5), jnp.float32)
  x = normal(2, 7, 4, 8).astype(np.float32)
  kernel, bias = (np.float64(parameter[...]) for parameter in (linear.kernel, linear.bias))
  close(linear(jnp.asarray(x)), np.einsum("bthk,hkme->btme", x, kernel) + bias, tolerance=exact)
  assert linear(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
  assert linear.flops_per_token == 2 * 4 * 8 * 3 * 5


def test_linear_keeps_the_variance():
  """Unit inputs give unit outputs at the start; the standard error of 512 * 1024 samples is
  0.002."""
  linear = layers.Linear({"embed": 512}, {"mlp": 1024}, rngs=RNGS)
  assert abs(float(jnp.std(linear(jnp.asarray(normal(512, 512), jnp.float32)))) - 1) < 0.01


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_norms(dtype, size, errors, rounding):
  """Both norms in the dtype of x, rounded once: the work is float32."""
  x = (size * (normal(3, 5, 32) + 0.5)).astype(dtype)
  scale, bias = normal(32, seed=1), normal(32, seed=2)
  z = x.astype(np.float64)
  centred = z - z.mean(-1, keepdims=True)
  expected = {
    layers.RMSNorm: z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) * scale,
    layers.LayerNorm: centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias,
  }
  for norm_class, answer in expected.items():
    norm = norm_class(32)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    if norm_class is layers.LayerNorm:
      norm.bias[...] = jnp.asarray(bias, jnp.float32)
    y = norm(jnp.asarray(x))
    rms, largest, _ = errors(y, answer)
    assert y.dtype == dtype
    assert max(rms, largest) <= rounding(dtype, 1) + rounding(np.float32, 32)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_mlps(activation, close, exact):
  """The dense and the gated MLP are their formulas."""
  x = normal(2, 3, 32)
  act = {
    # jax.nn.gelu is the tanh form
    "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: np.maximum(z, 0),
    "silu": lambda z: z / (1 + np.exp(-z)),
  }[activation]
  matrix = lambda linear: np.float64(linear.kernel[...])  # noqa: E731
  dense = layers.DenseMLP(32, 48, activation=activation, rngs=RNGS)
  gated = layers.GatedMLP(32, 48, activation=activation, rngs=RNGS)
  x32 = jnp.asarray(x, jnp.float32)
  close(dense(x32), act(x @ matrix(dense.up)) @ matrix(dense.down), tolerance=exact)
  close(
    gated(x32),
    (act(x @ matrix(gated.gate)) * (x @ matrix(gated.up))) @ matrix(gated.down),
    tolerance=exact,
  )
  assert dense.flops(2, 3) == 2 * 3 * 2 * 2 * 32 * 48
  assert gated.flops(2, 3) == 2 * 3 * 2 * 3 * 32 * 48


def test_unknown_activation():
  with pytest.raises(ValueError) as error:
    layers.DenseMLP(8, 8, activation="tanh", rngs=RNGS)
  assert str(error.value) == (
    "activation='tanh' is unknown; expected one of gelu, exact_gelu, relu, silu"
  )


def test_exact_gelu(close, rounding):
  """x Phi(x), of bfloat16 too, whose last digit is all that may be off."""
  x = np.linspace(-6, 6, 101).astype(np.float32)
  expected = np.array([z * (1 + math.erf(z / math.sqrt(2))) / 2 for z in x.astype(np.float64)])
  gelu = layers.mlp.ACTIVATIONS["exact_gelu"]
  close(gelu(jnp.asarray(x)), expected, tolerance=rounding(np.float32, 10))
  narrow = jnp.asarray(x, jnp.bfloat16)
  assert gelu(narrow).dtype == jnp.bfloat16
  close(np.float64(gelu(narrow)), expected, tolerance=rounding(jnp.bfloat16, 4))


@pytest.mark.parametrize("options", [{"gated": True}, {"gated": False}])
def test_block_diagonal_mlp_of_odd_blocks(options, close, exact):
  """Halves are contiguous where a block lies in both."""
  mlp = layers.BlockDiagonalMLP(30, 18, blocks=3, bias=True, rngs=RNGS, **options)
  x = normal(2, 5, 30).astype(np.float32)
  up, down = (
    np.float64(jax.scipy.linalg.block_diag(*each.kernel[...])) for each in (mlp.up, mlp.down)
  )

  def gelu(h):
    return np.float64(jax.nn.gelu(jnp.asarray(h, jnp.float32)))

  h = x @ up
  h = gelu(h[..., :18]) * h[..., 18:] if options["gated"] else gelu(h)
  close(mlp(jnp.asarray(x)), h @ down + np.float64(mlp.down.bias[...]), tolerance=exact)


def test_hidden_width_of_whole_blocks():
  with pytest.raises(ValueError, match=r"hidden=18 is not a multiple of blocks=4; try hidden=20"):
    layers.BlockDiagonalMLP(16, 18, rngs=RNGS)


def test_filters_in_pieces(close, rounding, monkeypatch):
  """Of more lags than are made at a time: values and gradients are those of all at once."""
  filters = layers.ImplicitFilter(
    {"mlp": 4}, max_length=50, directions=2, hidden=8, frequency=1.0, rngs=RNGS
  )
  graph, parameters = nnx.split(filters)

  def run(parameters):
    return nnx.merge(graph, parameters)(40)

  def both():
    y, pull = jax.vjp(run, parameters)
    return y, pull(jax.tree.map(jnp.cos, y))

  whole = both()
  monkeypatch.setattr("jaxmix.layers.implicit_filter.CHUNK", 16)
  assert [y.shape for y in both()[0]] == [(4, 40)] * 2
  close(both(), whole, tolerance=rounding(np.float32, 50))


def test_embedding():
  """Rows by index in the dtype asked for; past the table its last row."""
  embedding = layers.Embedding(5, 8, rngs=RNGS)
  table = np.asarray(embedding.table[...])
  np.testing.assert_array_equal(embedding(jnp.array([[0, 4, 9]]), jnp.float32), table[[[0, 4, 4]]])
  assert embedding(jnp.array([[0]]), jnp.bfloat16).dtype == jnp.bfloat16


def test_rotary_reads_relative_positions(close, rounding):
  """Products of turned queries and keys depend on the distance alone, and lengths are kept."""
  q, k = (jnp.asarray(normal(1, 6, 2, 16, seed=seed), jnp.float32) for seed in (0, 1))
  positions = jnp.array([[0, 3, 10, 11, 200, 2000]])

  def scores(shift):
    turned = [layers.rotary(z, positions + shift) for z in (q, k)]
    return jnp.einsum("bthk,bshk->bhts", *turned)

  # An angle of 2000 radians is off by half a unit in its last place, 6e-5 radians, and so is a
  # score.
  angle = 2100 * rounding(np.float32, 2)
  close(scores(100), scores(0), tolerance=angle)
  turned = layers.rotary(q, positions)
  close(jnp.sum(turned**2, -1), jnp.sum(q**2, -1), tolerance=rounding(np.float32, 16))
  np.testing.assert_array_equal(layers.rotary(q, jnp.zeros_like(positions)), q)


def test_rotary_frequencies(close, rounding):
  """Pair i turns by position * base^(-2i/K): against complex numbers in float64."""
  x = normal(1, 4, 1, 8)
  positions = np.array([[0, 1, 5, 30]])
  z = x[..., :4] + 1j * x[..., 4:]
  z = z * np.exp(1j * positions[..., None, None] * 100.0 ** (-np.arange(4) / 4))
  y = layers.rotary(jnp.asarray(x, jnp.float32), jnp.asarray(positions), base=100.0)
  close(y, np.concatenate([z.real, z.imag], -1), tolerance=30 * rounding(np.float32, 4))
  assert layers.rotary(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions)).dtype == jnp.bfloat16


def test_dropout():
  """Keeps the mean, zeroes the share asked for, is the same for a key, and is off without one."""
  x = jnp.ones((100, 1000))
  y = layers.dropout(x, 0.25, jax.random.key(0))
  np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
  # 1e5 draws: the share of zeros has a standard error of 0.0014
  assert abs(float(jnp.mean(y == 0)) - 0.25) < 0.01
  np.testing.assert_array_equal(y, layers.dropout(x, 0.25, jax.random.key(0)))
  assert np.any(y != layers.dropout(x, 0.25, jax.random.key(1)))
  assert layers.dropout(x, 0.25, None) is x and layers.dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("placement", ["pre_norm", "post_norm"])
def test_block(placement, close, exact):
  """The two placements of the norms are their formulas."""

  class Double(nnx.Module):  # a mixer without parameters
    def __call__(self, x, *, state=None, segment_ids=None, positions=None):
      return 2 * x, state

    def flops(self, batch, length):
      return batch * length

  mlp = layers.DenseMLP(32, 48, rngs=RNGS)
  block = layers.Block(
    Double(), mlp, lambda: layers.RMSNorm(32), placement=placement, dropout_rate=0.0
  )
  x = jnp.asarray(normal(2, 3, 32), jnp.float32)
  norm = layers.RMSNorm(32)
  if placement == "pre_norm":
    middle = x + 2 * norm(x)
    expected = middle + mlp(norm(middle))
  else:
    middle = norm(3 * x)
    expected = norm(middle + mlp(middle))
  y, state = block(x, state="handed on")
  close(y, expected, tolerance=exact)
  assert state == "handed on"
  assert block.flops(2, 3) == 6 + mlp.flops(2, 3)


def test_unknown_placement():
  with pytest.raises(ValueError) as error:
    layers.Block(None, None, None, placement="sandwich", dropout_rate=0.0)
  assert str(error.value) == (
    "placement='sandwich' is unknown; expected one of pre_norm, post_norm, gated_post_norm, "
    "mlp_post_norm"
  )


@pytest.mark.parametrize("name", ["softplus", "lower_bound"])
def test_golden_of_decay_gates(golden, name, close):
  """Both gates of a decay with the gradients of their parameters, as published."""
  data = np.load(golden / "linear_attention" / f"kda_gate__{name}.npz")
  data = {key: data[key].astype(np.float64) for key in data.files}
  floor = float(data["lower_bound"]) if "lower_bound" in data else None
  with jax.enable_x64(True):
    gate = layers.SoftplusDecay({"heads": 3, "key": 4}, floor=floor, rngs=nnx.Rngs(params=0))
    graph, state = nnx.split(gate)
    state["log_rate"].set_value(jnp.asarray(data["A_log"]))
    state["bias"].set_value(jnp.asarray(data["dt_bias"]).reshape(3, 4))

    def loss(state, raw):
      g = nnx.merge(graph, state)(raw)
      return jnp.sum(g * data["do"]), g

    (of_state, of_raw), g = jax.grad(loss, argnums=(0, 1), has_aux=True)(state, data["raw"])
  found = (g, of_raw, of_state["log_rate"][...], of_state["bias"][...].reshape(-1))
  close(found, tuple(data[key] for key in ("o", "draw", "dA_log", "ddt_bias")), tolerance=1e-10)


def test_golden_of_l2_norm(golden, close):
  """The length of one, and its gradient, also of a row of zeros."""
  data = np.load(golden / "linear_attention" / "l2norm__basic.npz")
  data = {key: data[key].astype(np.float64) for key in data.files}
  with jax.enable_x64(True):
    y, pull = jax.vjp(lambda x: layers.l2_norm(x, eps=float(data["eps"])), data["x"])
    close((y, *pull(data["do"])), (data["o"], data["dx"]), tolerance=1e-10)


def test_decay_begins_slow():
  """Steps spread from 0.001 to 0.1, and rates between the two given."""
  gate = layers.SoftplusDecay({"heads": 4096}, rates=(1.0, 16.0), rngs=nnx.Rngs(params=0))
  step = np.asarray(jax.nn.softplus(gate.bias[...]))
  assert 0.00099 < step.min() < 0.0011 and 0.09 < step.max() < 0.101
  assert abs(np.log(step).mean() - np.log(0.01)) < 0.1
  rate = np.exp(gate.log_rate[...])
  assert 1 <= rate.min() < 1.1 and 15.9 < rate.max() <= 16.001
