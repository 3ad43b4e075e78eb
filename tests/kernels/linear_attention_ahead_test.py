"""The TPU kernels of linear attention as the compilers of absent chips make them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

# Runs in a process of its own: libtpu reads its settings once, before jax is imported.
PROGRAM = """
import glob, json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels.linear_attention import tpu

folder, seen = sys.argv[1], set()
TARGETS = {  # each case on two chips or more, each chip with the cases that try most of it
  "v4": ("v4:2x2x1", ("odd", "shared")),
  "v5e": ("v5e:2x2", ("scalar", "vector")),
  "v5p": ("v5p:2x2x1", ("scalar",)),
  "v6e": ("v6e:2x2", ("scalar", "vector", "odd")),
  "tpu7x": ("tpu7x:2x2x1", ("vector", "shared")),
}
CASES = {  # B, T, heads of q, k, v, K, V; dtype; g; packed
  "scalar": ((1, 512, 2, 2, 2, 128, 128), "bfloat16", "bth", False),
  "vector": ((1, 256, 1, 1, 1, 128, 128), "bfloat16", "bthk", False),
  "odd": ((2, 72, 1, 1, 1, 24, 20), "float32", "bth", True),
  "shared": ((2, 72, 1, 1, 2, 24, 20), "float32", "bthk", True),
}

def schedules():
  found = glob.glob(f"{folder}/*final_hlo-static-per-bundle-utilization.txt")
  for path in sorted(set(found) - seen):
    seen.add(path)
    found = re.search("linear_attention_(forward|backward)", path)
    if found:
      lines = open(path).read().splitlines()
      head = next(line for line in lines if line.startswith("MXU"))
      column = head.split(", ").index("VSTORE:SPILL")
      rows = lines[lines.index("== UTILIZATION:") + 1 :]
      yield found[1], len(rows), sum(int(row.split()[column]) for row in rows)

for chip, (topology, names) in TARGETS.items():
  mesh = Mesh(topologies.get_topology_desc(topology, platform="tpu").devices[:1], ("x",))
  place = NamedSharding(mesh, PartitionSpec())
  for name, ((B, T, Hq, Hk, Hv, K, V), dtype, kind, packed) in CASES.items():
    if name not in names:
      continue
    shaped = lambda shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    q, k, v, state = (shaped((B, T, Hq, K)), shaped((B, T, Hk, K)), shaped((B, T, Hv, V)),
                      shaped((B, Hv, K, V), "float32"))
    g = shaped((B, T, Hv, K)[:len(kind)], "float32")
    documents = shaped((B, T), "int32") if packed else None

    def run(q, k, v, g, state, documents):
      y, last, starts = tpu.forward(
        q, k, v, g, state, documents, scale=0.1, dtype=q.dtype, save=True)
      return tpu.backward(q, k, v, g, starts, documents, y, last, scale=0.1)

    with jax.set_mesh(mesh):
      info = pltpu.get_tpu_info()
      program = jax.jit(run).lower(q, k, v, g, state, documents).compile()
    calls = [line for line in program.as_text().splitlines() if "tpu_custom_call" in line]
    kernels = re.findall("linear_attention_(?:forward|backward)", " ".join(
      line.split(" = ")[0] for line in calls))
    clock = info.bf16_ops_per_second / (2 * info.num_mxus * info.mxu_column_size**2)
    bytes_a_cycle = info.mem_bw_bytes_per_second / clock
    print("RESULT", json.dumps([chip, name, kernels, list(schedules()), bytes_a_cycle]), flush=True)
"""


@pytest.fixture(scope="module")
def compiled(repository, tmp_path_factory) -> dict:
  """(chip, case) -> names of the kernels in the program; of each kernel (direction, bundles,
  spills); bytes that HBM moves a cycle."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install 'jaxmix[tpu]' to compile for TPUs from here")
  folder = str(tmp_path_factory.mktemp("schedules"))
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environment |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache leaves no schedule
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
    "PYTHONPATH": str(repository),
  }
  command = [sys.executable, "-c", PROGRAM, folder]
  run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert run.returncode == 0, run.stderr[-4000:]
  found = map(json.loads, re.findall("^RESULT (.*)$", run.stdout, re.MULTILINE))
  return {(chip, name): rest for chip, name, *rest in found}


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_ahead(compiled, chip):
  """One kernel a direction, by name, for training shapes and for odd ones, shared heads too."""
  for name in ("scalar", "vector", "odd", "shared"):
    if (chip, name) in compiled:
      kernels, _, _ = compiled[chip, name]
      assert sorted(kernels) == ["linear_attention_backward", "linear_attention_forward"], name


@pytest.mark.parametrize(
  ("chip", "name", "spills", "slack"),
  [
    ("v5e", "scalar", 0.35, 1.2),
    ("v5p", "scalar", 0.45, 1.5),
    ("v6e", "scalar", 0.45, 1.6),  # bandwidth is double
    ("v5e", "vector", 0.7, 1.8),
    ("v6e", "vector", 0.7, 2.8),
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
