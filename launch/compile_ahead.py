"""Compiles a run, or kernels, for machines that are not here. The manual: --help"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import command_line

if TYPE_CHECKING:
  from jaxmix.compile_ahead.run import Run, RunReport

DESCRIPTION = """Says what a training run, or a kernel, would do on a machine that is not here, by
compiling it for that machine: whether it fits, what it sends, the least time that it takes.

  a run        the real training step of a run file: memory of a device by kind, matmul flops, HBM
               bytes, every collective, the lower bound of the step time and the MFU that it allows.
               Where it does not fit: what makes it fit, each tried.
  decoding     with --decode, of a run's model: one step of generate.py, the state updated in place,
               and its least time beside that of reading the weights and the state once.
  layers       of the models of several runs, side by side: what the static schedule of a TPU
               predicts for a layer, forward or with gradients, its tokens a second, and how many
               times those of the first run that is.
  kernels      every case of pallas_kernels/<op>/cases.py: on TPUs the static schedule and how far
               the kernel is from the limit of the chip; on GPUs registers, spills, shared memory,
               tensor-core instructions and occupancy. Beside them the XLA form and JAX's own flash
               attention at the same sizes.

limits, in the table of TPU kernels: "limit" is what HBM and the matrix units allow for the bytes
that the kernel copies and the flops that it computes, "op limit" what they allow for the op: its
arrays read and written once, in the backward pass again, and the flops of its recurrence. Whole
programs ("program") are given the layouts of arrays that they want, as inside a model.

targets:
  TPU slices   v4:2x2x4 v5e:4x4 v5p:4x4x4 v6e:8x8 tpu7x:2x2x2; a bare name is one chip;
               v5e:4x4:2 is two slices, for a run whose make_mesh.slices is 2
  GPUs         h100:8 is a host of 8, h100:4x8 four such hosts; also h200 a100 b200 a6000 rtx4090
               rtxpro6000; a bare name is one"""

EPILOG = f"""what is compiled is kept in ~/.cache/jaxmix/compile_ahead, and not compiled again until
the program, the target or a compiler changes.

{command_line.EXIT_CODES}
  3    the run does not fit on a target

examples:
  python launch/compile_ahead.py --gin_file configs/runs/quickstart.gin --target v5e
  python launch/compile_ahead.py --gin_file configs/runs/corpus_linear_attention_7b.gin \\
      --vocab_size 50257 --length 4096 --target v5p:4x4x4 v5e:16x16 h100:4x8
  python launch/compile_ahead.py --gin_file configs/runs/corpus_gated_deltanet_1b.gin \\
      --vocab_size 50257 --length 4096 --decode --batch_size 1 16 --target v5e
  python launch/compile_ahead.py --layers configs/runs/corpus_bert_110m.gin \\
      configs/runs/corpus_monarch_bert_80m.gin --rows 32x512 8x4096 4x8192 --target v5e v6e
  python launch/compile_ahead.py --kernels linear_attention --case train --target v5e v6e h100
  python launch/compile_ahead.py --kernels --target v5e v6e --record"""

DOES_NOT_FIT = 3


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument(
    "--gin_file", action="append", metavar="FILE", help="run file, as for train.py; repeatable"
  )
  what.add_argument(
    "--kernels", nargs="*", metavar="OP", help="ops of pallas_kernels; none named means all"
  )
  what.add_argument(
    "--layers", nargs="+", metavar="FILE", help="run files of texts whose models are compared"
  )
  parser.add_argument("--target", nargs="+", required=True, metavar="NAME", help="see targets")
  parser.add_argument("--json", metavar="FILE", help="also write every figure to this file")
  parser.add_argument(
    "--workers", type=int, default=2, metavar="N", help="programs compiled at a time; default 2"
  )
  parser.add_argument(
    "--dtype",
    choices=("bfloat16", "float32"),
    help="of the arrays of kernels, default bfloat16; of the weight matrices of --decode, default "
    "that in which the model computes, as generate.py has them",
  )
  run = parser.add_argument_group("a run")
  run.add_argument(
    "--gin_param",
    action="append",
    default=[],
    metavar="'NAME = VALUE'",
    help="one more line of the run file; repeatable",
  )
  run.add_argument("--vocab_size", type=int, metavar="N", help="instead of asking the data for it")
  run.add_argument("--length", type=int, metavar="T", help="instead of asking the data for it")
  run.add_argument(
    "--sweep",
    action="store_true",
    help="try meshes, and the batch sizes of --batch_size, and rank those that fit",
  )
  run.add_argument(
    "--decode", action="store_true", help="compile a step of decoding instead of one of training"
  )
  run.add_argument(
    "--batch_size",
    type=int,
    nargs="+",
    metavar="B",
    help="of --sweep, default the run's own; of --decode, default 1",
  )
  layers = parser.add_argument_group("layers, and --gin_param")
  layers.add_argument(
    "--rows", nargs="+", type=_rows, metavar="BxT", help="rows and their length, such as 8x4096"
  )
  layers.add_argument(
    "--direction", nargs="+", default=["forward"], help="forward, forward_backward; default forward"
  )
  kernels = parser.add_argument_group("kernels")
  kernels.add_argument(
    "--case", nargs="+", default=[], metavar="NAME", help="of the ops that have it; default all"
  )
  kernels.add_argument(
    "--implementation",
    nargs="+",
    default=[],
    metavar="NAME",
    help="tpu, gpu, xla, jax_flash_attention; default all",
  )
  kernels.add_argument(
    "--record",
    nargs="?",
    const="tests/kernels/schedules.json",
    metavar="FILE",
    help="keep the schedules of our kernels in this file, that a test holds them to; default "
    "%(const)s",
  )
  return parser


def _rows(text: str) -> tuple[int, int]:
  rows, length = map(int, text.split("x"))
  return rows, length


def compile_ahead(arguments: argparse.Namespace) -> int:
  """Compiles and prints; returns the exit code."""
  _check(arguments)
  if arguments.kernels is not None:
    return _kernels(arguments)
  if arguments.layers:
    return _layers(arguments)
  from jaxmix.compile_ahead.run import Run

  run = Run(
    tuple(arguments.gin_file), tuple(arguments.gin_param), arguments.vocab_size, arguments.length
  )
  run.configuration()  # a mistake in the files shows before anything is compiled
  results = []
  work = _decode if arguments.decode else _sweep if arguments.sweep else _report
  for name in arguments.target:
    results.append(work(run, name, arguments))
  if arguments.json:
    Path(arguments.json).write_text(json.dumps([result for result, _ in results], indent=1))
  return 0 if all(fits for _, fits in results) else DOES_NOT_FIT


def _check(arguments: argparse.Namespace) -> None:
  """Raises ValueError where options do not go together."""
  for option in ("kernels", "sweep"):
    if arguments.decode and getattr(arguments, option) not in (None, False):
      raise ValueError(
        f"--decode with --{option}: --decode compiles the decoding of a run's model — expected "
        f"--gin_file without --{option} — leave out one of them"
      )
  if bool(arguments.layers) != bool(arguments.rows):
    raise ValueError(
      f"--layers {arguments.layers}, --rows {arguments.rows}: the rows that layers are given "
      "— expected both or neither — such as --layers RUN.gin --rows 8x4096"
    )


def _layers(arguments: argparse.Namespace) -> int:
  from jaxmix.compile_ahead.layers import Layers, compare, layers_table
  from jaxmix.compile_ahead.process import CompileError, compile_all
  from jaxmix.compile_ahead.run import Run

  points = [
    (
      name,
      Layers(Path(file).stem, Run((file,), tuple(arguments.gin_param)), rows, length, direction),
    )
    for name in arguments.target
    for direction in arguments.direction
    for rows, length in arguments.rows
    for file in arguments.layers
  ]
  tasks = [layers.task(name) for name, layers in points]
  rows, refused = [], 0
  for (name, layers), report in zip(
    points, compile_all(tasks, workers=arguments.workers), strict=True
  ):
    if isinstance(report, CompileError):
      refused += 1
      print(f"{name} {layers}: {report}", file=sys.stderr)
    else:
      rows.append(layers.row(report))
  compare(rows, Path(arguments.layers[0]).stem)
  print(layers_table(rows))
  if arguments.json:
    Path(arguments.json).write_text(json.dumps(rows, indent=1))
  return int(refused > 0)


def _decode(run: Run, name: str, arguments: argparse.Namespace) -> tuple[dict, bool]:
  """One target: a decoding step with each number of rows."""
  from jaxmix.compile_ahead.decoding import decoding_report, decoding_task
  from jaxmix.compile_ahead.process import CompileError, compile_all
  from jaxmix.compile_ahead.text import decoding_text

  sizes = arguments.batch_size or [1]
  tasks = [decoding_task(run, name, rows=rows, dtype=arguments.dtype) for rows in sizes]
  found = []
  for rows, report in zip(sizes, compile_all(tasks, workers=arguments.workers), strict=True):
    if isinstance(report, CompileError):
      raise report
    found.append(decoding_report(run, report, rows=rows, dtype=arguments.dtype))
    print(f"{decoding_text(found[-1])}\n", flush=True)
  result = {"target": name, "decode": [report.to_dict() for report in found]}
  return result, all(report.report.memory.fits for report in found)


def _report(run: Run, name: str, arguments: argparse.Namespace) -> tuple[dict, bool]:
  """One target: the report as text, and what helps where it does not fit."""
  from jaxmix.compile_ahead.process import compile_one
  from jaxmix.compile_ahead.run import run_report, run_task
  from jaxmix.compile_ahead.text import run_text

  found = run_report(run, compile_one(run_task(run, name)))
  print(run_text(found), flush=True)
  result = found.to_dict()
  if not found.report.memory.fits:
    result["remedies"] = _remedies(run, name, arguments.workers)
  print(flush=True)
  return result, found.report.memory.fits


def _remedies(run: Run, name: str, workers: int) -> list[dict]:
  """Tries overrides, the cheapest first, and prints those with which the run fits."""
  from jaxmix.compile_ahead.run import remedies
  from jaxmix.compile_ahead.targets import target
  from jaxmix.compile_ahead.text import gib

  helped = []
  for candidates in remedies(run, target(name).device_count):
    for params, found in _compiled(run, name, candidates, workers):
      if found is None:
        continue
      memory = found.report.memory
      fits = "fits" if memory.fits else "does not fit"
      print(
        f"  {fits}, {gib(memory.needed)} a device, at least "
        f"{1e3 * found.report.bound.seconds:.1f} ms a step:  {'; '.join(params)}",
        flush=True,
      )
      if memory.fits:
        helped.append({"gin_params": params, **found.to_dict()})
    if helped:
      return helped
  print("  nothing that was tried makes it fit: take more devices, or a smaller model or length")
  return helped


def _sweep(run: Run, name: str, arguments: argparse.Namespace) -> tuple[dict, bool]:
  """Meshes and batch sizes on one target, those that fit ranked by tokens a second."""
  from jaxmix.compile_ahead.run import sweep
  from jaxmix.compile_ahead.targets import target
  from jaxmix.compile_ahead.text import gib, table

  sizes = arguments.batch_size or [run.configuration().value("batch_size")]
  chip = target(name)
  candidates = sweep(run, chip.device_count // chip.slices, sizes)
  found = [
    (params, report)
    for params, report in _compiled(run, name, candidates, arguments.workers)
    if report is not None
  ]
  found.sort(key=lambda row: (not row[1].report.memory.fits, -row[1].tokens_per_second))
  head = ("tokens/s at most", "MFU at most", "limited by", "memory of a device", "", "overrides")
  rows = [
    (
      f"{report.tokens_per_second:,.0f}",
      f"{report.mfu:.0%}",
      report.report.bound.limited_by,
      gib(report.report.memory.needed),
      "fits" if report.report.memory.fits else "does not fit",
      "; ".join(params),
    )
    for params, report in found
  ]
  print(f"{name}:\n{table([head, *rows], indent='  ')}\n", flush=True)
  result = [{"gin_params": params, **report.to_dict()} for params, report in found]
  return {"target": name, "sweep": result}, any(row[1].report.memory.fits for row in found)


def _compiled(
  run: Run, name: str, candidates: Sequence[tuple[str, ...]], workers: int
) -> Iterator[tuple[tuple[str, ...], RunReport | None]]:
  """The run with each set of overrides; None, and a line that says why, where it is refused."""
  from jaxmix.compile_ahead.process import CompileError, compile_all
  from jaxmix.compile_ahead.run import run_report, run_task

  runs = [run.with_params(*params) for params in candidates]
  reports = compile_all([run_task(each, name) for each in runs], workers=workers)
  for params, each, report in zip(candidates, runs, reports, strict=True):
    if isinstance(report, CompileError):
      print(f"  refused: {'; '.join(params)}: {str(report).splitlines()[0]}", file=sys.stderr)
      yield params, None
    else:
      yield params, run_report(each, report)


def _kernels(arguments: argparse.Namespace) -> int:
  from jaxmix.compile_ahead import record
  from jaxmix.compile_ahead.cases import (
    baselines_once,
    case_programs,
    case_task,
    cases_of,
    op_names,
  )
  from jaxmix.compile_ahead.process import CompileError, compile_all
  from jaxmix.compile_ahead.targets import target
  from jaxmix.compile_ahead.text import case_rows, compare_with_attention, gpu_table, tpu_table

  dtype = arguments.dtype or "bfloat16"
  programs = baselines_once(
    (case, target(name))
    for op, names in cases_of(arguments.kernels or op_names(), arguments.case).items()
    for name in arguments.target
    for case in case_programs(
      op,
      target(name),
      names=names,
      dtype=dtype,
      implementations=arguments.implementation,
    )
  )
  tasks = [case_task(case, chip) for case, chip in programs]
  rows: dict[str, list[dict]] = {"tpu": [], "cuda": []}
  refused = 0
  for (case, chip), report in zip(
    programs, compile_all(tasks, workers=arguments.workers), strict=True
  ):
    if isinstance(report, CompileError):
      refused += 1
      print(f"{chip.name} {case}: {report}", file=sys.stderr)
    else:
      rows[chip.platform] += case_rows(case, report)
  compare_with_attention(rows["tpu"])
  for platform, show in (("tpu", tpu_table), ("cuda", gpu_table)):
    if rows[platform]:
      print(show(rows[platform]))
  if arguments.json:
    Path(arguments.json).write_text(json.dumps(rows["tpu"] + rows["cuda"], indent=1))
  if arguments.record:
    print(record.write(Path(arguments.record), rows["tpu"]))
  return int(refused > 0)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(compile_ahead, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
