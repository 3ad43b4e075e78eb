"""The op long_convolution: published vectors, the definition, packed rows, streams, causality."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops
from jaxmix.ops import circular
from pallas_kernels.long_convolution.cases import CASES

TOLERANCE = 1e-10  # that of the golden folder for float64
LENGTHS = (*range(1, 34), 61, 97, 128, 200)  # the last three by transforms


@functools.partial(jax.jit, static_argnames="implementation")
def run(arrays, state, ids, implementation=None):
  return ops.long_convolution(**arrays, state=state, segment_ids=ids, implementation=implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def everything(arrays, ids, dy, implementation):
  """y and the gradients of its product with dy."""
  y, pull = jax.vjp(
    lambda arrays: ops.long_convolution(**arrays, segment_ids=ids, implementation=implementation)[
      0
    ],
    arrays,
  )
  return y, pull(dy)[0]


def inputs(batch=2, length=20, channels=3, taps=None, *, full=False, seed=0):
  random = np.random.default_rng(seed)
  rows, filters = (batch, length, channels), (channels, taps or length)
  arrays = {"u": random.normal(size=rows), "kernel": random.normal(size=filters)}
  arrays |= {name: random.normal(size=rows) for name in ("pre_gate", "post_gate")}
  arrays["skip"] = random.normal(size=channels)
  if full:
    arrays["reverse_kernel"] = random.normal(size=filters)
  return arrays


@pytest.mark.parametrize("case", ["causal0", "bidir1", "causal2", "bidir3", "gated"])
def test_golden(case, golden, float64, close):
  data = np.load(golden / "monarch" / "fftconv.npz")
  names = {"u": "u" if case == "gated" else "g", "kernel": "k", "reverse_kernel": "k_rev"}
  names |= {"skip": "D", "pre_gate": "in_gate", "post_gate": "out_gate"}
  rows = ("u", "pre_gate", "post_gate")  # stored [B, D, T]

  def load(name, prefix=""):
    array = data[f"{case}/{prefix}{names[name]}"]
    return array.swapaxes(1, 2) if name in rows else array

  arrays = {name: load(name) for name in names if f"{case}/{names[name]}" in data}
  y, dy = (data[f"{case}/{name}"].swapaxes(1, 2) for name in ("y", "dy"))
  found = everything(arrays, None, dy, None)
  close(found, (y, {name: load(name, "d") for name in arrays}), tolerance=TOLERANCE)


def test_golden_truncated(golden, float64, close):
  """A filter shorter than the row."""
  data = np.load(golden / "monarch" / "fftconv.npz")
  x, k, y = (data[f"partial/{name}"].astype(np.float64) for name in ("x", "k", "y"))
  kernel = k[:, : int(data["partial/n_partial"])]
  found, _ = ops.long_convolution(x.swapaxes(1, 2), kernel)
  close(found, y.swapaxes(1, 2), tolerance=1e-6)  # stored in float32


def test_golden_low_pass(golden, float64, close):
  """A filter of few frequencies, whose published program zeroes the others in the spectrum."""
  data = np.load(golden / "monarch" / "fftconv.npz")
  x, k, y = (data[f"freq_sparse/{name}"].astype(np.float64) for name in ("x", "k", "y"))
  kernel, later = ops.low_pass(k, frequencies=int(data["freq_sparse/n_partial"]) // 2)
  found, _ = ops.long_convolution(x.swapaxes(1, 2), kernel, reverse_kernel=later)
  close(found, y.swapaxes(1, 2), tolerance=1e-6)  # stored in float32


@pytest.mark.parametrize("frequencies", [1, 4, 9])
@pytest.mark.parametrize("full", [False, True])
def test_low_pass(full, frequencies, float64, close):
  """Around a circle of 2 L lags low frequencies are those of the filter, and others are none."""
  arrays = inputs(length=8, full=full)
  k, later = arrays["kernel"], arrays.get("reverse_kernel", np.zeros((3, 8)))
  around = [k, np.zeros((3, 1)), later[:, 6::-1]]  # its last lag reaches over the row's end
  expected = np.fft.rfft(np.concatenate(around, 1))
  expected[:, frequencies:] = 0
  found = ops.low_pass(k, arrays.get("reverse_kernel"), frequencies=frequencies)
  found = np.fft.rfft(np.concatenate([found[0], found[1][:, ::-1]], 1))
  close(found, expected, tolerance=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", ["circular0", "circular1", "circular2", "order3"])
def test_golden_circular(case, implementation, golden, float64, close):
  """With the same filter to both sides a row is convolved with itself around its end."""
  data = np.load(golden / "monarch" / "fftconv.npz")
  x, k, y = (data[f"{case}/{name}"] for name in ("x", "k", "y"))
  arrays = {"u": x.swapaxes(1, 2), "kernel": k, "reverse_kernel": k[:, ::-1]}
  close(run(arrays, None, None, implementation)[0], y.swapaxes(1, 2), tolerance=TOLERANCE)


@pytest.mark.parametrize("case", [
  "causal", "bidirectional", "bidirectional_residual", "bidirectional_residual_norm",
  "causal_residual_short", "bidirectional_residual_short",
])  # fmt: skip
def test_golden_inside_a_mixer(case, golden, float64, close):
  """What the published mixer makes of its gated input, with its filters and the weights of the
  token itself."""
  data = np.load(golden / "monarch" / "m2_seqmixer.npz")
  names = {"kernel": "k", "reverse_kernel": "k_rev", "skip": "param/filter_fn.bias"}
  arrays = {
    name: data[f"{case}/{stored}"] for name, stored in names.items() if f"{case}/{stored}" in data
  }
  u, y = (data[f"{case}/{name}"].swapaxes(1, 2) for name in ("gated_in", "conv_out"))
  close(run({"u": u, **arrays}, None, None)[0], y, tolerance=TOLERANCE)


@pytest.mark.parametrize("length", LENGTHS)
def test_definition(length, float64, close):
  """Both sides, gates and skip, filters of the row's length: direct sums with numpy."""
  arrays = inputs(length=length, full=True)
  g = arrays["pre_gate"] * arrays["u"]
  expected = arrays["skip"] * g
  for t in range(length):
    for s in range(length):
      lag = arrays["kernel"][:, t - s] if s <= t else arrays["reverse_kernel"][:, s - t - 1]
      expected[:, t] += lag * g[:, s]
  close(ops.long_convolution(**arrays)[0], arrays["post_gate"] * expected, tolerance=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packed(case, float64, close):
  """Values and gradients, in packed rows, with filters shorter and longer than they are."""
  arrays, ids = case.inputs(), case.segment_ids()
  dy = np.random.default_rng(1).normal(size=arrays["u"].shape)
  found, expected = (everything(arrays, ids, dy, name) for name in ("xla", "reference"))
  close(found, expected, tolerance=1e-12)


@pytest.mark.parametrize("taps", [1, 2, 7, 50])
def test_stream(taps, float64, close):
  """Rows in pieces of many lengths, most of one token, through several blocks: as in one."""
  arrays = inputs(length=120, taps=taps)
  expected, _ = run(arrays, None, None)
  state, found, at = ops.convolution_state(2, taps, 3, jnp.float64), [], 0
  for piece in (1, 1, 1, 9, 0, 70, *[1] * 38):
    rows = {name: x[:, at : at + piece] if x.ndim == 3 else x for name, x in arrays.items()}
    y, state = run(rows, state, None)
    found.append(y)
    at += piece
  close(np.concatenate(found, 1), expected, tolerance=1e-12)
  assert state["length"].tolist() == [120, 120]


def test_stream_of_documents(float64, close):
  """Pieces of packed rows, each its own way; then tokens, in one row of which some are padding."""
  packed = next(case for case in CASES if case.name == "many_taps").segment_ids()
  ids = np.concatenate([packed, [[4] * 18, [2, 0] * 9]], 1).astype(np.int32)
  arrays = inputs(length=40, taps=30)
  expected, _ = run(arrays, None, ids, "reference")
  state, found = ops.convolution_state(2, 30, 3, jnp.float64), []
  for start, end in ((0, 4), (4, 22), *((t, t + 1) for t in range(22, 40))):
    rows = {name: x[:, start:end] if x.ndim == 3 else x for name, x in arrays.items()}
    y, state = run(rows, state, ids[:, start:end])
    found.append(y)
  close(np.concatenate(found, 1), expected, tolerance=1e-12)


def test_gradient_of_stream(float64, close):
  """Through the state, by a piece and by tokens."""
  arrays = inputs(length=20, taps=9)
  weights = np.random.default_rng(3).normal(size=arrays["u"].shape)

  def loss(arrays, pieces):
    state, total, at = ops.convolution_state(2, 9, 3, jnp.float64), 0.0, 0
    for piece in pieces:
      rows = {name: x[:, at : at + piece] if x.ndim == 3 else x for name, x in arrays.items()}
      y, state = ops.long_convolution(**rows, state=state)
      total, at = total + jnp.sum(y * weights[:, at : at + piece]), at + piece
    return total

  whole, pieces = (
    jax.jit(jax.grad(loss), static_argnums=1)(arrays, pieces)
    for pieces in ((20,), (3, 1, 1, 10, 1, 1, 1, 1, 1))
  )
  close(pieces, whole, tolerance=1e-12)


@pytest.mark.parametrize(("length", "leak"), [(circular.SHORT, 0.0), (200, 1e-6)])
def test_causality(length, leak):
  """A later input changes nothing of a product, and of a transform what rounding does."""
  arrays = inputs(length=length)
  arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
  changed = arrays | {"u": arrays["u"].copy()}
  changed["u"][:, 30:] += 1
  before, after = (run(each, None, None)[0][:, :30] for each in (arrays, changed))
  assert np.abs(before - after).max() <= leak * np.abs(run(changed, None, None)[0]).max()


def test_blocks_of_channels(monkeypatch, float64, close):
  """Values and gradients where channels go in blocks of two, as those of long rows do on a CPU."""
  arrays, dy = (
    inputs(length=200, channels=6, full=True),
    inputs(length=200, channels=6, seed=1)["u"],
  )
  whole = everything(arrays, None, dy, "xla")
  size = circular.filters(arrays["kernel"], arrays["reverse_kernel"], 200).shape[1]
  monkeypatch.setattr(circular, "CACHE_BYTES", 2 * (2 * size * 8))
  in_blocks = jax.jit(lambda *given: everything.__wrapped__(*given, "xla"))
  assert "while" in in_blocks.lower(arrays, None, dy).as_text()
  close(in_blocks(arrays, None, dy), whole, tolerance=1e-13)


def test_bfloat16(errors):
  """Inputs and results in bfloat16, sums in float32: one rounding of the result."""
  arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs(length=200).items()}
  y, _ = run(arrays, None, None)
  wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
  assert y.dtype == jnp.bfloat16
  assert max(errors(y.astype(jnp.float32), run(wide, None, None)[0])[:2]) < 2**-8


def test_lengths_of_transforms():
  """The smallest number from n on whose only prime factors are 2, 3 and 5."""

  def is_smooth(n):
    for prime in (2, 3, 5):
      while n % prime == 0:
        n //= prime
    return n == 1

  for n in range(1, 2100):
    assert circular.smooth(n) == next(m for m in range(n, 2 * n + 1) if is_smooth(m))


def test_errors():
  u, kernel = jnp.zeros((2, 8, 3)), jnp.zeros((3, 8))
  with pytest.raises(ValueError, match="transpose kernel"):
    ops.long_convolution(u, kernel.T)
  with pytest.raises(ValueError, match=r"reverse_kernel has shape \(8, 3\)"):
    ops.long_convolution(u, kernel, reverse_kernel=kernel.T)
  with pytest.raises(ValueError, match="reads later tokens"):
    state = ops.convolution_state(2, 8, 3)
    ops.long_convolution(u, kernel, reverse_kernel=kernel, state=state)
  with pytest.raises(ValueError, match="make it by convolution_state"):
    ops.long_convolution(u, kernel, state=ops.convolution_state(2, 9, 3))
  with pytest.raises(ValueError, match="pre_gate has shape"):
    ops.long_convolution(u, kernel, pre_gate=u[:, :1])
  with pytest.raises(ValueError, match="skip has shape"):
    ops.long_convolution(u, kernel, skip=jnp.zeros(4))
  with pytest.raises(ValueError, match="u is float16, expected float32 or bfloat16"):
    ops.long_convolution(u.astype(jnp.float16), kernel, implementation="gpu")
  with pytest.raises(ValueError, match="segment_ids"):
    ops.long_convolution(u, kernel, segment_ids=jnp.ones((2, 7), jnp.int32))
  with pytest.raises(ValueError, match="frequencies=0, expected at least 1"):
    ops.low_pass(kernel, frequencies=0)
