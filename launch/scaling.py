"""Tabulates and draws how training steps scale, compiled ahead. The manual: --help"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import command_line

DESCRIPTION = """Compiles one training step of each run for each target and length, and tabulates
what a device needs, what it sends, the lower bound of the step and the tokens a second and chip
that it allows. Steps have the same number of tokens a device. Rows are dealt to devices (fsdp);
where there are fewer rows than devices, each is cut along its length over several (sequence).

Every figure is a bound, on a machine that is not here: waiting of units for one another, and
kernels below the peak, are not in it."""

EPILOG = f"""rows are added to the file of --rows, in place of those of the same run, target and
length, so that a study may be made piece by piece.

{command_line.EXIT_CODES}

examples:
  python launch/scaling.py --gin_file configs/runs/corpus_gla_1b.gin \\
      configs/runs/corpus_attention_1b.gin --target v5e:4x4 v5e:8x8 v5e:16x16 --length 4096 \\
      --rows scaling.json
  python launch/scaling.py --gin_file configs/runs/corpus_gla_1b.gin --target v5p:4x4x4 \\
      --length 2048 32768 1048576 --rows scaling.json --plot scaling.png
  python launch/scaling.py --rows scaling.json --plot scaling.png"""


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  parser.add_argument("--gin_file", nargs="*", default=[], metavar="FILE", help="runs to compile")
  parser.add_argument(
    "--gin_param",
    action="append",
    default=[],
    metavar="'NAME = VALUE'",
    help="one more line of all run files; repeatable",
  )
  parser.add_argument("--target", nargs="*", default=[], metavar="NAME", help="as compile_ahead.py")
  parser.add_argument("--length", type=int, nargs="*", default=[], metavar="T", help="of the rows")
  parser.add_argument(
    "--tokens_per_device", type=int, default=16_384, metavar="N", help="default %(default)s"
  )
  parser.add_argument("--vocab_size", type=int, default=50_257, metavar="N", help="%(default)s")
  parser.add_argument("--rows", required=True, metavar="FILE", help="JSON, read and written")
  parser.add_argument("--plot", metavar="PNG", help="draw all rows of the file")
  parser.add_argument(
    "--workers", type=int, default=2, metavar="N", help="programs compiled at a time; default 2"
  )
  return parser


def scaling(arguments: argparse.Namespace) -> int:
  """Compiles, prints, writes; returns the exit code."""
  from jaxmix.compile_ahead.process import CompileError, compile_all
  from jaxmix.compile_ahead.run import Run, run_report, run_task
  from jaxmix.compile_ahead.scaling import plot_scaling, row_of, scaled, scaling_table

  file = Path(arguments.rows)
  rows = {_key(row): row for row in json.loads(file.read_text())} if file.exists() else {}
  points = []
  for name in arguments.gin_file:
    run = Run((name,), tuple(arguments.gin_param), arguments.vocab_size)
    label = Path(name).stem.removeprefix("corpus_")
    for where in arguments.target:
      for length in arguments.length:
        sized = scaled(run, where, length=length, tokens_per_device=arguments.tokens_per_device)
        sized.configuration()  # a mistake in the files shows before anything is compiled
        points.append((label, where, length, sized))
  tasks = [run_task(run, where) for _, where, _, run in points]
  failed = 0
  for (label, where, length, run), report in zip(
    points, compile_all(tasks, workers=arguments.workers), strict=True
  ):
    if isinstance(report, CompileError):
      failed += 1
      print(f"{label}, {where}, length {length}: {report}", file=sys.stderr)
      continue
    row = row_of(label, length, run_report(run, report))
    rows[_key(row)] = row
    print(scaling_table([row]), flush=True)
    file.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
  if not rows:
    raise ValueError(
      f"{file} has no rows, and none were compiled — expected --gin_file, --target and --length, "
      "or a file of an earlier call — give them"
    )
  print(f"\n{scaling_table(list(rows.values()))}")
  if arguments.plot:
    print(f"drawn: {plot_scaling(list(rows.values()), arguments.plot)}")
  return int(failed > 0)


def _key(row: dict) -> tuple:
  return row["run"], row["target"], row["length"]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(scaling, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
