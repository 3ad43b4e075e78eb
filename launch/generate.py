"""Lets a trained model continue text. The manual: python launch/generate.py --help"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import command_line

if TYPE_CHECKING:
  from jaxmix.data import StreamDecoder
  from jaxmix.ops import FilterErrors

DESCRIPTION = """Continues a prompt with a trained model, and prints the text as it is made.

The prompt is --prompt, or standard input where there is none; the line break at its end is
dropped. It is printed first, then what the model makes of it, until the model ends the document
or --max_new_tokens are made. Several prompts are continued side by side as one batch, and printed
one after the other when all are done. An empty prompt asks for a new document, which a model
knows how to begin only where it has read one document after another (TextDataset.packing =
"blocks" with a separator)."""

EPILOG = f"""choosing tokens:
  --temperature 0 always takes the most likely one. Above it, each is drawn by its probability:
  below 1 the likely ones more often, above 1 less. --top_k keeps the most likely K tokens,
  --top_p of these the fewest that have probability P together. One --seed gives one text.

{command_line.EXIT_CODES}

examples:
  python launch/generate.py --workdir runs/quickstart --prompt 'def main('
  python launch/generate.py --workdir runs/quickstart --prompt 'class A' --prompt 'if ' --top_k 5
  python launch/generate.py --workdir runs/wikitext2_monarch_small --prompt ' = ' --modes 16
  printf 'if x' | python launch/generate.py --workdir runs/quickstart --top_p 0.9 --stats | head"""


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  command_line.add_run_options(parser)
  parser.add_argument(
    "--prompt", action="append", metavar="TEXT", help="text to continue; repeatable, for a batch"
  )
  parser.add_argument(
    "--max_new_tokens", type=int, default=256, metavar="N", help="at most; default %(default)s"
  )
  parser.add_argument("--temperature", type=float, default=0.8, help="default %(default)s")
  parser.add_argument("--top_k", type=int, metavar="K", help="default: all tokens")
  parser.add_argument("--top_p", type=float, metavar="P", help="default: all tokens")
  parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
  parser.add_argument(
    "--modes",
    type=int,
    metavar="S",
    help="continue with the long convolutions of Monarch mixers fitted by so many decaying waves a "
    "channel, 16 for instance: a token then costs the same after any number of others; how far the "
    "filters are off is told on stderr",
  )
  parser.add_argument(
    "--stats", action="store_true", help="print tokens per second and ms per token on stderr"
  )
  return parser


def generate(arguments: argparse.Namespace) -> int:
  """Continues the prompts and prints them; returns the exit code."""
  prompts = [_text(os.fsencode(prompt)) for prompt in arguments.prompt or ()]
  prompts = prompts or [_text(_standard_input())]
  run = command_line.open_run(arguments)
  import jax

  from jaxmix import inference
  from jaxmix.data import TextDataset

  if not isinstance(run.data, TextDataset):
    raise ValueError(
      f"{arguments.workdir} holds a classifier, trained on a {type(run.data).__name__} — expected "
      "a language model — see launch/evaluate.py for its accuracy"
    )
  graph, params = run.graph, run.params
  if arguments.modes is not None:
    graph, params, errors = inference.distill_filters(graph, params, modes=arguments.modes)
    _print_errors(errors)
  tokenizer = run.data.tokenizer
  ids = [tokenizer.encode(prompt) for prompt in prompts]
  # A model makes bytes that no character has; a terminal without U+FFFD shall show something too.
  sys.stdout.reconfigure(errors="replace")
  with jax.set_mesh(run.mesh):
    steps = _Timed(
      inference.generate(
        graph,
        params,
        ids,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        end_id=tokenizer.end_id,
      )
    )
    if len(prompts) == 1:
      _print_text(prompts[0], tokenizer.decoder(), ids[0], (token for (token,) in steps))
    else:
      made = list(steps)
      for row, prompt in enumerate(prompts):
        print(f"--- {row + 1} of {len(prompts)} ---")
        _print_text(prompt, tokenizer.decoder(), ids[row], (step[row] for step in made))
  if arguments.stats:
    print(steps.summary(), file=sys.stderr)
  return 0


def _print_errors(errors: Mapping[int, Mapping[str, FilterErrors]]) -> None:
  """Tells on stderr how far distilled filters are off."""
  import numpy as np

  for layer, groups in errors.items():
    for name, each in groups.items():
      middle, worst = np.median(each.relative), each.relative.max()
      print(
        f"layer {layer}, {name} filters: off by {middle:.2%} of their norm in the middle channel, "
        f"{worst:.2%} in the worst; by {each.largest.max():.2g} at a lag",
        file=sys.stderr,
      )


def _print_text(
  prompt: str, decoder: StreamDecoder, prompt_ids: Iterable[int], tokens: Iterable[int | None]
) -> None:
  """Prints the prompt and each token's characters as soon as there are any, up to a row's end."""
  for token in prompt_ids:  # whether a space comes first depends on what the prompt ends with
    decoder.push(token)
  print(prompt, end="", flush=True)
  for token in tokens:
    if token is not None:
      print(decoder.push(token), end="", flush=True)
  print(decoder.flush())


class _Timed:
  """Passes steps on, and takes the time of the first and of the others."""

  def __init__(self, steps: Iterator[list[int | None]]):
    self._steps = steps
    self._started = time.perf_counter()
    self._moments: list[float] = []
    self._tokens = 0  # made after the first step, over all rows

  def __iter__(self) -> Iterator[list[int | None]]:
    for step in self._steps:
      self._tokens += sum(token is not None for token in step) if self._moments else 0
      self._moments.append(time.perf_counter())
      yield step

  def summary(self) -> str:
    """One line for the user."""
    if not self._moments:
      return "no token was made"
    first = f"first token after {self._moments[0] - self._started:.2f} s, with compilation"
    steps = len(self._moments) - 1
    if not steps:
      return first
    seconds = self._moments[-1] - self._moments[0]
    return (
      f"{first}; then {steps} steps of {seconds / steps * 1e3:.2f} ms, "
      f"{self._tokens / seconds:.1f} tokens/s"
    )


def _standard_input() -> bytes:
  if sys.stdin.isatty():
    print("The prompt, ended by Ctrl-D on a line of its own:", file=sys.stderr)
  return sys.stdin.buffer.read().removesuffix(b"\n")


def _text(prompt: bytes) -> str:
  try:
    return prompt.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"the prompt is not UTF-8: byte {error.start} is 0x{prompt[error.start]:02x} — expected text "
      "in UTF-8 — convert it first, e.g. with iconv"
    ) from None


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(generate, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
