"""The kernels of the long convolution: their values in interpret mode, where programs hold them,
and what compilers make of them for absent chips."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmix import compile_ahead, ops, sharding
from pallas_kernels.long_convolution import folded, fourier, gpu, tpu
from pallas_kernels.long_convolution.cases import LONG_PACKED, Case

CASES = {
  case.name: case
  for case in (
    Case("causal", 3, 300, 130),
    Case("full", 2, 512, 128, full=True),
    Case("one_token", 1, 1, 2, full=True),
    Case("groups", 5, 300, 130, full=True),
    Case("folded", 3, 1300, 6, taps=700),
    Case("folded_full", 2, 1030, 5, full=True),
    Case("packed", 2, 88, 3, segments=LONG_PACKED),
    Case("mesh", 4, 88, 4, segments=2 * LONG_PACKED),  # for 4 devices by 2
    Case("packed_full", 2, 88, 3, taps=120, full=True, segments=LONG_PACKED),
  )
}
ROWS = ("u", "pre_gate", "post_gate")
# Three products of bfloat16 parts leave out low x low, 2^-16 of a value at most.
UNITS = {"float32": 1, "bfloat16": 2 ** (24 - 16)}


@functools.partial(jax.jit, static_argnames="implementation")
def by_op(arrays, dy, segment_ids, *, implementation):
  """y, and the gradients with respect to every array."""

  def run(arrays):
    return ops.long_convolution(**arrays, segment_ids=segment_ids, implementation=implementation)[0]

  y, pull = jax.vjp(run, arrays)
  return {"y": y, **pull(dy)[0]}


@pytest.fixture
def interpreted(monkeypatch):
  """The op's kernels run their programs on the CPU: on TPU with memory for 512 tokens of every
  dtype, and for folded rows of one pair; on GPU for groups of few rows."""
  monkeypatch.setattr(folded, "SMALLEST_VMEM", 24 * 2**20)
  monkeypatch.setattr(folded, "GROUP_BYTES", 2**17)
  monkeypatch.setattr(gpu, "GROUP_BYTES", 2**20)
  monkeypatch.setattr(tpu, "BESIDE", 2)  # which compiles faster
  monkeypatch.setattr(tpu, "UNROLLED", 1)
  both = ("forward", "backward")
  for kernels, names in ((gpu, both), (tpu, both), (folded, ("fold", "unfold"))):
    for name in names:
      monkeypatch.setattr(kernels, name, functools.partial(getattr(kernels, name), interpret=True))


def inputs_of(case, dtype):
  """The arrays of a case, and a cotangent of y; NaN at padding."""
  arrays, ids = case.inputs(), case.segment_ids()
  dy = case.inputs(seed=1)["u"]
  if ids is not None:
    for name in ROWS:
      arrays[name][ids == 0] = np.nan
    dy[ids == 0] = 0
  cast = {name: np.asarray(x, dtype if name in ROWS else np.float32) for name, x in arrays.items()}
  return cast, np.asarray(dy, dtype)


@pytest.mark.parametrize(
  ("implementation", "name", "dtype", "without"),
  [
    ("tpu", "causal", np.float32, ()),
    ("tpu", "causal", jnp.bfloat16, ("skip", "post_gate")),
    ("tpu", "full", np.float32, ("pre_gate",)),
    ("tpu", "folded", np.float32, ()),
    ("tpu", "folded_full", jnp.bfloat16, ()),
    ("tpu", "folded_full", np.float32, ("pre_gate",)),
    ("tpu", "folded", np.float32, ("pre_gate", "post_gate", "skip")),
    ("tpu", "packed", np.float32, ()),
    ("tpu", "packed_full", jnp.bfloat16, ()),
    ("gpu", "one_token", np.float32, ()),
    ("gpu", "causal", jnp.bfloat16, ("skip", "post_gate")),
    ("gpu", "groups", np.float32, ("pre_gate",)),
    ("gpu", "folded", np.float32, ()),
  ],
)
def test_definition(implementation, name, dtype, without, interpreted, no_worse):
  """In interpret mode the kernels are as near to the definition in float64 as the form by XLA's
  transforms is, within a factor of two; what stands at padding is inert."""
  case = CASES[name]
  arrays, dy = inputs_of(case, dtype)
  arrays = {name: x for name, x in arrays.items() if name not in without}
  run = functools.partial(by_op, segment_ids=case.segment_ids())
  found, by_xla = (run(arrays, dy, implementation=each) for each in (implementation, "xla"))
  with jax.enable_x64(True):
    double = lambda x: np.nan_to_num(np.asarray(x, np.float64))  # noqa: E731
    exact = run(*jax.tree.map(double, (arrays, dy)), implementation="xla")
  no_worse(found, by_xla, exact, name, units=UNITS[jnp.dtype(dtype).name])


@pytest.mark.parametrize("case", ["circular1", "circular3", "order3", "pack_two_reals"])
def test_golden(case, golden, interpreted, no_worse):
  """Circular rows of public programs, in one block and in two, in pairs and alone."""
  data = np.load(golden / "monarch" / "fftconv.npz")
  if case == "pack_two_reals":
    x, y = (np.stack([data[f"{case}/{of}{row}"] for row in "ab"]) for of in ("", "conv_"))
    x, y = x[..., None], y[..., None]
  else:
    x, y = (data[f"{case}/{name}"].swapaxes(1, 2) for name in ("x", "y"))
  k = np.atleast_2d(data[f"{case}/k"])
  arrays = {"u": x, "kernel": k, "reverse_kernel": k[:, ::-1]}  # around the end of the row
  arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
  found, by_xla = (
    {"y": ops.long_convolution(**arrays, implementation=name)[0]} for name in ("tpu", "xla")
  )
  no_worse(found, by_xla, {"y": y}, case)


@pytest.mark.parametrize("case", ["circular0", "circular1"])
def test_golden_spectrum(case, golden, close, rounding):
  """Of the filters in the order [k1, k2] that public kernels have, at their two sizes; and of rows,
  which those divide by the length."""
  data = np.load(golden / "monarch" / "fftconv.npz")
  rows, columns = (int(data[f"{case}/{name}"]) for name in ("N1", "N2"))
  sizes = tpu.Sizes(rows // 2, columns, parts=3)
  x, k, spectra, filters = (data[f"{case}/{name}"] for name in ("x", "k", "Y", "kperm"))

  def spectrum(c):
    (parts,) = np.asarray(tpu.spectrum(c.astype(np.float32), sizes), np.float64)
    return np.moveaxis(parts[:, :columns] + 1j * parts[:, columns:], -1, 0)

  found = (spectrum(x.reshape(-1, sizes.points)) / sizes.points, spectrum(k))
  expected = (spectra.reshape(-1, rows, columns), filters)
  close(found, expected, tolerance=rounding(jnp.float32, rows + columns))


def test_only_what_is_there_is_read(close, rounding):
  """The kernels read nothing outside their arrays and nothing that is not written before: NaN there
  reaches no value."""
  case = CASES["causal"]
  arrays, dy = inputs_of(case, np.float32)
  sizes = tpu.Sizes.of(case.length, np.float32)
  c = jnp.pad(arrays["kernel"], ((0, 0), (0, sizes.points - case.length)))
  rows = [arrays[name] for name in ROWS]

  @functools.partial(jax.jit, static_argnames="interpret")
  def run(rows, skip, dy, interpret):
    u, *gates = rows
    given = (u, tpu.spectrum(c, sizes), skip, *gates)
    y = tpu.forward(*given, sizes, interpret=interpret)
    return y, tpu.backward(*given, dy, sizes, interpret=interpret)

  strict = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
  found, expected = (run(rows, arrays["skip"], dy, interpret) for interpret in (strict, True))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  close(found, expected, tolerance=rounding(jnp.float32, sizes.points))  # sums in another order


@pytest.mark.parametrize(("parts", "least", "most"), [(1, 1e-3, 1e-2), (2, 0, 1e-5), (3, 0, 1e-6)])
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_causality(implementation, parts, least, most, interpreted, monkeypatch):
  """What later inputs change of earlier outputs, of their largest, by the parts of operands: in one
  it would be seen, which is why there are two at least."""
  assert min(fourier.PARTS.values()) == 2
  monkeypatch.setitem(fourier.PARTS, "float32", parts)
  arrays = Case("row", 2, 512, 128).inputs()
  u, kernel = (arrays[name].astype(np.float32) for name in ("u", "kernel"))
  changed = np.where(np.arange(512)[:, None] < 256, u, -u)

  def run(u):
    return np.asarray(ops.long_convolution(u, kernel, implementation=implementation)[0])

  before, after = run(u), run(changed)
  leak = np.abs(before - after)[:, :256].max() / np.abs(after).max()
  assert least <= leak <= most


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_op_on_a_mesh(implementation, interpreted, close, rounding):
  """The op by its kernels, with batch and channels cut over 8 devices, is the form by transforms on
  one."""
  case = CASES["mesh"]
  (arrays, dy), ids = inputs_of(case, np.float32), case.segment_ids()
  expected = by_op(arrays, dy, ids, implementation="xla")
  with jax.set_mesh(sharding.make_mesh(data=4, tensor=2)):
    found = by_op(arrays, dy, ids, implementation=implementation)
  close(found, expected, tolerance=rounding(jnp.float32, 4 * case.length))
  assert tuple(found["y"].sharding.spec) == ("data", None, "tensor")


@pytest.mark.parametrize(("platform", "holds"), [("tpu", True), ("cuda", False), ("cpu", False)])
def test_chosen_when_lowered(platform, holds):
  """implementation=None gives the kernels to programs lowered for TPU, and none to others: those
  for GPU run when they are named."""
  u, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 256, 128), (128, 256)))

  def loss(u, kernel):
    return ops.long_convolution(u, kernel)[0].sum()

  traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(u, kernel)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("long_convolution_forward" in text) == holds
  assert ("long_convolution_backward" in text) == holds
  assert "long_convolution_filter" not in text


def test_refusals():
  """A call that the kernels do not take is left to the form by transforms unless they are
  demanded."""

  def run(u, kernel, implementation=None, **arrays):
    return ops.long_convolution(u, kernel, implementation=implementation, **arrays)

  def shaped(length, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, length, 8), (8, length))]

  (line,) = ops.explain_implementation(run, *shaped(64))
  assert "elsewhere -> xla" in line and "tpu: length 64 is not above 64" in line
  assert "gpu: not yet timed against XLA on a GPU; it runs when named" in line
  state = jax.eval_shape(lambda: ops.convolution_state(1, 128, 8))
  gate = jax.ShapeDtypeStruct((1, 128, 8), jnp.bfloat16)
  for arrays, more, text in (
    (shaped(128, jnp.float16), {}, "u is float16"),
    (shaped(128), {"pre_gate": gate}, "a gate is bfloat16 and u float32"),
    (shaped(128), {"state": state}, "the state of a stream comes before the row"),
  ):
    for name in ("tpu", "gpu"):
      with pytest.raises(ValueError, match=text):
        jax.eval_shape(functools.partial(run, implementation=name), *arrays, **more)


def compiled(
  chip: str, shape, dtype, *, implementation=None, packed=False, schedule="kernels"
) -> compile_ahead.Report:
  """The op forward and backward on rows of a shape, compiled for a chip."""
  reason = compile_ahead.installed(compile_ahead.target(chip).platform)
  if reason is not None:
    pytest.skip(reason)

  def program(u, kernel, gate, dy, segment_ids):
    def run(u, kernel, gate):
      options = {"pre_gate": gate, "post_gate": gate, "segment_ids": segment_ids}
      return ops.long_convolution(u, kernel, **options, implementation=implementation)[0]

    y, pull = jax.vjp(run, u, kernel, gate)
    return y, pull(dy)

  rows = jax.ShapeDtypeStruct(shape, dtype)
  ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32) if packed else None
  kernel = jax.ShapeDtypeStruct(shape[:0:-1], jnp.float32)
  return compile_ahead.report(program, (rows, kernel, rows, rows, ids), chip, schedule=schedule)


def test_schedule():
  """On v5e the kernels of folded rows stay near the limit of their products, and folding at that of
  HBM. Rows that are not folded stand in the record of schedules."""
  schedule = compiled("v5e", (2, 32768, 128), jnp.bfloat16).schedule
  ratios = {"fold": 1.01, "forward": 1.1, "backward": 1.15, "unfold": 1.01}
  for name, ratio in ratios.items():
    piece = schedule.kernel(f"long_convolution_{name}")
    assert piece.ratio <= ratio, f"{name}: {piece.ratio:.2f}"


@pytest.mark.parametrize(
  ("chip", "dtype", "folds"),
  [("v4", jnp.bfloat16, True), ("v4", jnp.float32, True), ("v5e", jnp.float32, False)],
)
def test_odd_shapes_compile(chip, dtype, folds):
  """Packed rows that fill neither what is convolved nor the channels of a call: on the chip with
  the least memory, where they are folded, and on one where they are not."""
  report = compiled(chip, (3, 700, 130), dtype, packed=True, schedule=None)
  names = ("forward", "backward", *(("fold", "unfold") if folds else ()))
  assert report.pallas_kernels.keys() == {f"long_convolution_{name}" for name in names}


def test_sizes():
  """Rows of any length up to 32,768 fit on the chips with the least and the most memory, and no
  convolution of them wraps around; where rows fit whole they are not folded."""
  for length in (1, 65, 513, 1023, 4096, 5000, 8192, 20_001, 32_768):
    for dtype in ("bfloat16", "float32"):
      for vmem in (2**24, 2**26, 2**27):
        for gates in range(3):
          both = folded.Sizes.of(length, dtype, gates, vmem)
          for sizes, backward in zip(both, (False, True), strict=True):
            assert sizes.points >= 2 * length
            assert sizes.residues == 1 or sizes.tokens <= folded.LONGEST_FOLDED
            itemsize = 4 if sizes.residues > 1 else jnp.dtype(dtype).itemsize
            assert tpu.vmem_bytes(sizes, itemsize, gates, backward=backward) <= vmem * 3 // 4
  assert [s.residues for s in folded.Sizes.of(4096, "bfloat16", 2, 2**27)] == [1, 1]
  assert [s.residues for s in folded.Sizes.of(8192, "bfloat16", 2, 2**27)] == [1, 4]


@pytest.mark.parametrize(
  ("chip", "shape", "dtype"),
  [
    ("a100", (64, 1024, 768), jnp.bfloat16),
    ("h100", (64, 4096, 768), jnp.bfloat16),
    ("a6000", (3, 5000, 130), jnp.float32),
  ],
)
def test_gpu_kernels(chip, shape, dtype):
  """Short rows, long ones and odd ones: no kernel spills a register, all multiply on tensor cores,
  and a multiprocessor has room for one block at least. Memory holds the spectra of filters, of
  their gradient and of a group of rows, not those of all rows."""
  report = compiled(chip, shape, dtype, implementation="gpu")
  of_filters = 8 * gpu.Sizes.of(shape[1]).points * shape[2]
  of_gate = math.prod(shape) * jnp.dtype(dtype).itemsize  # it is both gates: gradients are added
  assert report.memory.temporaries <= 2 * gpu.GROUP_BYTES + 4 * of_filters + of_gate
  kernels = report.gpu_kernels
  names = ("transform", "transform_back", "filter", "filter_backward")
  assert {kernel.name for kernel in kernels} == {f"long_convolution_{name}" for name in names}
  for kernel in kernels:
    assert kernel.spill_bytes == 0, f"{kernel.name}: {kernel.spill_bytes} bytes spilled"
    assert sum(kernel.tensor_core.values()) > 0, kernel.name
    assert kernel.blocks_per_core >= 1, kernel.name
  # What launches read and write is of their groups: rows 6 times forward and 14 backward, A 4 and 8
  # times, spectra once and thrice for each group of rows.
  if chip != "a6000":  # whose groups are not whole
    sizes, u = gpu.Sizes.of(shape[1]), jax.ShapeDtypeStruct(shape, dtype)
    (_, once), (_, thrice) = (gpu.Plan.of(u, sizes, count).groups for count in (1, 2))
    whole = 20 * of_gate + (12 * shape[0] // 2 + once + 3 * thrice) * of_filters
    assert sum(kernel.runs * kernel.hbm_bytes for kernel in kernels) == whole
  if chip == "h100":  # whose matrices of 64 rows are for its own instruction
    assert any("wgmma" in kernel.tensor_core for kernel in kernels)
