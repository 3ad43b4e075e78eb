"""Cuts the text of a run into shards for many hosts. The manual: python launch/shard.py --help"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import command_line

DESCRIPTION = """Writes the text that a run file reads as a data set of TFDS in so many array_record
files, and prints the lines of gin that read it. With TextDataset.readers, each host opens and
tokenises only the files of its own readers; there have to be as many files as readers, and as many
readers as hosts or a multiple."""

EPILOG = f"""{command_line.EXIT_CODES}

example:
  python launch/shard.py --gin_file configs/runs/corpus_gla_1b.gin \\
      --shards 64 --name corpus --data_dir shards"""


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  command_line.add_gin_options(parser)
  parser.add_argument(
    "--shards",
    type=int,
    required=True,
    metavar="N",
    help="files of a split; one of fewer documents has one for each",
  )
  parser.add_argument("--name", required=True, help="of the data set: lower case, digits and _")
  parser.add_argument(
    "--data_dir", required=True, metavar="DIR", help="the folder of data sets that all hosts see"
  )
  return parser


def shard(arguments: argparse.Namespace) -> int:
  """Writes the data set and prints how to read it."""
  from jaxmix import configuration
  from jaxmix.data import Mixture, TextDataset, prepare_tfds
  from jaxmix.training import train
  from jaxmix.training.run import SUPPLIED

  run = configuration.load(arguments.gin_file, arguments.gin_param, root=train, supplied=SUPPLIED)
  data = run.value("data")
  if not isinstance(data, TextDataset) or isinstance(data, Mixture):
    raise ValueError(
      f"{arguments.gin_file[-1]} reads a {type(data).__name__} — expected a TextDataset, the text "
      "of one source — name a run file with one; sources of a mixture are cut one by one"
    )
  folder = prepare_tfds(
    data.source, name=arguments.name, data_dir=arguments.data_dir, shards=arguments.shards
  )
  print(
    f"{folder} holds the text; to read it:\n"
    "  from jaxmix.data import TFDS\n"
    "  TextDataset.source = @TFDS()\n"
    f'  TFDS.name = "{arguments.name}"\n'
    f'  TFDS.data_dir = "{folder.parents[1]}"\n'
    f"  TextDataset.readers = {arguments.shards}"
  )
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(shard, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
