"""The op short_convolution: its form by shifts against the definition and against published
reference programs, and the laws of its state."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops, sharding
from pallas_kernels.short_convolution.cases import CASES

NAMED = {case.name: case for case in CASES}


@functools.partial(jax.jit, static_argnames=("implementation", "activation"))
def outputs_and_gradients(arrays, weights, segment_ids, **options):
  """y, the state after, and the gradients of their weighted sum with respect to every array."""

  def weighted(arrays):
    y, state = ops.short_convolution(**arrays, segment_ids=segment_ids, **options)
    return jnp.sum(y * weights["x"]) + jnp.sum(state * weights["state"]), (y, state)

  gradients, (y, state) = jax.grad(weighted, has_aux=True)(arrays)
  return {"y": y, "state": state, "gradients": gradients}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_definition(case, close, rounding):
  """Values and gradients of every input are those of the definition."""
  arrays = case.inputs(), case.inputs(seed=1), case.segment_ids()
  with jax.enable_x64(True):
    found, definition = (
      outputs_and_gradients(*arrays, implementation=name, activation=case.activation)
      for name in ("xla", "reference")
    )
  close(found, definition, tolerance=rounding(jnp.float64, case.length + 2 * case.width))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_precision(dtype, implementation, errors, rounding):
  """In float32 and bfloat16 the errors against float64 are those of rounding; results have the
  dtypes of what they belong to."""
  case = NAMED["packed"]
  inputs = {name: x.astype(dtype) for name, x in case.inputs().items()}
  inputs["weight"] = inputs["weight"].astype(np.float32)
  weights = {name: x.astype(dtype) for name, x in case.inputs(seed=1).items()}
  options = {"activation": case.activation}
  ids = case.segment_ids()
  found = outputs_and_gradients(inputs, weights, ids, implementation=implementation, **options)
  with jax.enable_x64(True):
    double = lambda tree: jax.tree.map(lambda x: x.astype(np.float64), tree)  # noqa: E731
    exact = outputs_and_gradients(
      double(inputs), double(weights), ids, implementation="reference", **options
    )
  operations = case.length if dtype == np.float32 else 4  # sums; results and cotangents rounded
  for (path, leaf), expected in zip(
    jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(exact), strict=True
  ):
    rms, largest, worst = errors(leaf, expected)
    assert max(rms, largest) <= rounding(dtype, operations), (
      f"{path}: {rms:.1e}, {largest:.1e} at {worst}"
    )
  assert found["y"].dtype == found["state"].dtype == dtype
  assert {name: x.dtype for name, x in found["gradients"].items()} == {
    name: x.dtype for name, x in inputs.items()
  }


def golden_case(golden, name: str):
  data = dict(np.load(golden / "linear_attention" / f"short_conv__{name}.npz"))
  activation = "silu" if "silu" in name else None
  return {key: np.asarray(x, np.float64) for key, x in data.items()}, activation


def expected_of(data, rows=slice(None), sequences=slice(None)):
  """What a golden file holds, in the form of `outputs_and_gradients`, but for the gradients of
  weight and bias, which sum over all of it."""
  gradients = {"x": data["dx"][:, rows], "state": data["dc0"][sequences]}
  return {"y": data["y"][:, rows], "state": data["ct"][sequences], "gradients": gradients}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", ["identity", "silu", "silu_shorter_than_kernel"])
def test_golden(golden, name, implementation, close):
  """Outputs, states and gradients of a reference program."""
  data, activation = golden_case(golden, name)
  arrays = {"x": data["x"], "weight": data["w"], "bias": data["b"], "state": data["c0"]}
  weights = {"x": data["dy"], "state": data["dct"]}
  with jax.enable_x64(True):
    found = outputs_and_gradients(
      arrays, weights, None, implementation=implementation, activation=activation
    )
  expected = expected_of(data)
  expected["gradients"] |= {"weight": data["dw"], "bias": data["db"]}
  close(found, expected, tolerance=1e-10)  # the tolerance that the golden files are published with


def test_golden_packed(golden, close):
  """Sequences of different lengths, one of them empty: apart, each with its state; and as one
  packed row, whose documents after the first begin without one."""
  data, activation = golden_case(golden, "varlen_silu")
  shared = {"weight": data["w"], "bias": data["b"]}
  bounds = data["cu_seqlens"].astype(int)
  run = functools.partial(outputs_and_gradients, implementation="xla", activation=activation)
  of_weight, of_bias = 0, 0
  with jax.enable_x64(True):
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
      rows, own = slice(start, end), slice(n, n + 1)
      arrays = {**shared, "x": data["x"][:, rows], "state": data["c0"][own]}
      found = run(arrays, {"x": data["dy"][:, rows], "state": data["dct"][own]}, None)
      of_weight += found["gradients"].pop("weight")
      of_bias += found["gradients"].pop("bias")
      close(found, expected_of(data, rows, own), tolerance=1e-10)
    close([of_weight, of_bias], [data["dw"], data["db"]], tolerance=1e-10)

    # A packed row has no place for the states of later documents, but their outputs do not depend
    # on these from the width on.
    ids = np.repeat(np.arange(1, len(bounds)), np.diff(bounds))[None].astype(np.int32)
    first = ids[0, 0] - 1
    arrays = {**shared, "x": data["x"], "state": data["c0"][first : first + 1]}
    weights = {"x": data["dy"], "state": np.zeros((1, *data["dct"].shape[1:]))}
    found = run(arrays, weights, ids)
    into = np.arange(ids.shape[1]) - bounds[ids[0] - 1]
    known = (ids[0] == ids[0, 0]) | (into >= data["w"].shape[1] - 1)
    close(found["y"][:, known], data["y"][:, known], tolerance=1e-10)
    apart = [
      run({**shared, "x": data["x"][:, a:b], "state": np.zeros_like(arrays["state"])},
          {"x": data["dy"][:, a:b], "state": weights["state"]}, None)["gradients"]["x"]
      for a, b in itertools.pairwise(bounds[1:])
    ]  # fmt: skip
    close(found["gradients"]["x"][:, bounds[1] :], np.concatenate(apart, 1), tolerance=1e-10)


def run(x, arrays, state=None, ids=None):
  """y and the state after, by the form by shifts in float64."""
  with jax.enable_x64(True):
    return convolve(x, arrays["weight"], arrays["bias"], state, ids)


@jax.jit
def convolve(x, weight, bias, state, ids):
  return ops.short_convolution(
    x, weight, bias=bias, activation="silu", state=state, segment_ids=ids, implementation="xla"
  )


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, 12])
def test_split(cut, close, rounding):
  """f(x[:a]) and then f(x[a:]) with the carried state is f(x), and leaves the same state."""
  arrays = NAMED["above_a_block"].inputs()
  x = arrays["x"][:, :12]
  whole, last = run(x, arrays, arrays["state"])
  first, state = run(x[:, :cut], arrays, arrays["state"])
  second, state = run(x[:, cut:], arrays, state)
  close(np.concatenate([first, second], 1), whole, tolerance=rounding(jnp.float64, 8))
  np.testing.assert_array_equal(state, last)


@pytest.mark.parametrize("length", [3, 9], ids=["of_the_reach", "longer"])
def test_padding_anywhere(length, close, rounding):
  """Padding before, inside and behind a document gives the outputs and the state of the document
  without it, gradients included."""
  arrays, weights = NAMED["above_a_block"].inputs(), NAMED["above_a_block"].inputs(seed=1)
  random = np.random.default_rng(0)
  for live in (random.permutation(length) < max(length // 2, 2) for _ in range(4)):
    ids = np.repeat(np.where(live, 7, 0)[None], 2, 0).astype(np.int32)
    packed = {**arrays, "x": np.where(live[:, None], arrays["x"][:, :length], np.nan)}
    alone = {**arrays, "x": arrays["x"][:, :length][:, live]}
    of_y = weights["x"][:, :length]
    options = {"activation": "silu", "implementation": "xla"}
    with jax.enable_x64(True):
      found = outputs_and_gradients(packed, {**weights, "x": of_y}, ids, **options)
      expected = outputs_and_gradients(alone, {**weights, "x": of_y[:, live]}, None, **options)
    found = jax.tree.map(np.asarray, found)
    for results in (found, found["gradients"]):
      name = "y" if results is found else "x"
      assert not results[name][:, ~live].any()
      results[name] = results[name][:, live]
    close(found, expected, tolerance=rounding(jnp.float64, 16))


def test_documents_apart(close, rounding):
  """A packed row is its documents apart: outputs, and the state of the last one."""
  case = NAMED["packed"]
  arrays, ids = case.inputs(), case.segment_ids()[:1]
  y, state = run(arrays["x"][:1], arrays, arrays["state"][:1], ids)
  numbers = np.asarray(ops.document_indices(ids))[0]
  before = arrays["state"][:1]
  for number in range(numbers[-1] + 1):
    own = (numbers == number) & (ids[0] != 0)
    alone, last = run(arrays["x"][:1, own], arrays, before)
    close(np.asarray(y)[:, own], alone, tolerance=rounding(jnp.float64, 8))
    before = None
  np.testing.assert_array_equal(state, last)
  assert not np.asarray(y)[:, ids[0] == 0].any()


def test_nothing_but_padding():
  """A row of padding gives zeros and hands the state on."""
  arrays = NAMED["above_a_block"].inputs()
  x = np.full_like(arrays["x"][:, :5], np.nan)
  y, state = run(x, arrays, arrays["state"], np.zeros((2, 5), np.int32))
  assert not np.asarray(y).any()
  np.testing.assert_array_equal(state, arrays["state"])


def test_shard(close, rounding):
  """Cut over 8 devices along batch and channels, the form by shifts gives what one device does."""
  case = NAMED["packed"]
  arrays, weights = ({**c, "x": np.tile(c["x"], (2, 1, 1)), "state": np.tile(c["state"], (2, 1, 1))}
                     for c in (case.inputs(), case.inputs(seed=1)))  # fmt: skip
  ids = np.tile(case.segment_ids(), (2, 1))
  mesh = sharding.make_mesh(data=4, tensor=2)
  spec = {
    "x": jax.P("data", None, "tensor"), "state": jax.P("data", None, "tensor"),
    "weight": jax.P("tensor"), "bias": jax.P("tensor"),
  }  # fmt: skip
  options = {"activation": case.activation, "implementation": "xla"}
  with jax.enable_x64(True):
    one = outputs_and_gradients(arrays, weights, ids, **options)
    place = lambda c: {  # noqa: E731
      name: jax.device_put(x, jax.NamedSharding(mesh, spec[name])) for name, x in c.items()
    }
    many = outputs_and_gradients(place(arrays), place(weights), ids, **options)
  assert len(many["y"].sharding.device_set) == 8
  close(many, one, tolerance=rounding(jnp.float64, 2 * case.length))


@pytest.mark.parametrize(
  ("shapes", "options", "text"),
  [
    (((1, 4, 8), (4, 8)), {},
     "short_convolution: x and weight have shapes (1, 4, 8), (4, 8), expected [B, T, D] and "
     "[D, W], a tap in each column; transpose weight where its taps are in rows"),
    (((1, 4, 8), (8, 4)), {"bias": np.zeros(4)},
     "short_convolution: bias has shape (4,), expected (8,), one a channel of x"),
    (((1, 4, 8), (8, 4)), {"activation": "swish"},
     "short_convolution: activation='swish' is unknown; expected None or \"silu\""),
    (((1, 4, 8), (8, 4)), {"state": np.zeros((1, 4, 8), np.float32)},
     "short_convolution: state is float32[1, 4, 8], expected float32[1, 3, 8], that is "
     "[B, W - 1, D] in the dtype of x; cast or make it so"),
    (((1, 4, 8), (8, 4)), {"segment_ids": np.zeros((1, 5), np.int32)},
     "short_convolution: segment_ids is int32[1, 5], expected int32[1, 4], one id a token with 0 "
     "for padding"),
    (((1, 4, 8), (8, 4)), {"implementation": "cuda"},
     "short_convolution: implementation='cuda' is unknown; expected None or one of reference, "
     "xla, tpu, gpu"),
  ],
)  # fmt: skip
def test_errors(shapes, options, text):
  x, weight = (np.zeros(shape, np.float32) for shape in shapes)
  with pytest.raises(ValueError) as error:
    ops.short_convolution(x, weight, **options)
  assert str(error.value) == text
