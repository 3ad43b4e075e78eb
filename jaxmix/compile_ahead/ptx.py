"""What NVIDIA's assembler says of the kernels in a compiled GPU program.

XLA writes, into a folder that it is asked to dump to, each kernel in PTX and the order of launches
with their grids. The assembler (`ptxas -v`) turns the PTX into machine code and tells registers,
spills and static shared memory; how many blocks a multiprocessor then holds follows by CUDA's
rules. That says whether a kernel is built right. It does not say how long it takes: a GPU issues
dynamically, so there is a limit here (`limit_seconds`) but no prediction.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxmix.compile_ahead import hlo
from jaxmix.compile_ahead.compilers import ptxas
from jaxmix.compile_ahead.targets import Multiprocessor, Target

if TYPE_CHECKING:  # it imports jax, which reading a dump does not need
  from jaxmix.compile_ahead.pallas import PallasCall

# How Pallas's Triton kernels stand in a program.
_PALLAS = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton"')
_NUMBER = re.compile(r"__\d+$")  # what XLA appends to the second entry of a name
_LAUNCH = re.compile(
  r"^\s*0*(?P<thunk>\d+): .*?(?P<entry>\S+) grid: \[(?P<grid>[\d, ]+)\] "
  r"threads: \[(?P<threads>[\d, ]+)\].*? shared_memory: (?P<shared>\d+) bytes",
  re.MULTILINE,
)
_ANNOTATION = re.compile(r'profile_annotation: "([^"]+)"\s+thunk_id: (\d+)')
_ENTRY = re.compile(r"\.entry\s+([^\s(]+)")
# Instructions that multiply on tensor cores: of Ampere and Ada, of Hopper, of Blackwell.
_TENSOR_CORE = {
  "mma.sync": re.compile(r"\bmma(?:\.sp)?\.sync\."),
  "wgmma": re.compile(r"\bwgmma\.mma_async\."),
  "tcgen05": re.compile(r"\btcgen05\.mma\."),
}


@dataclass(frozen=True)
class GpuKernel:
  """One kernel of a program, as assembled for a GPU.

  Attributes:
    name: the one that a Pallas kernel was given, or its function has; of another kernel its entry.
    entry: its function in the PTX.
    runs: how often it is launched in one run of the program.
    grid: blocks along x, y and z.
    warps: of one block.
    registers: of one thread.
    stack_bytes: of one thread, in local memory.
    spill_store_bytes, spill_load_bytes: moved by the spill instructions of one thread, each
      instruction counted once.
    static_shared_bytes, dynamic_shared_bytes: shared memory of one block.
    tensor_core: instruction ("mma.sync", "wgmma", "tcgen05") -> how often it stands in the code.
    blocks_per_core: blocks that a multiprocessor holds at a time; 0 means that it cannot run.
    occupancy: resident warps over the most that could be, 0 to 1.
    waves: blocks of the grid over those that the whole GPU holds at a time.
    matmul_flops: of one run; None where it is not known.
    hbm_bytes: of one run of a Pallas kernel, its operands and results once each, or what its cost
      estimate says where that is less, as of a kernel that is given whole arrays for a part of
      them; None for another kernel.
    limit_seconds: of one run, the larger of hbm_bytes at the bandwidth of the memory and
      matmul_flops at the peak of the tensor cores; None where either is not known.
  """

  name: str
  entry: str
  runs: int
  grid: tuple[int, ...]
  warps: int
  registers: int
  stack_bytes: int
  spill_store_bytes: int
  spill_load_bytes: int
  static_shared_bytes: int
  dynamic_shared_bytes: int
  tensor_core: dict[str, int]
  blocks_per_core: int
  occupancy: float
  waves: float | None
  matmul_flops: int | None
  hbm_bytes: int | None
  limit_seconds: float | None

  @property
  def spill_bytes(self) -> int:
    """Stores and loads of spilled registers together."""
    return self.spill_store_bytes + self.spill_load_bytes

  @property
  def shared_bytes(self) -> int:
    """Shared memory of one block, static and dynamic."""
    return self.static_shared_bytes + self.dynamic_shared_bytes


def dump_flags(folder: pathlib.Path) -> str:
  """What XLA_FLAGS must hold, before jax is imported, for `read_kernels` to find its files.

  The folder should be a fresh one. From jax 0.12 on, PTX is dumped only where it is asked for.
  """
  return f"--xla_dump_to={folder} --xla_dump_emitter_re=ptx"


def read_kernels(
  dump: pathlib.Path,
  hlo_text: str,
  target: Target,
  *,
  calls: Sequence[PallasCall] = (),
  fusions: bool = False,
) -> tuple[GpuKernel, ...]:
  """The kernels of one compiled program, in the order in which they are first launched.

  Args:
    dump: the folder that XLA dumped to, see `dump_flags`; it may hold other programs, too.
    hlo_text: `compiled.as_text()` of the program.
    target: the GPU that it was compiled for.
    calls: `pallas_calls(jaxpr)` of the program, for the flops.
    fusions: also the kernels that XLA generated itself, not Pallas kernels alone.
  Raises:
    ValueError: the folder does not hold this program for this GPU, or not all of its PTX.
    RuntimeError: there is no assembler, or it refuses a kernel.
  """
  program = _program(dump, hlo_text, target)
  launches: dict[str, list[_Launch]] = {}
  for launch in _launches(dump, program, hlo.parse(hlo_text)):
    if fusions or launch.name is not None:
      launches.setdefault(launch.entry, []).append(launch)
  code = _assemble(dump, program, launches)
  return tuple(_kernel(found, code[entry], calls, target) for entry, found in launches.items())


def resident_blocks(core: Multiprocessor, *, warps: int, registers: int, shared_bytes: int) -> int:
  """Blocks that one multiprocessor holds at a time.

  The least of what its warps, its register files, its shared memory and its table of blocks allow.
  The tensor memory of capability 10.0, which tcgen05 uses, is not counted.

  Args:
    warps: of one block.   registers: of one thread.   shared_bytes: of one block, without the
      driver's own part.
  Source: CUDA C++ Programming Guide, "Multiprocessor Level"; units of allocation as in
    cuda_occupancy.h of the CUDA toolkit, the same for capability 8.0 to 12.0.
  """
  # A file of 16384 registers belongs to each of four partitions. A warp lies in one of them and
  # takes registers in units of 256.
  registers_of_a_warp = _round_up(registers * 32, 256)
  resident_warps = 4 * (16384 // registers_of_a_warp)
  if registers_of_a_warp * _round_up(warps, 4) > 65536:
    resident_warps = 0
  reserved = core.shared_bytes - core.block_shared_bytes
  by_shared_memory = core.shared_bytes // _round_up(shared_bytes + reserved, 128)
  return min(core.threads // 32 // warps, resident_warps // warps, by_shared_memory, core.blocks)


@dataclass(frozen=True)
class _Launch:
  """Where a program launches a kernel; `name` and `hbm_bytes` of a Pallas kernel only."""

  entry: str
  grid: tuple[int, ...]
  threads: int
  dynamic_shared_bytes: int
  runs: int
  results: tuple[tuple[int, ...], ...]
  name: str | None
  hbm_bytes: int | None


@dataclass(frozen=True)
class _Code:
  """What the assembler says of one entry."""

  registers: int
  stack_bytes: int
  spill_store_bytes: int
  spill_load_bytes: int
  static_shared_bytes: int
  tensor_core: dict[str, int]


def _program(dump: pathlib.Path, hlo_text: str, target: Target) -> str:
  """How the names of a program's files begin. Its first line has a fingerprint of the program."""
  header = hlo_text.partition("\n")[0]
  found = []
  for path in sorted(dump.glob(f"*.sm_{target.capability}*_gpu_after_optimizations.txt")):
    with path.open() as lines:
      if lines.readline().rstrip("\n") == header:
        found.append(path.name.rpartition(".sm_")[0])
  if not found:
    raise ValueError(
      f"{dump} holds no dump of the program {header[:60]!r} for capability {target.capability} — "
      f"expected it compiled for {target.name} — name the GPU that it was compiled for, or set "
      f"XLA_FLAGS={dump_flags(dump)!r} before jax is imported"
    )
  return found[-1]  # compiled more than once, it is the same


def _launches(dump: pathlib.Path, program: str, module: hlo.Module) -> Iterator[_Launch]:
  """The launches of a program in order; those of a loop's body once, with the times they run."""
  metadata = (dump / f"{program}.thunk_metadata.txt").read_text()
  names = {int(thunk): name for name, thunk in _ANNOTATION.findall(metadata)}
  executed = {instruction.name: (instruction, *rest) for instruction, *rest in module.executed()}
  for line in _LAUNCH.finditer((dump / f"{program}.thunk_sequence.txt").read_text()):
    instruction, times, computation = executed[names[int(line["thunk"])]]
    name = hbm_bytes = None
    if instruction.opcode == "custom-call" and _PALLAS.search(instruction.attributes):
      name = _NUMBER.sub("", line["entry"])
      arrays = (*computation.operand_shapes(instruction), *instruction.shapes)
      hbm_bytes = sum(shape.bytes for shape in arrays)
    yield _Launch(
      entry=line["entry"],
      grid=_integers(line["grid"]),
      threads=math.prod(_integers(line["threads"])),
      dynamic_shared_bytes=int(line["shared"]),
      runs=times,
      results=tuple(shape.dims for shape in instruction.shapes),
      name=name,
      hbm_bytes=hbm_bytes,
    )


def _assemble(dump: pathlib.Path, program: str, entries: Iterable[str]) -> dict[str, _Code]:
  """Entry -> what the assembler says of it."""
  wanted, found = set(entries), {}
  for path in sorted(dump.glob(f"{program}.*.ptx")):
    head, *parts = _ENTRY.split(path.read_text())
    bodies = dict(zip(parts[::2], parts[1::2], strict=True))
    if here := wanted & bodies.keys():
      said = _ptxas(path, re.search(r"^\.target (\w+)", head, re.MULTILINE)[1])
      found |= {entry: _code(entry, said, bodies[entry]) for entry in here}
  if missing := sorted(wanted - found.keys()):
    raise ValueError(
      f"{dump} has no PTX of {', '.join(missing)} — expected every kernel of {program} — set "
      f"XLA_FLAGS={dump_flags(dump)!r} and compile in a fresh process without a cache"
    )
  return found


def _ptxas(path: pathlib.Path, architecture: str) -> str:
  """What `ptxas -v` prints about a file."""
  assembler = ptxas()
  if assembler is None:
    raise RuntimeError("there is no ptxas — it assembles PTX — pip install 'jaxmix[gpu-aot]'")
  run = subprocess.run(
    [assembler, f"-arch={architecture}", "-v", path, "-o", os.devnull],
    capture_output=True,
    text=True,
    check=False,
  )
  if run.returncode:
    raise RuntimeError(
      f"{assembler} refuses {path}: {run.stderr.strip()} — expected a release as new as the "
      "compiler's — pip install --upgrade nvidia-cuda-nvcc-cu12"
    )
  return run.stderr + run.stdout


def _code(entry: str, said: str, body: str) -> _Code:
  """`body`: PTX of the entry.   `said`: by the assembler about the file that it is in."""
  about = said[said.index(f"Compiling entry function '{entry}'") :]
  about = about.partition("\nptxas info    : Compiling")[0]

  def number(pattern: str) -> int:
    match = re.search(rf"(\d+) {pattern}", about)
    return int(match[1]) if match else 0

  counts = {name: len(pattern.findall(body)) for name, pattern in _TENSOR_CORE.items()}
  return _Code(
    registers=int(re.search(r"Used (\d+) registers", about)[1]),
    stack_bytes=number("bytes stack frame"),
    spill_store_bytes=number("bytes spill stores"),
    spill_load_bytes=number("bytes spill loads"),
    static_shared_bytes=number("bytes smem"),
    tensor_core={name: count for name, count in counts.items() if count},
  )


def _kernel(
  launches: Sequence[_Launch], code: _Code, calls: Sequence[PallasCall], target: Target
) -> GpuKernel:
  """One entry; all its launches are alike."""
  launch = launches[0]
  warps = math.ceil(launch.threads / 32)
  shared_bytes = code.static_shared_bytes + launch.dynamic_shared_bytes
  blocks = resident_blocks(
    target.core, warps=warps, registers=code.registers, shared_bytes=shared_bytes
  )
  call = _traced(launch, calls)
  hbm_bytes, flops, limit = launch.hbm_bytes, None, None
  if call is not None:
    flops = call.matmul_flops
    hbm_bytes = min(hbm_bytes, call.bytes_accessed or hbm_bytes)
    limit = max(hbm_bytes / target.hbm_bandwidth, flops / target.matmul_flops)
  return GpuKernel(
    name=launch.name or launch.entry,
    entry=launch.entry,
    runs=sum(launch.runs for launch in launches),
    grid=launch.grid,
    warps=warps,
    registers=code.registers,
    stack_bytes=code.stack_bytes,
    spill_store_bytes=code.spill_store_bytes,
    spill_load_bytes=code.spill_load_bytes,
    static_shared_bytes=code.static_shared_bytes,
    dynamic_shared_bytes=launch.dynamic_shared_bytes,
    tensor_core=code.tensor_core,
    blocks_per_core=blocks,
    occupancy=blocks * warps * 32 / target.core.threads,
    waves=math.prod(launch.grid) / (blocks * target.cores) if blocks else None,
    matmul_flops=flops,
    hbm_bytes=hbm_bytes,
    limit_seconds=limit,
  )


def _traced(launch: _Launch, calls: Sequence[PallasCall]) -> PallasCall | None:
  """The traced call that has this name, grid and results, where its flops are exact."""
  for call in calls:
    if call.upper_bound:
      continue
    results = tuple(shape for _, shape in call.results)
    blocks = math.prod(call.grid)
    name = re.sub(r"\W", "_", call.name)  # as an entry is named
    if (name, results, blocks) == (launch.name, launch.results, math.prod(launch.grid)):
      return call
  return None


def _integers(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split(", ")))


def _round_up(value: int, unit: int) -> int:
  return -(-value // unit) * unit
