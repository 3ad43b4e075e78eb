"""What the python scripts of this folder share: mistakes in one line, and the options of a run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from jaxmix.training.run import Run

_ROOT = Path(__file__).resolve().parent.parent
_OWN_CODE = tuple(str(_ROOT / name) + os.sep for name in ("jaxmix", "pallas_kernels", "launch"))

EXIT_CODES = """exit codes:
  0    done
  1    it could not be done; the last line says why, and what to do
  2    an option is wrong"""


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
  """An argument parser that keeps the line breaks of its manual and has --traceback."""
  result = argparse.ArgumentParser(
    description=description,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  result.add_argument(
    "--traceback",
    action="store_true",
    help="on an error, show where in the code it was raised, beside the line that explains it",
  )
  return result


def add_gin_options(to: argparse.ArgumentParser) -> None:
  """The options of a configuration: --gin_file and --gin_param."""
  to.add_argument(
    "--gin_file",
    action="append",
    required=True,
    metavar="FILE",
    help="run file; repeatable, later ones win",
  )
  to.add_argument(
    "--gin_param",
    action="append",
    default=[],
    metavar="'NAME = VALUE'",
    help="one more line of the run file, which wins over the files; repeatable",
  )


def add_run_options(to: argparse.ArgumentParser) -> None:
  """The options that say which trained model to use: --workdir, --step, --gin_param."""
  to.add_argument(
    "--workdir", required=True, metavar="DIR", help="the folder that the run was trained in"
  )
  to.add_argument(
    "--step",
    type=_step,
    default="latest",
    metavar="STEP",
    help="which checkpoint: latest (default), best (the lowest validation loss), or a number",
  )
  to.add_argument(
    "--gin_param",
    action="append",
    default=[],
    metavar="'NAME = VALUE'",
    help="change the run's configuration, e.g. 'make_mesh.fsdp = 1' for fewer devices than it was "
    "trained on, or 'Attention.max_length = 8192' for a longer cache; repeatable",
  )


def open_run(arguments: argparse.Namespace) -> Run:
  """The run that the options of `add_run_options` name."""
  from jaxmix.training.run import load_run  # here, so that --help does not import jax

  return load_run(arguments.workdir, step=arguments.step, gin_params=arguments.gin_param)


def exit_code(work: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
  """Does the work and returns its exit code; a mistake of the user becomes one line on stderr."""
  try:
    code = work(arguments)
    sys.stdout.flush()
    return code
  except (Exception, KeyboardInterrupt) as error:
    code = explained(error, show_traceback=arguments.traceback)
    if code is None:
      raise
    return code


def explained(error: BaseException, *, show_traceback: bool, where: str = "") -> int | None:
  """Says in one line on stderr what the user did wrong; returns the exit code.

  A mistake is what jaxmix itself raises, which checks what it is given, and what the operating
  system refuses. Anything else is a defect, here or in a library: None, and nothing is said.

  Args:
    show_traceback: first show where in the code it was raised.
    where: begins the line, such as the process.
  """
  program = f"{os.path.basename(sys.argv[0])}: {where}"
  if isinstance(error, BrokenPipeError):
    # Whoever read the output has left. What is still buffered goes nowhere, so that the
    # interpreter does not complain when it flushes at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13  # as if by SIGPIPE, like every program in a pipe
  if isinstance(error, KeyboardInterrupt):
    print(f"\n{program}interrupted", file=sys.stderr)
    return 128 + 2  # as if by SIGINT
  if isinstance(error, ModuleNotFoundError) and error.name in ("jax", "jaxmix"):
    print(
      f"{program}error: {sys.executable} has no {error.name} — expected an environment with "
      f"jaxmix — use the interpreter that this prints: bash {_ROOT / 'launch/environment.sh'}",
      file=sys.stderr,
    )
    return 1
  if not _is_users(error):
    return None
  if show_traceback:
    traceback.print_exception(error)
  print(f"{program}error: {error}", file=sys.stderr)
  return 1


def command(script: str, *options: str) -> str:
  """The command line that runs a script of this folder with this interpreter, to be copied."""
  return shlex.join([_shown(sys.executable), _shown(str(_ROOT / "launch" / script)), *options])


def _is_users(error: BaseException) -> bool:
  """Whether the operating system refused, or a `raise` statement of our own code was reached."""
  frames = traceback.extract_tb(error.__traceback__)
  raised = frames[-1].filename.startswith(_OWN_CODE) and frames[-1].line.startswith("raise ")
  return raised or isinstance(error, OSError)


def _shown(path: str) -> str:
  relative = os.path.relpath(path)
  return path if relative.startswith("..") else relative


def _step(text: str) -> int | str:
  if text in ("latest", "best"):
    return text
  if text.isdecimal():
    return int(text)
  raise argparse.ArgumentTypeError(f"{text!r} is not latest, best or a number of steps")
