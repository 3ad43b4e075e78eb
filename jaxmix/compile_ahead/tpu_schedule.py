"""The static schedule of a program compiled for TPU: cycles, HBM traffic and the limit of the chip.

A kernel's limit is the larger of the time in which HBM moves the bytes that it copies and the time
that the matrix units need for its matmul flops at their peak. Its predicted time is the limit, or
the cycles in which its bundles are issued where these are more. (They can be fewer: a matrix unit
that is still busy holds up the next instruction for it, and no bundle shows that.)

What the prediction leaves out: the wait for the first copy of a pipeline and the last one, copies
that are slower than the bandwidth because they are short or strided, stalls between dependent
bundles that the compiler did not fill, and whatever other programs do to the chip.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from jaxmix.compile_ahead import bundles
from jaxmix.compile_ahead.bundles import Counts
from jaxmix.compile_ahead.hlo import Instruction, Module
from jaxmix.compile_ahead.pallas import PallasCall
from jaxmix.compile_ahead.targets import Target

# What the compiler is asked to write: the schedule, the final allocations, and which instructions
# of the program share a schedule.
DUMP_LABELS = "^(final_bundles|post-delay-converter|deduplication-map)$"

_DUMP = re.compile(r"\d+-(.+)-\d+-(final_bundles|post-delay-converter|deduplication-map)\.txt")
_VMEM = re.compile(r"space=vmem, size = (0x[0-9a-f]+)(?:, offset = (0x[0-9a-f]+|0))?")


@dataclasses.dataclass(frozen=True)
class Piece:
  """One kernel of a program, or all of the program.

  Cycles are those of the TensorCore's clock; bytes and flops are those of one device.

  Attributes:
    name: of the kernel.
    calls: times that it runs; the other figures are of all of them together.
    grid: of a Pallas kernel.
    bundles_per_step: bundles that stand in its outermost loop.
    issue_cycles: bundles issued.
    hbm_cycles: what its HBM traffic takes at the full bandwidth.
    matmul_cycles: what its matmul flops take at the peak of the matrix units.
    hbm_bytes, matmul_flops: where these come from.
    predicted_cycles: max(issue, HBM, matmul), summed over the kernels where there are several.
    spills: vector registers put to memory or fetched back, as executed.
    vmem_bytes: what it holds in VMEM.
    upper_bound: something in it hangs on data, and was counted as if it always ran.
  """

  name: str
  calls: int
  grid: tuple[int, ...]
  bundles_per_step: int
  issue_cycles: int
  hbm_cycles: float
  matmul_cycles: float
  hbm_bytes: int
  matmul_flops: int
  predicted_cycles: float
  spills: int
  vmem_bytes: int
  upper_bound: bool

  @property
  def limit_cycles(self) -> float:
    """The least that any program with this traffic and these flops takes on the chip."""
    return max(self.hbm_cycles, self.matmul_cycles)

  @property
  def ratio(self) -> float:
    """Predicted time over the limit; 1 cannot be improved without moving less or computing less."""
    return self.predicted_cycles / self.limit_cycles if self.limit_cycles else math.inf


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What the compiler's schedule says of a program.

  Attributes:
    clock: cycles a second.
    kernels: its Pallas kernels, in the order of the program.
    program: everything that it runs, XLA's own operations included.
  """

  clock: float
  kernels: tuple[Piece, ...]
  program: Piece

  def seconds(self, cycles: float) -> float:
    """Cycles as time."""
    return cycles / self.clock

  def kernel(self, name: str) -> Piece:
    """The kernel of that name.

    Raises:
      KeyError: there is none; the message lists those that are there.
    """
    for piece in self.kernels:
      if piece.name == name:
        return piece
    names = ", ".join(piece.name for piece in self.kernels) or "none"
    raise KeyError(f"no kernel {name!r} in the program — it has {names} — use one of these")


def read_schedule(
  folder: pathlib.Path,
  module: Module,
  calls: Sequence[PallasCall],
  target: Target,
  xla_flops: Mapping[str, int],
) -> Schedule:
  """Puts together what the compiler wrote about one program.

  Args:
    folder: where it wrote its dumps; they are of this program only.
    module: the compiled program.
    calls: the Pallas kernels as traced, which know their grids and flops.
    target: what it was compiled for.
    xla_flops: see `jaxmix.compile_ahead.cost.Cost`.
  """
  dumps = _Dumps(folder, target)
  times: dict[str, int] = defaultdict(int)
  found: dict[str, Instruction] = {}
  for instruction, count, _ in module.executed():
    times[instruction.name] += count
    found[instruction.name] = instruction
  pending = list(calls)
  kernels, others = [], []
  for name, count in times.items():
    counts = dumps.counts(name)
    if counts is None:
      continue
    call = _take(pending, found[name]) if found[name].is_pallas else None
    called = (call and call.name) or (found[name].kernel if found[name].is_pallas else name)
    flops = call.matmul_flops if call else xla_flops.get(name, 0)
    piece = _piece(called, count, counts, call, flops, dumps.vmem(name), target)
    (kernels if found[name].is_pallas else others).append(piece)
  if (top := dumps.counts("TLP")) is not None:
    others.append(_piece("TLP", 1, top, None, 0, 0, target))
  return Schedule(target.clock, tuple(kernels), _whole([*kernels, *others]))


def _piece(
  name: str,
  times: int,
  counts: Sequence[Counts],
  call: PallasCall | None,
  flops: int,
  vmem_bytes: int,
  target: Target,
) -> Piece:
  """A kernel from what each core of the device does."""
  issue = max(core.cycles for core in counts)
  hbm_bytes = sum(core.hbm_read + core.hbm_written for core in counts)
  hbm = target.clock * hbm_bytes / target.hbm_bandwidth
  matmul = target.clock * flops / target.matmul_flops
  return Piece(
    name=name,
    calls=times,
    grid=call.grid if call else (),
    bundles_per_step=counts[0].loop_bundles,
    issue_cycles=times * issue,
    hbm_cycles=times * hbm,
    matmul_cycles=times * matmul,
    hbm_bytes=times * hbm_bytes,
    matmul_flops=times * flops,
    predicted_cycles=times * max(issue, hbm, matmul),
    spills=times * sum(core.spills for core in counts),
    vmem_bytes=vmem_bytes,
    upper_bound=any(core.upper_bound or core.unknown_loop for core in counts)
    or bool(call and call.upper_bound),
  )


def total(pieces: Sequence[Piece], *, name: str = "all kernels") -> Piece:
  """Several kernels that run one after the other, as one."""
  sums = {
    field: sum(getattr(piece, field) for piece in pieces)
    for field in (
      "calls",
      "issue_cycles",
      "hbm_cycles",
      "matmul_cycles",
      "hbm_bytes",
      "matmul_flops",
      "predicted_cycles",
      "spills",
    )
  }
  return Piece(
    name=name,
    grid=(),
    bundles_per_step=0,
    vmem_bytes=max((piece.vmem_bytes for piece in pieces), default=0),
    upper_bound=any(piece.upper_bound for piece in pieces),
    **sums,
  )


def _whole(pieces: Sequence[Piece]) -> Piece:
  everything = total(pieces, name="program")
  # Copies that run beside other operations move their bytes within the same bandwidth.
  predicted = max(everything.predicted_cycles, everything.hbm_cycles)
  return dataclasses.replace(everything, calls=1, predicted_cycles=predicted)


def _take(pending: list[PallasCall], instruction: Instruction) -> PallasCall | None:
  """The traced call that became this instruction: the first with its results, by name if it can."""
  results = {(shape.dtype, shape.dims) for shape in instruction.shapes}

  def fits(call: PallasCall) -> bool:
    return {(_HLO_DTYPES.get(dtype, dtype), dims) for dtype, dims in call.results} >= results

  candidates = [call for call in pending if fits(call)]
  named = [call for call in candidates if call.name and instruction.name.startswith(call.name)]
  for call in named or candidates:
    pending.remove(call)
    return call
  return None


_HLO_DTYPES: Mapping[str, str] = {
  "bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64",
  "int8": "s8", "int16": "s16", "int32": "s32", "int64": "s64",
  "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64", "bool": "pred",
}  # fmt: skip


class _Dumps:
  """The compiler's files about one program, by the names of its instructions."""

  def __init__(self, folder: pathlib.Path, target: Target):
    self._target = target
    self._files: dict[tuple[str, str], pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
      if found := _DUMP.fullmatch(path.name):
        self._files[found[1], found[2]] = path
    self._shared = self._shared_schedules()
    self._counts: dict[str, tuple[Counts, ...]] = {}

  def counts(self, name: str) -> tuple[Counts, ...] | None:
    """What each core does when the instruction runs once; None where it has no schedule."""
    name = self._shared.get(name, name)
    path = self._files.get((name, "final_bundles"))
    if path is None:
      return None
    if name not in self._counts:
      text = path.read_text()
      program = bundles.parse(text)
      # Cores that share a program ask for their number; otherwise one of them runs it.
      cores = range(self._target.cores if bundles.asks_for_core(program) else 1)
      self._counts[name] = tuple(
        bundles.run(program, self._target.chip, core=core) for core in cores
      )
    return self._counts[name]

  def vmem(self, name: str) -> int:
    """Bytes of VMEM that the instruction holds."""
    path = self._files.get((self._shared.get(name, name), "post-delay-converter"))
    if path is None:
      return 0
    found = _VMEM.findall(path.read_text())
    return max((int(size, 16) + int(offset or "0", 16) for size, offset in found), default=0)

  def _shared_schedules(self) -> dict[str, str]:
    """Instruction -> the one whose schedule it shares."""
    shared = {}
    for (_, label), path in self._files.items():
      if label != "deduplication-map":
        continue
      key = ""
      for line in path.read_text().splitlines():
        if line.startswith("key:"):
          key = line.removeprefix("key:")
        elif line.startswith("  "):
          shared[line.strip()] = key
    return shared
