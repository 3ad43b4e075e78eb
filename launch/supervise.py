"""Runs a command again when it fails. The manual: python launch/supervise.py --help"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

INTERRUPTED = 75  # of jaxmix.training.interruption, which this script does not import: it has jax
USAGE = 2

DESCRIPTION = """Runs a training command again when it fails, from the newest checkpoint in its
--workdir. After a failure it waits, twice as long after each one that follows without a new
checkpoint, and gives up after --failures of those. With several processes each has its own
supervisor."""

EPILOG = """what the command ends with:
  0    done; so is the supervisor
  2    an option is wrong: not run again
  75   stopped by a signal, and saved: run again at once if there is a new checkpoint. It was a
       signal to another of its processes, or to the command alone
  other, or death by a signal: run again after a while

SIGTERM and Ctrl-C are passed on; the supervisor then leaves with the exit code of the command. Its
exit code is that of the last run, 128 + n after a death by signal n.

example:
  python launch/supervise.py -- python launch/train.py --gin_file run.gin --workdir runs/mine"""


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = argparse.ArgumentParser(
    description=DESCRIPTION,
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--failures",
    type=int,
    default=5,
    metavar="N",
    help="give up after so many at the same checkpoint; default %(default)s",
  )
  parser.add_argument(
    "--wait",
    type=float,
    default=10,
    metavar="SECONDS",
    help="after the first failure, twice as long after the next; default %(default)s",
  )
  parser.add_argument(
    "--longest_wait", type=float, default=600, metavar="SECONDS", help="default %(default)s"
  )
  parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="to run, with its options")
  return parser


def supervise(command: Sequence[str], workdir: Path, arguments: argparse.Namespace) -> int:
  """Runs the command until it is done, or there is no hope; returns the exit code."""
  child: subprocess.Popen | None = None
  stopping = False

  def pass_on(number: int, frame: FrameType | None) -> None:
    nonlocal stopping
    stopping = True
    if child is not None:
      child.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)
  step, failures = _newest_checkpoint(workdir), 0
  while True:
    # A process group of its own: what a terminal sends to all must not reach it twice.
    child = subprocess.Popen(command, process_group=0)
    if stopping:  # the signal came while the child was being made
      child.terminate()
    code = child.wait()
    child = None
    code = 128 - code if code < 0 else code
    if stopping or code in (0, USAGE):
      return code
    newest = _newest_checkpoint(workdir)
    if newest != step:
      step, failures = newest, 0
      if code == INTERRUPTED:
        _say(f"interrupted after step {step}; going on")
        continue
    failures += 1
    where = f"exit code {code}, failure {failures} of {arguments.failures} at step {step}"
    if failures >= arguments.failures:
      _say(f"{where}; giving up: {shlex.join(command)}")
      return code
    wait = min(arguments.wait * 2 ** (failures - 1), arguments.longest_wait)
    _say(f"{where}; again in {wait:g} s")
    again = time.monotonic() + wait
    while time.monotonic() < again:
      time.sleep(min(0.2, wait))
      if stopping:
        return INTERRUPTED


def _newest_checkpoint(workdir: Path) -> int:
  """The step from which the command goes on; 0 where there is no checkpoint."""
  folder = workdir / "checkpoints"
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return max((int(name) for name in names if name.isdecimal()), default=0)


def _workdir(command: Sequence[str]) -> Path | None:
  for word, following in zip(command, [*command[1:], None], strict=True):
    if word == "--workdir" and following is not None:
      return Path(following).expanduser()
    if word.startswith("--workdir="):
      return Path(word.removeprefix("--workdir=")).expanduser()
  return None


def _say(text: str) -> None:
  print(f"supervise.py: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = options()
  arguments = parser.parse_args(argv)
  command = arguments.command
  if not command:
    parser.error("no command — expected one after -- — see the example in --help")
  workdir = _workdir(command)
  if workdir is None:
    parser.error(
      f"the command {shlex.join(command)} has no --workdir — expected the folder of its "
      "checkpoints — use a command of launch/train.py"
    )
  if arguments.failures < 1 or arguments.wait < 0:
    parser.error(
      f"--failures {arguments.failures} --wait {arguments.wait} — expected at least 1 and 0"
    )
  try:
    return supervise(command, workdir, arguments)
  except OSError as error:
    _say(f"error: {error} — expected a command that can be run — check {command[0]}")
    return 127  # as a shell says it


if __name__ == "__main__":
  sys.exit(main())
