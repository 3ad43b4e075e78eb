"""The kernels of linear attention and of the delta rule as the compilers of absent chips make
them."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import pytest

from jaxmix import compile_ahead

PROGRAM = """
import functools, glob, importlib, json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

folder, seen = sys.argv[1], set()
TARGETS = {  # each case on two chips or more, each chip with the cases that try most of it
  "v4": ("v4:2x2x1", ("odd", "shared", "delta", "delta_odd", "delta_vector")),
  "v5e": ("v5e:2x2", ("scalar", "vector", "delta")),
  "v5p": ("v5p:2x2x1", ("scalar", "delta")),
  "v6e": ("v6e:2x2", ("scalar", "vector", "odd", "delta", "delta_vector")),
  "tpu7x": ("tpu7x:2x2x1", ("vector", "shared", "delta")),
}
CASES = {  # op; B, T, heads of q, k, v, K, V; dtype; g; packed
  "scalar": ("linear_attention", (1, 512, 2, 2, 2, 128, 128), "bfloat16", "bth", False),
  "vector": ("linear_attention", (1, 256, 1, 1, 1, 128, 128), "bfloat16", "bthk", False),
  "odd": ("linear_attention", (2, 72, 1, 1, 1, 24, 20), "float32", "bth", True),
  "shared": ("linear_attention", (2, 72, 1, 1, 2, 24, 20), "float32", "bthk", True),
  "delta": ("delta_rule", (1, 128, 1, 1, 1, 128, 128), "bfloat16", "bth", False),
  "delta_odd": ("delta_rule", (2, 72, 1, 1, 2, 24, 20), "float32", "", True),
  "delta_vector": ("delta_rule", (1, 128, 1, 1, 1, 128, 128), "bfloat16", "bthk", False),
}

def schedules(op):
  found = glob.glob(f"{folder}/*final_hlo-static-per-bundle-utilization.txt")
  for path in sorted(set(found) - seen):
    seen.add(path)
    found = re.search(f"{op}_(forward|backward)", path)
    if found:
      lines = open(path).read().splitlines()
      head = next(line for line in lines if line.startswith("MXU"))
      column = head.split(", ").index("VSTORE:SPILL")
      rows = lines[lines.index("== UTILIZATION:") + 1 :]
      yield found[1], len(rows), sum(int(row.split()[column]) for row in rows)

for chip, (topology, names) in TARGETS.items():
  mesh = Mesh(topologies.get_topology_desc(topology, platform="tpu").devices[:1], ("x",))
  place = NamedSharding(mesh, PartitionSpec())
  for name in names:
    op, (B, T, Hq, Hk, Hv, K, V), dtype, kind, packed = CASES[name]
    tpu = importlib.import_module(f"pallas_kernels.{op}.tpu")
    shaped = lambda shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    q, k, v, state = (shaped((B, T, Hq, K)), shaped((B, T, Hk, K)), shaped((B, T, Hv, V)),
                      shaped((B, Hv, K, V), "float32"))
    beta = [shaped((B, T, Hv), "float32")] if op == "delta_rule" else []
    g = shaped((B, T, Hv, K)[:len(kind)], "float32") if kind else None
    documents = shaped((B, T), "int32") if packed else None

    def run(rows, state, documents):
      y, last, saved = tpu.forward(
        *rows, state, documents, scale=0.1, dtype=rows[2].dtype, save=True)
      return tpu.backward(*rows, saved, documents, y, last, scale=0.1)

    with jax.set_mesh(mesh):
      info = pltpu.get_tpu_info()
      program = jax.jit(run).lower((q, k, v, *beta, g), state, documents).compile()
    calls = [line for line in program.as_text().splitlines() if "tpu_custom_call" in line]
    kernels = re.findall(f"{op}_(forward|backward)", " ".join(
      line.split(" = ")[0] for line in calls))
    clock = info.bf16_ops_per_second / (2 * info.num_mxus * info.mxu_column_size**2)
    bytes_a_cycle = info.mem_bw_bytes_per_second / clock
    print("RESULT", json.dumps([chip, name, kernels, list(schedules(op)), bytes_a_cycle]),
          flush=True)
"""


@pytest.fixture(scope="module")
def compiled(compile_for_tpus, tmp_path_factory) -> dict:
  """(chip, case) -> directions of the kernels in the program; of each kernel (direction, bundles,
  spills); bytes that HBM moves a cycle."""
  folder = str(tmp_path_factory.mktemp("schedules"))
  found = compile_for_tpus(
    PROGRAM,
    folder,
    JAX_ENABLE_COMPILATION_CACHE="false",  # a program from the cache leaves no schedule
    LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
  )
  return {(chip, name): rest for chip, name, *rest in found}


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_for_tpu(compiled, chip):
  """One kernel a direction, by name, for training shapes, odd ones, and heads that share others."""
  found = {name: kernels for (of_chip, name), (kernels, *_) in compiled.items() if of_chip == chip}
  assert "delta" in found
  for name, kernels in found.items():
    assert sorted(kernels) == ["backward", "forward"], name


# What libtpu 0.0.42.1 makes of the worse of both kernels, and a twentieth more, as in the record.
@pytest.mark.parametrize(
  ("chip", "name", "spills", "slack"),
  [
    ("v5e", "scalar", 0.26, 1.17),
    ("v5p", "scalar", 0.25, 1.5),
    ("v6e", "scalar", 0.42, 0.89),
    ("v5e", "vector", 0.59, 1.7),
    ("v6e", "vector", 0.56, 1.34),
  ],
)
def test_schedule(compiled, chip, name, spills, slack):
  """A step issues no more bundles than HBM needs cycles for its windows, times `slack`; not too
  many of them spill a register."""
  _, schedules, bytes_a_cycle = compiled[chip, name]
  # Windows of q, k, v, y (and dy, dq, dk, dv) in bfloat16, and of g (and dg) in float32.
  tokens, heads, of_g = {"scalar": (512, 2, 0), "vector": (256, 1, 2)}[name]
  for (direction, bundles, spilled), windows in zip(
    sorted(schedules), (7 + 2 * of_g, 4 + of_g), strict=True
  ):
    assert spilled <= spills * bundles, f"{direction}: {spilled} spills in {bundles} bundles"
    cycles = tokens * heads * 128 * 2 * windows / bytes_a_cycle
    assert bundles <= slack * cycles, f"{direction}: {bundles} bundles, HBM {cycles:.0f} cycles"


def every_kernel(calls):
  """Of each op on all of its calls: y, S_T and the gradients, by the GPU kernels themselves."""
  results = []
  for op, rows, state, documents, dy in calls:
    gpu = importlib.import_module(f"pallas_kernels.{op}.gpu")
    scale = rows[0].shape[3] ** -0.5
    y, last, saved = gpu.forward(*rows, state, documents, scale=scale, dtype=dy.dtype, save=True)
    results += [y, gpu.backward(*rows, saved, documents, dy, last, scale=scale)]
  return results


def abstract_call(op: str, name: str, dtype):
  """Arguments of `every_kernel` for a benchmark, with documents."""
  cases = importlib.import_module(f"pallas_kernels.{op}.cases").BENCHMARKS
  case = next(case for case in cases if case.name == name)
  shapes = {**case.shapes(), "dy": case.outputs()["y"]}
  arrays = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32 if name in case.float32 else dtype)
    for name, shape in shapes.items()
  }
  rows = [arrays.get(row) for row in ("q", "k", "v", "beta", "g")]
  if "beta" not in arrays:
    del rows[3]
  documents = jax.ShapeDtypeStruct(shapes["q"][:2], jnp.int32)
  return op, tuple(rows), arrays["state"], documents, arrays["dy"]


FORWARD_AND_BACKWARD = {
  "linear_attention": {"pairs", "forward", "backward_states", "backward_pairs", "backward"},
  "delta_rule": {"pairs", "solve", "forward", "backward_states", "backward_pairs", "backward"},
}
TENSOR_CORES = {
  "a100": "mma.sync",
  "a6000": "mma.sync",
  "rtx4090": "mma.sync",
  "h100": "wgmma",
  "b200": "tcgen05",
}


@pytest.mark.parametrize(
  ("chip", "dtype"),
  [*((chip, jnp.bfloat16) for chip in TENSOR_CORES), ("a6000", jnp.float32)],
  ids=lambda x: x if isinstance(x, str) else jnp.dtype(x).name,
)
def test_gpu_kernels(chip, dtype):
  """At head size 128 no kernel spills a register, all that multiply do it on tensor cores, and a
  multiprocessor has room for one block at least."""
  if (reason := compile_ahead.installed("cuda")) is not None:
    pytest.skip(reason)
  kinds = {
    "linear_attention": ("train", "train_scalar", "train_vector"),
    "delta_rule": ("train_scalar", "train_vector"),
  }
  if dtype == jnp.float32:  # which takes twice as long to compile
    kinds = dict.fromkeys(kinds, ("train_scalar",))
  arguments = [abstract_call(op, name, dtype) for op, names in kinds.items() for name in names]
  names = [op for op, *_ in arguments]

  def program(arrays):
    return every_kernel([(op, *rest) for op, rest in zip(names, arrays, strict=True)])

  kernels = compile_ahead.gpu_kernels(program, ([rest for _, *rest in arguments],), chip)
  expected = {f"{op}_{name}" for op, names in FORWARD_AND_BACKWARD.items() for name in names}
  if dtype == jnp.float32:
    expected.remove("linear_attention_backward_pairs")
  assert {kernel.name for kernel in kernels} == expected
  for kernel in kernels:
    assert kernel.spill_bytes == 0, f"{kernel.name}: {kernel.spill_bytes} bytes spilled"
    assert kernel.tensor_core.get(TENSOR_CORES[chip], 0) > 0, f"{kernel.name}: {kernel.tensor_core}"
    assert kernel.blocks_per_core >= 1, kernel.name
