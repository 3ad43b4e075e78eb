"""Machines by name: how to compile for them where they are not, and the figures of one device.

    target("v5e:16x16")      256 chips of a TPU v5e slice        target("v5e")    one chip
    target("v5e:16x16:2")    two such slices, over the network
    target("h100:4x8")       4 hosts of 8 H100                   target("h100:8") one host

A *device* is what jax calls one: a chip, but half a chip on TPU7x. The figures are ceilings that no
program exceeds (data sheets, the compiler's own limits), never rates that a program reached.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

from jaxmix.compile_ahead.compilers import installed


@dataclasses.dataclass(frozen=True)
class TensorCore:
  """One TensorCore of a TPU: bytes of vector memory, and how many square matrix units of which
  side."""

  vmem_bytes: int
  matrix_units: int
  matrix_unit_size: int


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
  """One streaming multiprocessor (SM) of a GPU: float32 units, the most threads and blocks that can
  be resident, bytes of shared memory of all its blocks and the most that one of them can have."""

  float_units: int
  threads: int
  blocks: int
  shared_bytes: int
  block_shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Link:
  """A way out of a device: it joins each block of `devices` consecutive ids, and one device sends
  at most `bytes_per_second`, one way, over all of its links of this kind together."""

  kind: str
  devices: int
  bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Target:
  """A machine to compile for. All rates and sizes are of one device, those in `core` of one core.

  Attributes:
    name: as it was asked for; `chip`, `topology` and `slices` are its parts. The topology is that
      of one slice, as the compiler wants it; on GPUs there is one.
    device_count, hosts: of all slices.
    platform: "tpu" or "cuda".
    extra: the pip extra of jaxmix that brings the compiler.
    device_kind: what a real device of this kind answers to in jax.
    capability: compute capability of a GPU, such as "9.0"; None for a TPU.
    hbm_bytes: of a TPU, what the compiler lets one program use. Of a GPU, its whole memory: the
      CUDA context and the buffers of NCCL, some hundreds of MiB, come out of it too.
    default_memory_fraction: the part of `hbm_bytes` that jax takes when it starts, 0.75 on a GPU;
      the variable XLA_PYTHON_CLIENT_MEM_FRACTION changes that. A program that needs more than this
      part does not run without setting it.
    hbm_bandwidth: bytes/s.
    matmul_flops: dense bfloat16 peak with float32 accumulation, FLOP/s.
    clock: cycles/s; of a GPU its boost clock.
    cores: TensorCores or SMs of a device; the two of a v4 or v5p chip work as one device.
    links: from near to far.
  """

  name: str
  platform: str
  chip: str
  topology: str
  slices: int
  device_count: int
  hosts: int
  devices_per_chip: int
  extra: str
  device_kind: str
  capability: str | None
  hbm_bytes: int
  default_memory_fraction: float
  hbm_bandwidth: float
  matmul_flops: float
  clock: float
  cores: int
  core: TensorCore | Multiprocessor
  l2_bytes: int | None
  links: tuple[Link, ...]

  def link(self, device_ids: Iterable[int]) -> Link | None:
    """The nearest link that joins all these devices of a slice, by `device.id`.

    None where none is needed: a single device, or the two of a TPU7x chip, which talk faster than
    over ICI, at a rate that Google does not publish.
    """
    ids = set(device_ids)
    if len({index // self.devices_per_chip for index in ids}) <= 1:
      return None
    return next(link for link in self.links if len({index // link.devices for index in ids}) == 1)

  def devices(self) -> list[Any]:
    """Compile-only jax devices, in the order of their ids, to build a mesh of.

    jax must have started with JAX_PLATFORMS=cpu and TPU_SKIP_MDS_QUERY=1 in the environment.

    Raises:
      RuntimeError: the compiler is not installed, or jax started without that environment.
    """
    reason = installed(self.platform)
    if reason is not None:
      raise RuntimeError(f"target {self.name!r}: {reason}")
    from jax.experimental import topologies

    if self.platform == "tpu":
      name, options = f"{self.chip}:{self.topology}", {}
      if self.device_count == self.slices * self.devices_per_chip:
        options["chips_per_host_bounds"] = [1, 1, 1]  # else a host holds 2x2 chips
      if self.chip == "v4":
        options["chip_config_name"] = "megacore"  # else each core of a chip is a device
      if self.slices > 1:
        options["num_slices"] = self.slices
    else:
      name, options = "gpu", {"target_config": _gpu_config(self), "topology": self.topology}
    try:
      return list(topologies.get_topology_desc(name, platform=self.platform, **options).devices)
    except NotImplementedError as error:
      raise RuntimeError(
        f"target {self.name!r}: jax found no {self.platform} compiler when it started — expected "
        "JAX_PLATFORMS=cpu in its environment, without which it wants a driver, too — set it "
        "before Python starts"
      ) from error


@dataclasses.dataclass(frozen=True)
class _TpuChip:
  """A row of the table of TPUs: a whole chip, `core` and `link_bandwidth` one of each."""

  device_kind: str
  largest: tuple[int, ...]  # slice
  hbm_gib: float
  hbm_bandwidth: float
  matmul_flops: float
  cores: int
  core: TensorCore
  link_bandwidth: float  # one way
  devices: int = 1


# largest, hbm_bandwidth, matmul_flops: docs.cloud.google.com/tpu/docs, the page of each version
# (4096 chips a pod on v4 and 9216 on TPU7x; of the 8960 on v5p a job gets 6144). get_tpu_info() of
# jax agrees to 3%, but for the bandwidth of v5p, 2460e9 there.
# hbm_gib: what the compiler names when a program does not fit ("exceeds available HBM (15.75G)");
# the chip has a little more.
# core: jax.experimental.pallas.tpu.get_tpu_info().
# link_bandwidth: a chip has two links a dimension. The pages give a "bidirectional" bandwidth a
# chip: 400 GB/s v5e, 800 v6e, 1200 v5p and TPU7x. That sums both directions, since older editions
# give half of it, unqualified: 1600 Gb/s v5e, 4800 Gb/s v5p. v4: arXiv 2304.01433, 50 GB/s a link.
_CORE_V4, _CORE_V5E = TensorCore(16 * 2**20, 4, 128), TensorCore(128 * 2**20, 4, 128)
_CORE_V5P, _CORE_V6E = TensorCore(64 * 2**20, 4, 128), TensorCore(128 * 2**20, 2, 256)
_CORE_7X = TensorCore(64 * 2**20, 2, 256)
# fmt: off
_TPUS = {
  "v4": _TpuChip(   "TPU v4",      (16, 16, 16),  30.75, 1200e9,  275e12, 2, _CORE_V4,   50e9),
  "v5e": _TpuChip(  "TPU v5 lite", (16, 16),      15.75,  819e9,  197e12, 1, _CORE_V5E,  50e9),
  "v5p": _TpuChip(  "TPU v5",      (16, 16, 24),  95.74, 2765e9,  459e12, 2, _CORE_V5P, 100e9),
  "v6e": _TpuChip(  "TPU v6 lite", (16, 16),      31.25, 1638e9,  918e12, 1, _CORE_V6E, 100e9),
  "tpu7x": _TpuChip("TPU7x",       (16, 24, 24), 189.50, 7380e9, 2307e12, 2, _CORE_7X,  100e9, 2),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class _GpuChip:
  """A row of the table of GPUs; `near` and `far` join the GPUs of a host, and hosts."""

  device_kind: str
  capability: str
  memory_bytes: int
  hbm_bandwidth: float
  matmul_flops: float
  clock: float
  cores: int
  l2_bytes: int
  near: tuple[str, float]
  far: float


# memory_bytes, hbm_bandwidth, clock, cores, l2_bytes: xla/backends/gpu/target_config/specs in
# openxla/xla, which XLA wrote down from real devices. It has no RTX 4090: 24564 MiB as the driver
# reports, the rest as NVIDIA's Ada white paper is commonly quoted.
# matmul_flops: as NVIDIA's data sheets and white papers are commonly quoted, without sparsity; they
# are cores x clock x what a core does in a cycle, to some percent, which a test repeats.
# near: NVLink has 600, 900 or 1800 GB/s, which sums both directions; else PCIe x16, 4.0 (32 GB/s
# one way) or 5.0 (64). far: the network port of each GPU in DGX machines, 200 Gb/s beside A100, 400
# beside H100, H200 and B200; what a workstation has is not known, but it passes the GPU's slot.
_NVLINK3, _NVLINK4, _NVLINK5 = ("NVLink", 300e9), ("NVLink", 450e9), ("NVLink", 900e9)
_PCIE4, _PCIE5 = ("PCIe", 32e9), ("PCIe", 64e9)
# fmt: off
_GPUS = {
  "a100": _GpuChip("NVIDIA A100-SXM4-80GB", "8.0", 85100068864, 2039.04e9, 312e12, 1.41e9,
                   108, 41943040, _NVLINK3, 25e9),
  "a6000": _GpuChip("NVIDIA RTX A6000", "8.6", 51041271808, 768.096e9, 154.8e12, 1.8e9,
                    84, 6291456, _PCIE4, 32e9),
  "rtx4090": _GpuChip("NVIDIA GeForce RTX 4090", "8.9", 25757220864, 1008e9, 165.2e12, 2.52e9,
                      128, 75497472, _PCIE4, 32e9),
  "h100": _GpuChip("NVIDIA H100 80GB HBM3", "9.0", 84942979072, 3352.32e9, 989.4e12, 1.98e9,
                   132, 52428800, _NVLINK4, 50e9),
  "h200": _GpuChip("NVIDIA H200", "9.0", 151397597184, 4800e9, 989.4e12, 1.98e9,
                   132, 52428800, _NVLINK4, 50e9),
  "b200": _GpuChip("NVIDIA B200", "10.0", 191514411008, 7672.32e9, 2250e12, 1.965e9,
                   148, 132644864, _NVLINK5, 50e9),
  "rtxpro6000": _GpuChip("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "12.0",
                         103079215104, 1792e9, 503.8e12, 2.6e9, 188, 134217728, _PCIE5, 64e9),
}

# What follows from the capability: cuda::arch_traits of NVIDIA/cccl, as in the CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability"; float_units as the clock above. The
# driver keeps 1 KiB of shared memory for itself in every block.
_MULTIPROCESSORS = {
  "8.0":  Multiprocessor(64,  2048, 32, 164 * 1024, 163 * 1024),
  "8.6":  Multiprocessor(128, 1536, 16, 100 * 1024,  99 * 1024),
  "8.9":  Multiprocessor(128, 1536, 24, 100 * 1024,  99 * 1024),
  "9.0":  Multiprocessor(128, 2048, 32, 228 * 1024, 227 * 1024),
  "10.0": Multiprocessor(128, 2048, 32, 228 * 1024, 227 * 1024),
  "12.0": Multiprocessor(128, 1536, 24, 100 * 1024,  99 * 1024),
}
# fmt: on

CHIPS = (*_TPUS, *_GPUS)
_NAME = re.compile(r"([a-z0-9]+)(?::([1-9]\d*(?:x[1-9]\d*)*)(?::([1-9]\d*))?)?")
_GPUS_OF_A_HOST = 8  # of the boards that cloud providers rent out


def target(name: str) -> Target:
  """The machine of that name: a chip of `CHIPS` alone, CHIP:TOPOLOGY, or CHIP:TOPOLOGY:SLICES.

  Args:
    name: `v5e:16x16`, `v6e:8x8` (two dimensions), `v4:2x2x4`, `v5p:4x4x4`, `tpu7x:4x4x4` (three),
      `v5e:16x16:2` (two slices, joined by the data centre network), `h100:8` (a host of eight) or
      `h100:4x8` (four such hosts); `v5e` or `h100`, one chip.
  Raises:
    ValueError: no such chip, or no such slice of it; the message has the nearest that exists.
  """
  match = _NAME.fullmatch(name)
  if not match or match[1] not in CHIPS:
    nearest = difflib.get_close_matches(name.lower().split(":")[0], CHIPS, n=1)
    chip = nearest[0] if nearest else "v5e"
    example = f"{chip}:{_join([4] * len(_TPUS[chip].largest)) if chip in _TPUS else 8}"
    raise ValueError(
      f"target {name!r} names no machine known here — expected CHIP or CHIP:TOPOLOGY, with a chip "
      f"of {', '.join(CHIPS)} — {'did you mean' if nearest else 'write'} {chip}, or {example}?"
    )
  sizes = [int(size) for size in match[2].split("x")] if match[2] else []
  if match[1] in _TPUS:
    return _tpu(name, match[1], sizes, slices=int(match[3] or 1))
  if match[3]:
    raise ValueError(
      f"target {name!r}: {match[3]} slices of GPUs — expected hosts x GPUs of each, only TPUs come "
      f"in slices — write {match[1]}:{match[3]}x{math.prod(sizes)}"
    )
  return _gpu(name, match[1], sizes)


def _tpu(name: str, chip: str, sizes: list[int], *, slices: int) -> Target:
  row = _TPUS[chip]
  one, most = [1] * len(row.largest), math.prod(row.largest)
  sizes = sizes or one
  chips = math.prod(sizes)
  odd = sizes != one and any(size % 2 for size in sizes[:2])
  if len(sizes) != len(one) or chips > most or odd:
    repaired = [size + size % 2 for size in sizes[:2]] + sizes[2:]
    if len(sizes) != len(one) or math.prod(repaired) > most:
      repaired = [4] * len(one) if chips <= most else row.largest
    raise ValueError(
      f"target {name!r}: there is no {chip} slice of {_join(sizes)} — expected {_join(one)}, or "
      f"{_join('ABC'[: len(one)])} with A and B even, since a host holds 2x2 chips, and at most "
      f"{most} chips — write {chip}:{_join(repaired)}"
    )
  core = row.core
  flops_of_a_step = 2 * row.cores * core.matrix_units * core.matrix_unit_size**2
  # In the middle of a slice a chip has a neighbour on either side, where there are so many.
  neighbours = sum(min(size - 1, 2) for size in sizes)
  ici = Link("ICI", chips * row.devices, neighbours * row.link_bandwidth / row.devices)
  return Target(
    name=name,
    platform="tpu",
    chip=chip,
    topology=_join(sizes),
    slices=slices,
    device_count=slices * chips * row.devices,
    hosts=slices * max(chips // 4, 1),
    devices_per_chip=row.devices,
    extra="tpu",
    device_kind=row.device_kind,
    capability=None,
    hbm_bytes=int(row.hbm_gib * 2**30) // row.devices,
    default_memory_fraction=1.0,
    hbm_bandwidth=row.hbm_bandwidth / row.devices,
    matmul_flops=row.matmul_flops / row.devices,
    # Units of 256 x 256 take two steps a cycle.
    clock=row.matmul_flops / flops_of_a_step / (core.matrix_unit_size // 128),
    cores=row.cores // row.devices,
    core=core,
    l2_bytes=None,
    links=(ici,) if chips > 1 else (),
  )


def _gpu(name: str, chip: str, sizes: list[int]) -> Target:
  row = _GPUS[chip]
  hosts, of_a_host = [1, 1, *sizes][-2:]
  if len(sizes) > 2 or of_a_host > _GPUS_OF_A_HOST:
    needed = math.ceil(math.prod(sizes) / _GPUS_OF_A_HOST)
    raise ValueError(
      f"target {name!r}: there are no {_join(sizes)} {chip} — expected the GPUs of one host, "
      f"{_GPUS_OF_A_HOST} at most, or hosts x GPUs of each — write {chip}:{_GPUS_OF_A_HOST}, or "
      f"{chip}:{needed}x{_GPUS_OF_A_HOST}"
    )
  kind, bandwidth = row.near
  links = [Link(kind, of_a_host, bandwidth)] if of_a_host > 1 else []
  if hosts > 1:
    links.append(Link("network", hosts * of_a_host, row.far))
  return Target(
    name=name,
    platform="cuda",
    chip=chip,
    topology=_join([1, hosts, of_a_host]),
    slices=1,
    device_count=hosts * of_a_host,
    hosts=hosts,
    devices_per_chip=1,
    extra="gpu-aot",
    device_kind=row.device_kind,
    capability=row.capability,
    hbm_bytes=row.memory_bytes,
    default_memory_fraction=0.75,
    hbm_bandwidth=row.hbm_bandwidth,
    matmul_flops=row.matmul_flops,
    clock=row.clock,
    cores=row.cores,
    core=_MULTIPROCESSORS[row.capability],
    l2_bytes=row.l2_bytes,
    links=tuple(links),
  )


def _gpu_config(gpu: Target) -> str:
  """The text form of XLA's GpuTargetConfigProto: what its compiler asks a device for."""
  major, minor = gpu.capability.split(".")
  core = gpu.core
  # From 0.12 on, jax picks the capability of a Pallas kernel by the name of the device, among the
  # names that it knows. RTX A6000 is not one of them; A10 is, of the same capability.
  suffix = " (compiled like NVIDIA A10)" if gpu.chip == "a6000" else ""
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      threads_per_core_limit: {core.threads} core_count: {gpu.cores}
      fpus_per_core: {core.float_units} clock_rate_ghz: {gpu.clock / 1e9}
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {core.block_shared_bytes}
      shared_memory_per_core: {core.shared_bytes} l2_cache_size: {gpu.l2_bytes}
      memory_bandwidth: {int(gpu.hbm_bandwidth)} device_memory_size: {gpu.hbm_bytes}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    device_description_str: "{gpu.device_kind}{suffix}"
  """


def _join(sizes: Iterable[int | str]) -> str:
  return "x".join(map(str, sizes))
