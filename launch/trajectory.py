"""Draws a text's path on the Grassmann manifold. The manual: python launch/trajectory.py --help"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import command_line

DESCRIPTION = """Draws the planes that a Grassmann mixer of a trained model spans along a text: a
path on the Grassmann manifold Gr(2, rank), the principal angles between successive planes, and how
far the text turns in every layer. The plane of a token is that with its partner at the layer's
first offset; with several heads, in the first head."""

EPILOG = f"""{command_line.EXIT_CODES}

example:
  python launch/trajectory.py --workdir runs/grassmann --text 'The cat sat on the mat .' \\
      --output trajectory.png"""


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  command_line.add_run_options(parser)
  parser.add_argument("--text", help="default: the first tokens of the validation split")
  parser.add_argument("--tokens", type=int, default=96, help="at most so many; default %(default)s")
  parser.add_argument("--layer", type=int, help="of the path; default: the last Grassmann layer")
  parser.add_argument("--output", required=True, metavar="PNG", help="the picture to write")
  return parser


def trajectory(arguments: argparse.Namespace) -> int:
  """Writes the picture and prints its name and the mean angles of each layer."""
  run = command_line.open_run(arguments)
  import numpy as np
  from flax import nnx

  from jaxmix import ops
  from jaxmix.analysis import plane_bases, principal_angles, reduced_states
  from jaxmix.analysis.plots import plot_trajectory

  model, tokenizer = nnx.merge(run.graph, run.params), run.data.tokenizer
  if arguments.text is None:
    tokens = next(run.data.streams("validation", batch_size=1))["inputs"][0]
  else:
    tokens = np.asarray(tokenizer.encode(arguments.text), np.int32)
  tokens = tokens[: arguments.tokens]
  bases = {}
  for layer, z in reduced_states(model, tokens).items():
    mixer = model.layers[model.block_names[layer % len(model.pattern)]].mixer
    offset = ops.offsets_of_groups(mixer.offsets, mixer.heads)[0][0]
    bases[layer] = plane_bases(z[:, 0], offset)
    smaller, larger = np.degrees(principal_angles(bases[layer][:-1], bases[layer][1:])).mean(0)
    print(f"layer {layer}, offset {offset}: mean angles {smaller:.1f} and {larger:.1f} degrees")
  layer = max(bases) if arguments.layer is None else arguments.layer
  if layer not in bases:
    raise ValueError(
      f"--layer {layer} is no Grassmann layer — expected one of {', '.join(map(str, bases))}"
    )
  words = [tokenizer.decode([int(token)]) for token in tokens]
  print(plot_trajectory(bases, words, arguments.output, layer=layer))
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(trajectory, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
