"""The ops with a matrix state, linear_attention and delta_rule: their chunked form against the
definition, in every kind of decay."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops
from jaxmix.ops import chunks
from pallas_kernels.delta_rule.cases import CASES as DELTA_RULE
from pallas_kernels.linear_attention.cases import CASES as LINEAR_ATTENTION

CASES = [
  *(("linear_attention", case) for case in LINEAR_ATTENTION),
  *(("delta_rule", case) for case in DELTA_RULE),
]
NAMED = {(op, case.name): case for op, case in CASES}
OPS = ("linear_attention", "delta_rule")


def names(value) -> str:
  return value if isinstance(value, str) else value.name


def weights_of(case) -> dict[str, np.ndarray]:
  random = np.random.default_rng(5)
  return {name: random.normal(size=shape) for name, shape in case.outputs().items()}


def compare(run, op, case, close, rounding, **options):
  """The chunked form and the reference, both in float64."""
  arrays, ids = (case.inputs(), weights_of(case)), case.segment_ids()
  with jax.enable_x64(True):
    chunked = run(op, *arrays, segment_ids=ids, implementation="xla", **options)
    definition = run(op, *arrays, segment_ids=ids, implementation="reference")
  tolerance = rounding(jnp.float64, 2 * (case.length + case.key_dim + case.value_dim))
  close(chunked, definition, tolerance=tolerance)


@pytest.mark.parametrize(("op", "case"), CASES, ids=names)
def test_definition(op, case, close, rounding, outputs_and_gradients):
  """Values and gradients of every input are those of the recurrence."""
  compare(outputs_and_gradients, op, case, close, rounding)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chunk_size", [1, 13, 1000])
def test_chunk_size(op, chunk_size, close, rounding, outputs_and_gradients):
  """The chunk size changes nothing: one token, several chunks in a document, more than the
  length."""
  compare(outputs_and_gradients, op, NAMED[op, "vector"], close, rounding, chunk_size=chunk_size)


@pytest.mark.parametrize("op", OPS)
def test_spans(op, close, rounding, monkeypatch, outputs_and_gradients):
  """A CPU's spans of a few chunks, the last cut short, hand on state, document and cotangents."""
  case, chunk_size = NAMED[op, "vector"], 32
  heads = case.batch * case.heads
  monkeypatch.setattr(chunks, "CACHED", 2 * heads * chunk_size**2)
  assert case.length % (2 * chunk_size) and case.length > 4 * chunk_size
  compare(outputs_and_gradients, op, case, close, rounding, chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["many_documents", "scalar", "vector"])
def test_precision(op, name, dtype, errors, rounding, outputs_and_gradients):
  """In float32 and bfloat16 the errors against float64 are those of rounding."""
  case = NAMED[op, name]
  inputs, segment_ids = case.inputs(), case.segment_ids()
  inputs = {name: x.astype(dtype if name in "qkv" else np.float32) for name, x in inputs.items()}
  weights = {name: x.astype(np.float32) for name, x in weights_of(case).items()}
  found = {
    implementation: outputs_and_gradients(
      op, inputs, weights, segment_ids=segment_ids, implementation=implementation
    )
    for implementation in ("xla", "reference")
  }
  with jax.enable_x64(True):
    double = lambda tree: jax.tree.map(lambda x: x.astype(np.float64), tree)  # noqa: E731
    exact = outputs_and_gradients(
      op, double(inputs), double(weights), segment_ids=segment_ids, implementation="reference"
    )
  # float32: the sums. bfloat16: the roundings of scores or state, of the cotangent and of the
  # result; with the delta rule, each twice, as its values are differences from what it reads.
  operations = case.length + case.key_dim + case.value_dim
  if dtype != np.float32:
    operations = 8 if op == "delta_rule" else 4
  for implementation, tree in found.items():
    for (path, leaf), expected in zip(
      jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(exact), strict=True
    ):
      rms, largest, worst = errors(leaf, expected)
      assert max(rms, largest) <= rounding(dtype, operations), (
        f"{implementation} {path}: {rms:.1e}, {largest:.1e} at {worst}"
      )
  found = found["xla"]
  assert found["out"]["y"].dtype == dtype and found["out"]["state"].dtype == np.float32
  for name, x in found["gradients"].items():
    assert x.dtype == (dtype if name in "qkv" else np.float32), name


def strong(shape, kind: str) -> np.ndarray:
  """Log-decays at the ends of what is allowed."""
  if kind == "alternating":  # clears, and between that hardly forgets
    g = np.full(shape, -0.1)
    g[:, ::7] = -1e4
    return g
  return np.full(shape, {"none": 0.0, "strong": -80.0, "clears": -1e4}[kind])


@pytest.mark.parametrize("kind", ["none", "strong", "clears", "alternating"])
@pytest.mark.parametrize("name", ["scalar", "vector"])
@pytest.mark.parametrize("op", OPS)
def test_extreme_decays(op, name, kind, rounding, outputs_and_gradients):
  """Decays from none to all, in float32: finite, and right to rounding, gradients too; a token that
  clears the state costs its neighbours no digits."""
  case = NAMED[op, name]
  arrays = {key: x.astype(np.float32) for key, x in case.inputs().items()}
  arrays["g"] = strong(arrays["g"].shape, kind).astype(np.float32)
  weights = {key: x.astype(np.float32) for key, x in weights_of(case).items()}
  found = outputs_and_gradients(op, arrays, weights, implementation="xla")
  with jax.enable_x64(True):
    double = lambda tree: jax.tree.map(lambda x: x.astype(np.float64), tree)  # noqa: E731
    exact = outputs_and_gradients(op, double(arrays), double(weights), implementation="reference")
  # The gradient of g is a difference of numbers as large as the gradients of q and k times q and k.
  of_g = case.key_dim * max(np.abs(exact["gradients"][key] * arrays[key]).max() for key in "qk")
  operations = case.length + case.key_dim + case.value_dim
  for (path, leaf), expected in zip(
    jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(exact), strict=True
  ):
    size = of_g if path[-1].key == "g" else np.abs(expected).max()
    allowed = rounding(jnp.float32, operations) * size + operations * np.finfo(np.float32).tiny
    assert np.abs(np.asarray(leaf, np.float64) - expected).max() <= allowed, path


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op):
  """Length 0 gives no output and hands the state on."""
  case = NAMED[op, "one_token"]
  arrays = {name: jnp.asarray(x, np.float32) for name, x in case.inputs().items()}
  state = arrays.pop("state")
  y, after = getattr(ops, op)(**{name: x[:, :0] for name, x in arrays.items()}, state=state)
  assert y.shape == (2, 0, 2, 8)
  np.testing.assert_array_equal(after, state)


@pytest.mark.parametrize("op", OPS)
def test_padding_of_nan_is_inert(op, outputs_and_gradients):
  """What stands at padding is not read: NaN there reaches neither outputs, state nor gradients."""
  case = NAMED[op, "vector"]
  arrays = {name: x.astype(np.float32) for name, x in case.inputs().items()}
  weights = {name: x.astype(np.float32) for name, x in weights_of(case).items()}
  ids = case.segment_ids()
  for name in arrays.keys() - {"state"}:
    arrays[name][ids == 0] = np.nan
  found = outputs_and_gradients(op, arrays, weights, segment_ids=ids, implementation="xla")
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  assert not np.asarray(found["out"]["y"])[ids == 0].any()


EQUALITIES = {
  # op, its g, and the op and g that it equals
  "a vector of equal decays is a scalar": (("linear_attention", "vector"), "scalar"),
  "also with the delta rule": (("delta_rule", "vector"), "scalar"),
  "a constant is that scalar at every token": (("linear_attention", "scalar"), "constant"),
  "no decay is none": (("linear_attention", "scalar"), None),
  "also with delta": (("delta_rule", "vector"), None),
}


@pytest.mark.parametrize("name", EQUALITIES)
def test_specialisations(name, close, rounding):
  """A general decay that is not used is the special one."""
  (op, kind), special = EQUALITIES[name]
  case = NAMED[op, "scalar"]
  arrays = case.inputs()
  heads = -np.arange(1.0, 1 + case.heads) / 10 if special == "constant" else np.zeros(case.heads)
  of_token = (
    arrays.pop("g")
    if special == "scalar"
    else np.broadcast_to(heads, (case.batch, case.length, case.heads))
  )
  general = of_token
  if kind == "vector":
    general = np.broadcast_to(of_token[..., None], (*of_token.shape, case.key_dim))
  g = {"scalar": of_token, "constant": heads, None: None}[special]
  run = functools.partial(getattr(ops, op), implementation="xla", segment_ids=case.segment_ids())
  arrays.pop("g", None)
  with jax.enable_x64(True):
    found, expected = jax.jit(lambda a, b: (run(**arrays, g=a), run(**arrays, g=b)))(general, g)
  close(found, expected, tolerance=rounding(jnp.float64, case.length + case.key_dim))


@pytest.mark.parametrize(
  ("op", "shapes", "text"),
  [
    ("linear_attention", {"k": (1, 4, 2, 7)},
     "q, k, v have shapes (1, 4, 2, 8), (1, 4, 2, 7), (1, 4, 2, 8), expected [B, T, heads, K], "
     "[B, T, heads, K], [B, T, heads, V]; give all three the same B and T, and q and k the same K"),
    ("linear_attention", {"q": (1, 4, 3, 8)},
     "q, k, v have 3, 2, 2 heads, expected two numbers at most, one a multiple of the other, so "
     "that neighbours share a head; repeat the heads of one of them"),
    ("delta_rule", {"g": (1, 4, 8)},
     "g has shape (1, 4, 8), expected (2,), (1, 4, 2) or (1, 4, 2, 8): one log-decay a head, a "
     "token and head, or a token, head and key channel"),
    ("delta_rule", {"beta": (1, 4, 1)},
     "beta has shape (1, 4, 1), expected (1, 4, 2), one write strength a token and head of the "
     "state"),
    ("delta_rule", {"state": (1, 2, 8, 9)},
     "state has shape (1, 2, 8, 9), expected (1, 2, 8, 8), that is [B, H, K, V]"),
    ("delta_rule", {"segment_ids": (1, 5)},
     "segment_ids is float32[1, 5], expected int32[1, 4], one id a token with 0 for padding"),
  ],
)  # fmt: skip
def test_errors(op, shapes, text):
  arrays = dict.fromkeys("qkv", (1, 4, 2, 8))
  if op == "delta_rule":
    arrays["beta"] = (1, 4, 2)
  arrays = {name: np.zeros(shape, np.float32) for name, shape in (arrays | shapes).items()}
  with pytest.raises(ValueError) as error:
    getattr(ops, op)(**arrays)
  assert str(error.value) == f"{op}: {text}"
