"""Evaluates a trained model over a split. The manual: python launch/evaluate.py --help"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import command_line
import processes

DESCRIPTION = """Loss, perplexity and bits per byte of a trained language model over a whole split
of its data; loss and accuracy of a classifier.

Each row of the data is read by itself, as in training. With --carry_state the split is read as
--batch_size long streams, the model's state carried from row to row: what a recurrent mixer gains
from a longer past. Learned positions start again in every row. Softmax attention without a window
remembers at most Attention.max_length tokens of a stream."""

EPILOG = f"""output:
  A line, or with --json an object: step, split, state ("fresh" or "carried"), loss (nats per
  token), perplexity, bits_per_byte but for masked models, targets (tokens predicted). A classifier
  has step, split, loss (nats per example), accuracy (from 0 to 1), targets (examples). The object
  is also appended to evaluations.jsonl in the work directory.

{processes.MANUAL}

{command_line.EXIT_CODES}

examples:
  python launch/evaluate.py --workdir runs/quickstart
  python launch/evaluate.py --workdir runs/quickstart --split test --step best --json
  python launch/evaluate.py --workdir runs/quickstart --carry_state --batch_size 4"""


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  command_line.add_run_options(parser)
  parser.add_argument(
    "--split", default="validation", help="train, validation (default) or test, or as the data has"
  )
  parser.add_argument(
    "--batch_size",
    type=int,
    metavar="ROWS",
    help="rows at a time, over all devices; default: that of the training",
  )
  parser.add_argument(
    "--carry_state", action="store_true", help="carry the state along the split, see above"
  )
  parser.add_argument("--json", action="store_true", help="print the figures as JSON")
  processes.add_options(parser)
  return parser


def evaluate(arguments: argparse.Namespace) -> int:
  """Evaluates, prints and notes the figures; returns the exit code."""
  run = command_line.open_run(arguments)
  import jax

  from jaxmix.evaluation.run import evaluate_split, evaluate_streams

  batch_size = arguments.batch_size
  if batch_size is None:
    batch_size = run.configuration.value("batch_size")
  given = (run.graph, run.params, run.data, arguments.split)
  if arguments.carry_state:
    figures = evaluate_streams(*given, batch_size=batch_size, mesh=run.mesh)
  else:
    figures = evaluate_split(
      *given,
      batch_size=batch_size,
      mesh=run.mesh,
      objective=run.configuration.value("objective"),
    )
  row = {"step": run.step, "split": arguments.split}
  if "accuracy" not in figures:
    row["state"] = "carried" if arguments.carry_state else "fresh"
  row |= figures
  text = json.dumps(row)
  if jax.process_index() == 0:
    with open(Path(arguments.workdir).expanduser() / "evaluations.jsonl", "a") as notes:
      notes.write(text + "\n")
  processes.say(text if arguments.json else _line(row))
  return 0


def _line(row: dict) -> str:
  if "accuracy" in row:
    return (
      f"step {row['step']}, {row['split']}: accuracy {row['accuracy']:.2%}, "
      f"loss {row['loss']:.4f} nats/example over {row['targets']:,} examples"
    )
  bits = f", {row['bits_per_byte']:.4f} bits/byte" if "bits_per_byte" in row else ""
  return (
    f"step {row['step']}, {row['split']}, {row['state']} state: "
    f"perplexity {row['perplexity']:.3f}, loss {row['loss']:.4f} nats/token{bits} "
    f"over {row['targets']:,} tokens"
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(processes.joined(evaluate), options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
