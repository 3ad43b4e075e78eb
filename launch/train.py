"""Trains a model as a run file says. The manual: python launch/train.py --help"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import command_line
import processes

DESCRIPTION = """Trains a language model or a classifier as a run file says, or goes on with the run
that the work directory holds.

a run file:
  gin: lines `name.parameter = value`, and `include` of other files. configs/runs/ holds whole
  runs; they include a model, a data set, an optimizer and a mesh from the folders beside it.
  Everything is an argument of jaxmix.training.train or of what is given to it. A name, a
  parameter or a type that is wrong is an error with the nearest right one, before anything runs.
  Files are looked up as given, then in the checkout of jaxmix."""

EPILOG = f"""what lands in the work directory:
  checkpoints/     the newest and the best by validation loss, each with the place in the data
  config.gin       the configuration with every default written out; printed at the start
  metrics.jsonl    a line of figures every train.log_every steps and at each evaluation
  loss.png         the losses so far
  tensorboard/     with --gin_param 'train.tensorboard = True'

stopping and going on:
  The same command goes on from the newest checkpoint, step by step as if it had never stopped.
  Ctrl-C or SIGTERM saves first; a second Ctrl-C does not wait. After a kill, the steps since the
  last checkpoint are done again.
  A newest checkpoint that is damaged is set aside, and the one before it is read.
  launch/supervise.py runs the command again by itself.

{processes.MANUAL}
  A signal to one of them saves and stops all, at the same step; it is noticed within seconds.

{command_line.EXIT_CODES}
  75   stopped by a signal, and saved: run the same command again (EX_TEMPFAIL, for schedulers)

examples:
  python launch/train.py --gin_file configs/runs/quickstart.gin --workdir runs/quickstart
  python launch/train.py --gin_file configs/runs/quickstart.gin --workdir runs/wide \\
      --gin_param 'Decoder.dim = 256' --gin_param 'train.steps = 4000'
  python launch/train.py --gin_file run.gin --gin_file changes.gin --workdir runs/mine"""


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  command_line.add_gin_options(parser)
  parser.add_argument(
    "--workdir", required=True, metavar="DIR", help="folder of the run; made if absent"
  )
  processes.add_options(parser)
  return parser


def train(arguments: argparse.Namespace) -> int:
  """Trains, and says where things are; returns the exit code."""
  from jaxmix import configuration, training
  from jaxmix.data import TextDataset
  from jaxmix.training.interruption import EXIT_CODE
  from jaxmix.training.run import SUPPLIED

  run = configuration.load(
    arguments.gin_file, arguments.gin_param, root=training.train, supplied=SUPPLIED
  )
  text = run.operative_text()
  processes.say(text)
  result = run.call(workdir=arguments.workdir, config=text)
  workdir = ("--workdir", arguments.workdir)
  if result.interrupted:
    files = [word for name in arguments.gin_file for word in ("--gin_file", name)]
    params = [word for line in arguments.gin_param for word in ("--gin_param", line)]
    processes.say(
      f"stopped by {result.interrupted} and saved after step {result.step}; to go on:\n"
      f"  {command_line.command('train.py', *files, *params, *workdir)}"
    )
    return EXIT_CODE
  processes.say(
    f"trained {result.step} steps: checkpoints, metrics.jsonl and loss.png are in "
    f"{arguments.workdir}; next:\n"
    f"  {command_line.command('evaluate.py', *workdir)}"
  )
  if isinstance(run.value("data"), TextDataset):
    processes.say(f"  {command_line.command('generate.py', *workdir, '--prompt', 'The ')}")
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(
    processes.joined(train, agreed_stop=True), options().parse_args(argv)
  )


if __name__ == "__main__":
  sys.exit(main())
