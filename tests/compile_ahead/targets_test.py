"""Names of machines, the figures of their devices against the compilers and one another."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import types

import pytest

from jaxmix.compile_ahead.compilers import environment, installed
from jaxmix.compile_ahead.targets import CHIPS, target
from jaxmix.training.metrics import peak_flops

TPUS = {"v4": "2x2x4", "v5e": "4x8", "v5p": "2x2x2", "v6e": "2x4", "tpu7x": "2x2x1"}
GPUS = tuple(chip for chip in CHIPS if chip not in TPUS)

# Runs in a process of its own: libtpu takes no part in any other test.
PROGRAM = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jaxmix.compile_ahead.targets import target
from jaxmix.sharding import make_mesh

found = {}
for name in sys.argv[1:]:
  devices = target(name).devices()
  found[name] = {
    "devices": len(devices),
    "hosts": len({device.process_index for device in devices}),
    "ids": [device.id for device in devices],
    "kind": devices[0].device_kind,
  }
  if target(name).slices > 1:
    mesh = make_mesh(data=1, fsdp=-1, slices=2, devices=devices[::-1])
    found[name]["mesh"] = [[x.slice_index for x in row.flat] for row in mesh.devices]
  if target(name).platform == "tpu" and ":" not in name:
    mesh = jax.make_mesh((len(devices),), ("device",), devices=devices)
    whole = NamedSharding(mesh, jax.P())
    too_large = jax.ShapeDtypeStruct((2**17, 2**17), jnp.float32, sharding=whole)  # 64 GiB
    with jax.set_mesh(mesh):
      info = dataclasses.asdict(pltpu.get_tpu_info())
      found[name]["info"] = {key: info[key] for key in info if isinstance(info[key], int)}
      try:
        jax.jit(lambda x: x + 1).lower(too_large).compile()
      except jax.errors.JaxRuntimeError as error:
        found[name]["refusal"] = str(error)
print("RESULT", json.dumps(found))
"""


def run_program(repository, *names: str) -> dict[str, dict]:
  platform = "tpu" if names[0].startswith(("v", "tpu")) else "cuda"
  command = [sys.executable, "-c", PROGRAM, *names]
  run = subprocess.run(
    command, env=environment(platform), capture_output=True, text=True, timeout=300
  )
  assert run.returncode == 0, run.stderr[-4000:]
  return json.loads(re.search("^RESULT (.*)$", run.stdout, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def tpus(repository) -> dict[str, dict]:
  """Name -> what the TPU compiler says of that target: a slice and a single chip of each kind."""
  if (reason := installed("tpu")) is not None:
    pytest.skip(reason)
  slices = (f"{chip}:{shape}" for chip, shape in TPUS.items())
  return run_program(repository, *TPUS, *slices, "v6e:2x2:2")


@pytest.fixture(scope="module")
def gpus(repository) -> dict[str, dict]:
  """Name -> what the GPU compiler says of that target."""
  if (reason := installed("cuda")) is not None:
    pytest.skip(reason)
  return run_program(repository, *GPUS, "h100:8", "h100:4x8")


@pytest.mark.parametrize(
  ("name", "topology", "devices", "hosts"),
  [
    ("v5e:16x16", "16x16", 256, 64),
    ("v5e", "1x1", 1, 1),
    ("v6e:8x8", "8x8", 64, 16),
    ("v4:2x2x4", "2x2x4", 16, 4),
    ("v5p:4x4x4", "4x4x4", 64, 16),
    ("tpu7x:4x4x4", "4x4x4", 128, 16),
    ("tpu7x", "1x1x1", 2, 1),
    ("v5e:4x4:3", "4x4", 48, 12),
    ("h100:8", "1x1x8", 8, 1),
    ("h100:4x8", "1x4x8", 32, 4),
    ("a6000", "1x1x1", 1, 1),
  ],
)
def test_a_name_says_devices_and_hosts(name, topology, devices, hosts):
  found = target(name)
  assert (found.name, found.chip) == (name, name.split(":")[0])
  assert (found.topology, found.device_count, found.hosts) == (topology, devices, hosts)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5x:4x4", "names no machine known here .* v4, v5e, .* h100, .* did you mean v5p, or"),
    ("V5E:4x4", "did you mean v5e, or v5e:4x4"),
    ("h1000:8", "did you mean h100, or h100:8"),
    ("v5e-256", "expected CHIP or CHIP:TOPOLOGY"),
    ("v5e:0x4", "expected CHIP or CHIP:TOPOLOGY"),
    ("banana", "with a chip of v4, .* write v5e, or v5e:4x4"),
    ("v5e:2x2x2", "no v5e slice of 2x2x2 — expected 1x1, or AxB .* write v5e:4x4"),
    ("v4:4x4", "no v4 slice of 4x4 — expected 1x1x1, or AxBxC .* write v4:4x4x4"),
    ("v5e:3x4", "no v5e slice of 3x4 — .* A and B even, .* 2x2 chips, .* write v5e:4x4"),
    ("v5p:2x1x4", "no v5p slice of 2x1x4 .* write v5p:2x2x4"),
    ("v5e:64x64", "no v5e slice of 64x64 .* at most 256 chips — write v5e:16x16"),
    ("h100:64", "no 64 h100 .* 8 at most, .* write h100:8, or h100:8x8"),
    ("h100:2x4x8", "no 2x4x8 h100 .* hosts x GPUs of each"),
    ("h100:8:4", "4 slices of GPUs .* only TPUs come in slices — write h100:4x8"),
    ("v5e:4x4:0", "expected CHIP or CHIP:TOPOLOGY"),
  ],
)
def test_a_wrong_name_is_refused_with_one_that_exists(name, message):
  with pytest.raises(ValueError, match=message) as error:
    target(name)
  for repair in re.findall(r"\b[a-z]+\d\w*:[\dx]+", str(error.value).rpartition("—")[2]):
    target(repair)


def test_the_tpu_compiler_finds_these_devices(tpus):
  for name, said in tpus.items():
    found = target(name)
    assert (said["devices"], said["hosts"]) == (found.device_count, found.hosts), name
    assert said["kind"] == found.device_kind
    if found.slices == 1:
      assert sorted(said["ids"]) == list(range(found.device_count))
    else:  # each slice by itself counts on from a number of its own; data goes across them
      assert said["mesh"] == [[0] * 4, [1] * 4]


def test_the_gpu_compiler_finds_these_devices(gpus):
  for name, said in gpus.items():
    found = target(name)
    assert (said["devices"], said["hosts"]) == (found.device_count, found.hosts), name
    assert said["kind"].startswith(found.device_kind)
    assert said["ids"] == list(range(found.device_count))


@pytest.mark.parametrize("chip", TPUS)
def test_a_tpu_has_the_memory_that_its_compiler_allows(tpus, chip):
  allowed = float(re.search(r"exceeds available HBM \(([\d.]+)G\)", tpus[chip]["refusal"])[1])
  assert target(chip).hbm_bytes / 2**30 == pytest.approx(allowed, abs=0.011)  # two digits


@pytest.mark.parametrize("chip", TPUS)
def test_the_figures_of_a_tpu_are_those_of_jax(tpus, chip):
  found, info = target(chip), tpus[chip]["info"]
  assert found.cores == info["num_cores"]
  core = found.core.vmem_bytes, found.core.matrix_units, found.core.matrix_unit_size
  assert core == tuple(info[key] for key in ("vmem_capacity_bytes", "num_mxus", "mxu_column_size"))
  assert found.matmul_flops / found.cores == pytest.approx(info["bf16_ops_per_second"], rel=0.003)
  # The documentation of v5p has 2765 GB/s, jax 2460; the larger is the safe one for a bound.
  apart = 0.125 if chip == "v5p" else 0.03
  bandwidth = found.hbm_bandwidth / found.cores
  assert bandwidth == pytest.approx(info["mem_bw_bytes_per_second"], rel=apart)


@pytest.mark.parametrize(
  ("chip", "clock"), [("v4", 1.05e9), ("v5e", 1.5e9), ("v5p", 1.75e9), ("v6e", 1.75e9)]
)
def test_the_clock_of_a_tpu_follows_from_its_peak(chip, clock):
  assert target(chip).clock == pytest.approx(clock, rel=0.003)


# FMA of bfloat16 that a core does in a cycle, as in the architecture white papers.
FMA = {
  "a100": 1024, "a6000": 512, "rtx4090": 256, "h100": 2048, "h200": 2048, "b200": 4096,
  "rtxpro6000": 512,
}  # fmt: skip


@pytest.mark.parametrize("chip", GPUS)
def test_the_peak_of_a_gpu_is_what_its_cores_do_in_a_cycle(chip):
  """To a percent, but for the large chips, whose matrix units run at a lower clock."""
  gpu = target(chip)
  ratio = gpu.matmul_flops / (gpu.cores * FMA[chip] * 2 * gpu.clock)
  low = 0.92 if chip in ("h100", "h200", "b200") else 0.99
  assert low <= ratio <= 1.01


@pytest.mark.parametrize("chip", CHIPS)
def test_the_peaks_are_those_that_training_reports(chip):
  found = target(chip)
  reported = peak_flops(types.SimpleNamespace(device_kind=found.device_kind))
  assert reported in (None, found.matmul_flops)


def test_links():
  pod = target("v5e:16x16")
  assert pod.link([0, 255]).kind == "ICI"
  assert pod.link([0, 255]).bytes_per_second == 400e9 / 2  # both directions in the documentation
  assert target("v5p:4x4x4").link([0, 1]).bytes_per_second == 1200e9 / 2
  # Two neighbours, not four; of four devices; a chip has all of its links to itself.
  assert target("v5e:2x2").link([0, 1]).bytes_per_second == 100e9
  assert target("v5e").links == () and target("v5e").link([0]) is None
  # Two devices share the links of a TPU7x chip; between themselves they need none of them.
  assert target("tpu7x:4x4x4").link([0, 2]).bytes_per_second == 1200e9 / 2 / 2
  assert target("tpu7x:4x4x4").link([2, 3]) is None and target("tpu7x").link([0, 1]) is None
  nodes = target("h100:4x8")
  assert nodes.link(range(8, 16)).kind == "NVLink"
  assert nodes.link(range(8, 16)).bytes_per_second == 900e9 / 2
  assert nodes.link([7, 8]).kind == nodes.link(range(32)).kind == "network"
  assert nodes.link([7, 8]).bytes_per_second == 400e9 / 8
  assert nodes.link([3, 3]) is None


@pytest.mark.parametrize("chip", CHIPS)
def test_a_name_of_a_chip_alone_is_one_chip(chip):
  found = target(chip)
  assert found.device_count == found.devices_per_chip and found.links == () and found.hosts == 1
  assert found.extra == ("tpu" if chip in TPUS else "gpu-aot")
  assert (found.capability is None) == (chip in TPUS)
  assert math.isfinite(found.clock) and found.hbm_bytes > 2**33


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5e:4x4", r"'v5e:4x4': the tpu compiler lacks libtpu — pip install 'jaxmix\[tpu\]'"),
    ("h100", r"lacks jax_cuda12_plugin and ptxas of .*pip install 'jaxmix\[gpu-aot\]'"),
  ],
)
def test_a_missing_compiler_is_named_with_its_extra(name, message, monkeypatch):
  monkeypatch.setattr("jaxmix.compile_ahead.compilers._found", lambda package: [])
  monkeypatch.setenv("PATH", "")
  with pytest.raises(RuntimeError, match=message):
    target(name).devices()


def test_a_process_without_the_compiler_is_told_what_to_set(monkeypatch):
  def refuse(*_, **__):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr("jaxmix.compile_ahead.compilers._found", lambda package: ["somewhere"])
  monkeypatch.setattr("jaxmix.compile_ahead.compilers.ptxas", lambda: "ptxas")
  monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
  with pytest.raises(RuntimeError, match=r"'h100': .* JAX_PLATFORMS=cpu in its environment"):
    target("h100").devices()
