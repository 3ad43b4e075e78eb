"""Monarch matrices: against published programs, against their dense form, and projections onto
them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ops

TOLERANCE = 1e-10  # that of the golden folder for float64


@pytest.fixture(scope="module")
def cases(golden):
  """(file, case) -> its arrays by name."""
  files = {name: np.load(golden / "monarch" / f"{name}.npz") for name in FILES}

  def load(file: str, case: str) -> dict[str, np.ndarray]:
    names = [key for key in files[file].files if key.startswith(f"{case}/")]
    return {key.removeprefix(f"{case}/"): files[file][key] for key in names}

  return load


FILES = ("blockdiag", "fftconv", "monarch", "projection")


def factors_of(data) -> tuple[np.ndarray, ...]:
  names = ("w1", "w2") if "w1" in data else ("L", "R")
  if names[0] not in data:
    names = tuple(f"factor{s}" for s in range(1, len(data["radices"]) + 1))
  return tuple(data[name] for name in names)


@pytest.mark.parametrize("case", ["multiply0", "multiply1", "multiply2"])
def test_golden_block_diagonal(case, cases, float64, close):
  data = cases("blockdiag", case)
  y, pull = jax.vjp(ops.block_diagonal_multiply, data["x"], data["w"])
  dense = ops.block_diagonal_multiply(jnp.eye(data["x"].shape[-1]), data["w"]).T
  expected = (data["y"], (data["dx"], data["dw"]), data["dense"])
  close((y, pull(data["dy"]), dense), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("case", [
  "butterfly0", "butterfly1", "butterfly2", "butterfly3", "m2_monarch0", "m2_monarch1",
  "orderp0", "orderp1", "orderp2", "orderp3", "orderp4",
])  # fmt: skip
def test_golden(case, cases, float64, close):
  """Values, gradients and the dense matrix: two factors, square and not; more; mixed radices."""
  data = cases("monarch", case)
  factors, leading = factors_of(data), not case.startswith("butterfly")

  def run(x, factors):
    return ops.monarch_multiply(x, factors, leading_permutation=leading)

  y, pull = jax.vjp(run, data["x"], factors)
  dx, dfactors = pull(data["dy"])
  names = {"butterfly": "dw{}", "orderp": "dfactor{}"}.get(case.rstrip("0123456789"))
  gradients = (
    [data["dL"], data["dR"]]
    if names is None
    else [data[names.format(s)] for s in range(1, len(factors) + 1)]
  )
  dense = ops.monarch_to_dense(factors, leading_permutation=leading)
  expected = (data["y"], data["dx"], gradients, data["dense"])
  close((y, dx, list(dfactors), dense), expected, tolerance=TOLERANCE)


def test_golden_complex(cases, float64, close):
  data = cases("monarch", "butterfly_complex")

  def run(x, *factors):
    return ops.monarch_multiply(x, factors, leading_permutation=False)

  y, pull = jax.vjp(run, data["x"], data["w1"], data["w2"])
  # The file's gradients are of the other convention: conjugates of ours, for a conjugate cotangent.
  gradients = [jnp.conj(d) for d in pull(np.conj(data["dy"]))]
  names = ("dx_torchconv", "dw1_torchconv", "dw2_torchconv")
  close((y, gradients), (data["y"], [data[name] for name in names]), tolerance=TOLERANCE)


@pytest.mark.parametrize("radices", [(3, 3, 3), (2, 3, 4), (4, 6), (2, 2, 2, 2), (7,)])
def test_fourier(radices, float64, close, cases):
  x = np.random.default_rng(0).normal(size=(2, np.prod(radices))).astype(complex)
  factors = ops.fourier_factors(radices)
  y = ops.monarch_multiply(x, factors, leading_permutation=True)
  close(y, np.fft.fft(x), tolerance=1e-13)
  for case in ("orderp0", "orderp1", "orderp2", "orderp3", "orderp4"):
    stored = cases("monarch", f"{case}_dft")
    if tuple(stored["radices"]) == radices:
      close(factors, factors_of(stored), tolerance=1e-13)


@pytest.mark.parametrize("case", ["circular0", "circular1", "circular2", "circular3", "order3"])
def test_golden_convolution(case, cases, float64, close):
  """One Monarch map is a transform; two, with the product of spectra between them, a circular
  convolution."""
  data = cases("fftconv", case)
  radices = tuple(data["radices"]) if "radices" in data else (int(data["N1"]), int(data["N2"]))
  factors = ops.fourier_factors(radices)

  def transform(x):
    return ops.monarch_multiply(jnp.asarray(x, complex), factors, leading_permutation=True)

  product = transform(data["x"]) * transform(data["k"])
  y = jnp.conj(transform(jnp.conj(product))) / product.shape[-1]
  close(y.real, data["y"], tolerance=TOLERANCE)


@pytest.mark.parametrize("case", ["circular0", "circular1"])
def test_golden_convolution_by_stages(case, cases, float64, close):
  """Each factor of the transform, and of that back, as published kernels have them beside: the
  second with the twiddles of both in it."""
  data = cases("fftconv", case)
  x, first, last = data["x"], *ops.fourier_factors((int(data["N1"]), int(data["N2"])))
  columns = x.reshape(data["A"].shape).swapaxes(-1, -2).reshape(x.shape)

  def stage(x, factor):
    return ops.block_diagonal_multiply(jnp.asarray(x, complex).reshape(data["x"].shape), factor)

  found = {
    "A": stage(columns, first).reshape(columns.shape[:-1] + first.shape[:2]).swapaxes(-1, -2),
    "Y": stage(data["A"], last).reshape(data["Y"].shape) / x.shape[-1],
    "Btw": stage(data["Z"], last.conj().swapaxes(1, 2)).reshape(data["Btw"].shape),
  }
  close(found, {name: data[name] for name in found}, tolerance=TOLERANCE)


@pytest.mark.parametrize(
  ("case", "between"),
  [("m2_generic_layer_id", jnp.asarray), ("m2_generic_layer_relu", jax.nn.relu)],
)
def test_golden_layer(case, between, cases, float64, close):
  """The layer that the paper writes down, of four Monarch maps, two along the length and two along
  the channels: values and every gradient."""
  data = cases("monarch", case)

  def parameters(kind):
    return {key.removeprefix(kind): x for key, x in data.items() if key.startswith(kind)}

  def run(x, p):
    def multiply(number, x):
      factors = p[f"m{number}.L"], p[f"m{number}.R"]
      return ops.monarch_multiply(x, factors, leading_permutation=True)

    mixed = multiply(2, between(p["n_kernel"] * multiply(1, x.swapaxes(1, 2)))).swapaxes(1, 2)
    y = multiply(4, jax.nn.relu(p["d_kernel"] * multiply(3, mixed))) + mixed
    y = jax.nn.standardize(y, epsilon=1e-5) * p["ln.weight"] + p["ln.bias"]
    return y, mixed

  (y, mixed), pull = jax.vjp(run, data["x"], parameters("param/"))
  expected = data["y"], data["x_tilde"], (data["dx"], parameters("grad/"))
  close((y, mixed, pull((data["dy"], jnp.zeros_like(mixed)))), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("radices", [(4, 6), (2, 3, 4)])
def test_leading_permutation(radices, float64, close):
  """Without it, the digits of the input stand in the order of those of the output."""
  random, total = np.random.default_rng(1), np.prod(radices)
  factors = [random.normal(size=(total // radix, radix, radix)) for radix in radices]
  x = random.normal(size=(5, total))
  reversed_digits = np.arange(total).reshape(radices).T.reshape(-1)
  natural = ops.monarch_multiply(x, factors, leading_permutation=True)
  permuted = ops.monarch_multiply(x[:, reversed_digits], factors, leading_permutation=False)
  close(permuted, natural, tolerance=1e-14)


@pytest.mark.parametrize("case", ["square0", "square1", "square2", "square3"])
def test_golden_projection(case, cases, float64, close):
  """Of noise, of a Monarch matrix, and of one with noise."""
  shapes = [tuple(cases("projection", case)[f"{w}_shape"]) for w in ("w1", "w2")]
  for kind in ("", "_exact", "_noisy"):
    data = cases("projection", case + kind)
    factors = ops.project_to_monarch(data["M"], blocks=(shapes[0][0], shapes[1][0]))
    assert [factor.shape for factor in factors] == shapes
    found = ops.monarch_to_dense(factors, leading_permutation=False)
    close(found, data.get("reconstruction", data["M"]), tolerance=1e-9)


@pytest.mark.parametrize("case", ["rect0", "rect1", "rank0", "rank1"])
def test_golden_projection_by_blocks(case, cases, float64, close):
  data = cases("projection", case)
  factors = ops.project_to_monarch(
    data["M"],
    blocks=(int(data["nblocks1"]), int(data["nblocks2"])),
    rank=int(data.get("rank", 1)),
  )
  assert [list(factor.shape) for factor in factors] == [[*data["w1_shape"]], [*data["w2_shape"]]]
  found = ops.monarch_to_dense(factors, leading_permutation=False)
  close(found, data["reconstruction"], tolerance=1e-9)
  error = np.linalg.norm(found - data["M"]) / np.linalg.norm(data["M"])
  np.testing.assert_allclose(error, data["rel_fro_err"], rtol=1e-4)


def test_golden_projection_of_row_groups(cases, float64, close):
  """Blocks of low rank whose rows stand in groups of b2 are those of a matrix reordered."""
  data = cases("projection", "blockrank0")
  dense, blocks = data["M"], int(data["nblocks2"])
  rows = np.arange(len(dense)).reshape(-1, blocks, int(data["b2"])).swapaxes(1, 2).reshape(-1)
  factors = ops.project_to_monarch(
    dense[rows], blocks=(int(data["nblocks1"]), blocks), rank=int(data["b1"])
  )
  found = ops.monarch_to_dense(factors, leading_permutation=False)
  close(found, data["reconstruction"][rows], tolerance=1e-9)


def test_golden_projection_of_fourier(cases, float64, close):
  """The Fourier transform, its columns in the order that the form expects, is recovered, and that
  back."""
  for case in ("fft0", "fft1", "fft2", "ifft0", "ifft1", "ifft2"):
    data = cases("projection", case)
    n, permutation = int(data["n"]), data["perm"]
    transform = np.fft.ifft if case.startswith("ifft") else np.fft.fft
    dense = transform(np.eye(n), norm="ortho")[:, permutation]
    factors = ops.project_to_monarch(dense)
    y = ops.monarch_multiply(
      jnp.asarray(data["x"])[:, permutation].astype(complex), factors, leading_permutation=False
    )
    close(y, data["y"].astype(complex), tolerance=1e-6)  # stored as complex64


def test_full_rank_is_exact(float64, close):
  dense = np.random.default_rng(2).normal(size=(12, 20))
  factors = ops.project_to_monarch(dense, blocks=(4, 3), rank=4)
  close(ops.monarch_to_dense(factors, leading_permutation=False), dense, tolerance=1e-13)


def test_bfloat16_sums_are_float32(close):
  """4,096 equal terms: a bfloat16 sum would stop at 256."""
  x, weight = jnp.ones((1, 8192), jnp.bfloat16), jnp.ones((2, 3, 4096), jnp.float32)
  y = ops.block_diagonal_multiply(x, weight)
  assert y.dtype == jnp.bfloat16
  assert (y == 4096).all()


def test_errors():
  def multiply(*shapes, x=24, leading_permutation=True):
    factors = [jnp.zeros(shape) for shape in shapes]
    ops.monarch_multiply(jnp.zeros((2, x)), factors, leading_permutation=leading_permutation)

  with pytest.raises(ValueError, match=r"24 channels .* expected .* K q = L r"):
    multiply((4, 6, 6), (5, 2, 4))
  with pytest.raises(ValueError, match="and 27 channels of x"):
    multiply((9, 3, 3), (9, 3, 3), (9, 3, 3))
  with pytest.raises(ValueError, match=r"factors\[1\] has shape \(3, 3\)"):
    multiply((9, 3, 3), (3, 3))
  with pytest.raises(ValueError, match=r"expected \[\.\.\., 12\]"):
    ops.block_diagonal_multiply(jnp.zeros((2, 10)), jnp.zeros((3, 4, 4)))
  with pytest.raises(ValueError, match="expected the first to divide 16 and the second 24"):
    ops.project_to_monarch(jnp.zeros((24, 16)), blocks=(5, 4))
  with pytest.raises(ValueError, match=r"give blocks=\(K, L\)"):
    ops.project_to_monarch(jnp.zeros((24, 16)))
  with pytest.raises(ValueError, match="rank=7, expected 1 to 4"):
    ops.project_to_monarch(jnp.zeros((24, 16)), blocks=(4, 4), rank=7)
