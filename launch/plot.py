"""Draws the curves of several runs into one picture. The manual: python launch/plot.py --help"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import command_line

DESCRIPTION = """Draws the perplexity of several runs over their steps, or the accuracy of
classifiers, one curve a run, best first in the legend. The work directories are those of
launch/train.py; their names are the labels."""

EPILOG = f"""{command_line.EXIT_CODES}

example:
  python launch/plot.py runs/attention runs/gla runs/mamba2 --output comparison.png"""


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  parser.add_argument("workdir", nargs="+", help="the folders of the runs")
  parser.add_argument("--split", default="validation", help="default %(default)s")
  parser.add_argument("--output", required=True, metavar="PNG", help="the picture to write")
  return parser


def plot(arguments: argparse.Namespace) -> int:
  """Writes the picture and prints its name."""
  from jaxmix.training import plot_comparison

  runs = {Path(folder).name: folder for folder in arguments.workdir}
  print(plot_comparison(runs, arguments.output, split=arguments.split))
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(plot, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
