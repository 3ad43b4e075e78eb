"""Reports as text, to be read in a terminal."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from jaxmix.compile_ahead.cases import BASELINE, CaseProgram
from jaxmix.compile_ahead.decoding import DecodingReport
from jaxmix.compile_ahead.ptx import GpuKernel
from jaxmix.compile_ahead.report import Report
from jaxmix.compile_ahead.run import RunReport
from jaxmix.compile_ahead.targets import target
from jaxmix.compile_ahead.tpu_schedule import total


def table(rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
  """Rows in columns as wide as they need to be; the first is the head. Numbers lean right."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

  def cell(text: str, width: int) -> str:
    return text.rjust(width) if text[:1].isdigit() or text[:1] in "-<" else text.ljust(width)

  return "\n".join(indent + "  ".join(map(cell, row, widths)).rstrip() for row in rows)


def quantity(number: float, unit: str) -> str:
  """1.23e13 FLOP as "12.3 TFLOP"."""
  thousands = min(int(math.log10(max(abs(number), 1)) // 3), len(_PREFIXES) - 1)
  return f"{number / 1000**thousands:.3g} {_PREFIXES[thousands]}{unit}"


_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def gib(number: int) -> str:
  """Bytes in GiB."""
  return f"{number / 2**30:.2f} GiB"


def run_text(run: RunReport) -> str:
  """Everything that compiling a training step tells."""
  report, memory, bound = run.report, run.report.memory, run.report.bound
  chip = target(report.target)
  mesh = ", ".join(f"{name}={size}" for name, size in report.mesh.items() if size > 1) or "1 device"
  fits = (
    f"fits, with {gib(memory.headroom)} to spare"
    if memory.fits
    else f"DOES NOT FIT: {gib(-memory.headroom)} too much"
  )
  lines = [
    f"{report.target}: {chip.device_count} x {chip.device_kind} ({mesh}); "
    f"{run.parameters:,} parameters, {run.tokens:,} tokens a step",
    f"{fits}; a device needs {gib(memory.needed)} of {gib(memory.capacity)}",
    table(
      [
        ("memory of a device", ""),
        ("parameters", gib(run.parameter_bytes)),
        ("optimizer state", gib(run.optimizer_bytes)),
        ("batch", gib(run.batch_bytes)),
        ("gradients", gib(run.gradient_bytes)),
        ("activations kept for the backward pass", gib(run.activation_bytes)),
        ("other temporaries", gib(run.other_bytes)),
        ("program", gib(memory.code)),
      ],
      indent="  ",
    ),
    f"a device computes {quantity(report.flops, 'FLOP')} of matmuls and moves "
    f"{quantity(report.hbm_bytes, 'B')} in its memory",
    *_collectives(report),
    *_kernels(report),
    f"a step takes at least {1e3 * bound.seconds:.1f} ms (compute {1e3 * bound.compute:.1f}, "
    f"memory {1e3 * bound.hbm:.1f}, interconnect {1e3 * bound.interconnect:.1f}): at most "
    f"{run.tokens_per_second:,.0f} tokens/s and {100 * run.mfu:.0f}% MFU, limited by "
    f"{bound.limited_by}",
    _made(report),
  ]
  if memory.fits and memory.needed > chip.default_memory_fraction * memory.capacity:
    lines.append(
      f"jax takes {chip.default_memory_fraction:.0%} of this memory by default: set "
      "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    )
  if chip.slices > 1:
    lines.append("what slices send one another is not in these times: its rate is not known")
  if report.unpriced:
    lines.append(f"without a cost estimate, so not in the flops: {', '.join(report.unpriced)}")
  if report.unknown_loops:
    lines.append(f"loops of unknown length, counted once: {', '.join(report.unknown_loops)}")
  return "\n".join(lines)


def decoding_text(decoding: DecodingReport) -> str:
  """Everything that compiling a decoding step tells."""
  report, memory = decoding.report, decoding.report.memory
  chip = target(report.target)
  fits = "fits" if memory.fits else "DOES NOT FIT"
  scheduled = decoding.scheduled_seconds
  by_schedule = f"; by its schedule {1e3 * scheduled:.2f} ms" if scheduled else ""
  lines = [
    f"{report.target}: 1 x {chip.device_kind}; {decoding.parameters:,} parameters, matrices in "
    f"{decoding.dtype}; one token for each of {decoding.rows} rows a step",
    f"{fits}; it needs {gib(memory.needed)} of {gib(memory.capacity)}",
    table(
      [
        ("memory of the device", ""),
        ("parameters", gib(decoding.parameter_bytes)),
        ("state, updated in place" if _in_place(decoding) else "state", gib(decoding.state_bytes)),
        ("logits, and results apart", gib(memory.outputs - memory.aliased)),
        ("temporaries", gib(memory.temporaries)),
        ("program", gib(memory.code)),
      ],
      indent="  ",
    ),
    table(
      [
        ("in its memory a step moves", ""),
        ("weights, read", quantity(decoding.weight_bytes, "B")),
        ("state, read", quantity(decoding.state_bytes, "B")),
        ("state, written", quantity(decoding.state_bytes, "B")),
        ("these at least", f"{quantity(decoding.ideal_bytes, 'B')}, {_ms(decoding.ideal_seconds)}"),
        ("the program", f"{quantity(report.hbm_bytes, 'B')}, {_ms(report.bound.hbm)}"),
      ],
      indent="  ",
    ),
    *_kernels(report),
    f"a step takes at least {_ms(decoding.seconds)}, {decoding.ratio:.2f} times the ideal, limited "
    f"by {report.bound.limited_by}{by_schedule}: at most "
    f"{decoding.tokens_per_second:,.0f} tokens/s",
    _made(report),
  ]
  return "\n".join(lines)


def _in_place(decoding: DecodingReport) -> bool:
  return decoding.report.memory.aliased >= decoding.state_bytes


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:.2f} ms"


def _made(report: Report) -> str:
  versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
  return (
    f"traced in {report.lower_seconds:.0f} s, compiled in {report.compile_seconds:.0f} s by "
    f"{versions}"
  )


def _collectives(report: Report) -> list[str]:
  if not report.collectives:
    return ["nothing is sent between devices"]
  head = ("collective", "along", "devices", "times", "bytes", "sent by a device")
  rows = [
    (
      row.kind,
      "+".join(row.axes),
      str(row.group_size),
      f"{row.count:,}",
      quantity(row.bytes, "B"),
      quantity(row.wire_bytes, "B"),
    )
    for row in report.collectives
  ]
  return [table([head, *rows], indent="  ")]


def _kernels(report: Report) -> list[str]:
  if not report.pallas_kernels:
    return ["no Pallas kernels: every op is in its XLA form"]
  named = ", ".join(f"{name} x {count}" for name, count in report.pallas_kernels.items())
  return [f"Pallas kernels: {named}"]


def case_rows(case: CaseProgram, report: Report) -> list[dict]:
  """The figures of a case on a target: one row a kernel, all kernels, and the whole program."""
  start = {
    "op": case.op,
    "case": case.case,
    "direction": case.direction,
    "implementation": case.implementation,
    "shapes": {name: list(shape) for name, shape in case.shapes.items()},
    "attention_shape": case.attention_shape,
    "dtype": case.dtype,
    "target": report.target,
    "versions": report.versions,
    "times": "derived from the static schedule",
  }
  if report.schedule is None:
    kernels = report.gpu_kernels or ()
    if case.implementation == "xla":
      kernels = [_together(kernels, report)]
    return [{**start, "times": "none", **vars(kernel)} for kernel in kernels]
  pieces = list(report.schedule.kernels)
  if len(pieces) > 1:
    pieces.append(total(pieces))
  rows = [
    {
      **start,
      **vars(piece),
      "predicted_us": 1e6 * report.schedule.seconds(piece.predicted_cycles),
      "limit_us": 1e6 * report.schedule.seconds(piece.limit_cycles),
      "ratio": piece.ratio,
    }
    for piece in (*pieces, report.schedule.program)
  ]
  least = 1e6 * case.least_seconds(target(report.target))
  rows[-1] |= {"op_limit_us": least, "over_op_limit": rows[-1]["predicted_us"] / least}
  return rows


def compare_with_attention(rows: Sequence[dict]) -> None:
  """Adds to rows of whole programs on TPUs how many times as long JAX's attention takes for the
  same rows, where it is among them: "attention_ratio"."""

  def compared(row: dict) -> tuple:
    return row["target"], row["direction"], row["dtype"], row["attention_shape"]

  programs = [row for row in rows if "op_limit_us" in row and row["attention_shape"]]
  times = {
    compared(row): row["predicted_us"] for row in programs if row["implementation"] == BASELINE
  }
  for row in programs:
    if compared(row) in times and row["implementation"] != BASELINE:
      row["attention_ratio"] = times[compared(row)] / row["predicted_us"]


def _together(kernels: Sequence[GpuKernel], report: Report) -> GpuKernel:
  """The kernels of XLA's own as one row: the most that any of them takes, and sums of the rest."""
  tensor_core: Counter[str] = Counter()
  for kernel in kernels:
    tensor_core.update(kernel.tensor_core)
  largest = max(kernels, key=lambda kernel: kernel.registers)
  return dataclasses.replace(
    largest,
    name=f"{len(kernels)} kernels of XLA",
    grid=(),
    spill_store_bytes=sum(kernel.spill_store_bytes for kernel in kernels),
    spill_load_bytes=sum(kernel.spill_load_bytes for kernel in kernels),
    tensor_core=dict(tensor_core),
    occupancy=min(kernel.occupancy for kernel in kernels),
    blocks_per_core=min(kernel.blocks_per_core for kernel in kernels),
    limit_seconds=report.bound.seconds,
  )


def tpu_table(rows: Sequence[dict]) -> str:
  """Rows of `case_rows` on TPUs."""
  head = (
    "chip", "op", "case", "direction", "by", "kernel", "grid", "bundles", "issue Mc", "HBM Mc",
    "MXU Mc", "spills", "VMEM MiB", "predicted us", "limit us", "ratio", "op limit us", "ratio",
    "attention / it",
  )  # fmt: skip
  return table(
    [
      head,
      *(
        (
          *_what(row),
          str(row["bundles_per_step"] or ""),
          f"{_bounded(row)}{row['issue_cycles'] / 1e6:.4f}",
          f"{row['hbm_cycles'] / 1e6:.4f}",
          f"{row['matmul_cycles'] / 1e6:.4f}",
          f"{row['spills']:,}",
          f"{row['vmem_bytes'] / 2**20:.2f}",
          f"{_bounded(row)}{row['predicted_us']:.1f}",
          f"{row['limit_us']:.1f}",
          f"{_bounded(row)}{row['ratio']:.2f}",
          f"{row['op_limit_us']:.1f}" if "op_limit_us" in row else "",
          f"{_bounded(row)}{row['over_op_limit']:.2f}" if "over_op_limit" in row else "",
          f"{row['attention_ratio']:.2f}" if "attention_ratio" in row else "",
        )
        for row in rows
      ),
    ]
  )


def _what(row: dict) -> tuple[str, ...]:
  """The columns that say what a row is about."""
  rows = next(iter(row["shapes"].values()))  # of the first array, the rows of the op
  shape, grid = ("x".join(map(str, sizes)) for sizes in (rows, row["grid"]))
  case = f"{row['case']} {shape} {row['dtype']}"
  names = (row["direction"], row["implementation"], row["name"])
  return (row["target"], row["op"], case, *names, grid)


def _bounded(row: dict) -> str:
  """A mark for figures that are upper bounds."""
  return "<=" if row["upper_bound"] else ""


def gpu_table(rows: Sequence[dict]) -> str:
  """Rows of `case_rows` on GPUs."""
  head = (
    "chip", "op", "case", "direction", "by", "kernel", "grid", "warps", "registers", "spill B",
    "shared KiB", "tensor cores", "blocks/SM", "occupancy", "limit us",
  )  # fmt: skip
  return table(
    [
      head,
      *(
        (
          *_what(row),
          str(row["warps"]),
          str(row["registers"]),
          str(row["spill_store_bytes"] + row["spill_load_bytes"]),
          f"{(row['static_shared_bytes'] + row['dynamic_shared_bytes']) / 1024:.0f}",
          ", ".join(f"{name} {count}" for name, count in row["tensor_core"].items()) or "none",
          str(row["blocks_per_core"]),
          f"{row['occupancy']:.0%}",
          "" if row["limit_seconds"] is None else f"{1e6 * row['limit_seconds']:.1f}",
        )
        for row in rows
      ),
    ]
  )
