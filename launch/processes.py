"""Several processes that are one program: how they find one another, and how they leave.

Each runs the same script with the same options but for --process. jax.distributed connects them and
watches over them; it ends the others when one is lost. Before that, where the processes are given
one by one, each calls process 0, because jax does not say who is missing.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import command_line
from roll_call import roll_call

MANUAL = """several processes:
  On TPU pods and under Slurm every host runs the same command with --distributed auto. Elsewhere
  every process is told its place: --coordinator HOST:PORT --processes N --process I, I from 0 to
  N - 1, where HOST is that of process 0 and PORT is free on it. All share the work directory and
  read the same data; each reads the rows that its devices need. Process 0 reports; every process
  tells of its own errors. When one is lost the others end within --heartbeat_timeout, and jax
  names its number."""

_Work = Callable[[argparse.Namespace], int]


def add_options(to: argparse.ArgumentParser) -> None:
  """The options that make several processes one program."""
  group = to.add_argument_group("several processes")
  group.add_argument(
    "--distributed", choices=["auto"], help="auto: TPU pods and Slurm say which process this is"
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is")
  group.add_argument("--processes", type=int, metavar="N", help="how many there are")
  group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
  group.add_argument(
    "--init_timeout",
    type=int,
    default=300,
    metavar="SECONDS",
    help="how long they wait for one another at the start; default %(default)s",
  )
  group.add_argument(
    "--heartbeat_timeout",
    type=int,
    default=100,
    metavar="SECONDS",
    help="after how long a silent one counts as lost; default %(default)s",
  )


def joined(work: _Work, *, agreed_stop: bool = False) -> _Work:
  """The work of a script, after its processes have found one another if the options say so.

  An error ends this process without waiting for the others, which could wait for it.

  Args:
    agreed_stop: SIGTERM is for `jaxmix.training.interruption`; otherwise it ends the process.
  """

  def run(arguments: argparse.Namespace) -> int:
    if not _wanted(arguments):
      return work(arguments)
    _join(arguments, preemption_service=agreed_stop)
    try:
      return work(arguments)
    except (Exception, KeyboardInterrupt) as error:
      _leave(error, arguments)

  return run


def say(text: str) -> None:
  """Prints, in process 0 only."""
  import jax

  if jax.process_index() == 0:
    print(text, flush=True)


def _wanted(arguments: argparse.Namespace) -> bool:
  place = ("coordinator", "processes", "process")
  given = [f"--{name}" for name in place if getattr(arguments, name) is not None]
  if arguments.distributed:
    if given:
      raise ValueError(
        f"--distributed auto with {', '.join(given)} — expected one or the other — leave out "
        "--distributed to say yourself which process this is"
      )
    return True
  if given and len(given) < len(place):
    raise ValueError(
      f"{', '.join(given)} alone — expected --coordinator, --processes and --process together — "
      "give all three, or --distributed auto on a TPU pod or under Slurm"
    )
  if given:
    _, colon, port = arguments.coordinator.rpartition(":")
    if not colon or not port.isdecimal():
      raise ValueError(
        f"--coordinator {arguments.coordinator} — expected HOST:PORT — e.g. --coordinator "
        f"{arguments.coordinator.rstrip(':')}:8476"
      )
    if not 0 <= arguments.process < arguments.processes:
      raise ValueError(
        f"--process {arguments.process} of --processes {arguments.processes} — expected 0 to "
        f"{arguments.processes - 1} — count them from 0"
      )
  return bool(given)


def _join(arguments: argparse.Namespace, *, preemption_service: bool) -> None:
  if arguments.coordinator is not None:
    hosts = roll_call(
      arguments.coordinator,
      processes=arguments.processes,
      process=arguments.process,
      seconds=arguments.init_timeout,
    )
    if arguments.process == 0:
      names = ", ".join(f"{index} on {host}" for index, host in sorted(hosts.items()))
      print(f"processes: {names}", file=sys.stderr, flush=True)
  import jax

  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_preemption_service", preemption_service)
  timeouts = {
    "initialization_timeout": arguments.init_timeout,
    "heartbeat_timeout_seconds": arguments.heartbeat_timeout,
  }
  if arguments.coordinator is not None:
    place = (arguments.coordinator, arguments.processes, arguments.process)
    jax.distributed.initialize(*place, **timeouts)
    return
  # jax aborts the process when the time is over, so this has to be said before.
  waiting = threading.Timer(max(arguments.init_timeout - 1, 1), _still_waiting)
  waiting.daemon = True
  waiting.start()
  try:
    jax.distributed.initialize(**timeouts)
  except ValueError as error:
    raise ValueError(
      f"--distributed auto: {error} — expected a TPU pod or a Slurm step — say yourself which "
      "process this is: --coordinator HOST:PORT --processes N --process I"
    ) from error
  finally:
    waiting.cancel()


def _still_waiting() -> None:
  print(
    f"{_program()}: error: the process on {socket.gethostname()} is ready, but not all others are "
    "— expected every host to come within --init_timeout — see which host does not say this, and "
    "start it",
    file=sys.stderr,
    flush=True,
  )


def _leave(error: BaseException, arguments: argparse.Namespace) -> None:
  """Tells of the error and ends the process at once: at its usual end it waits for the others."""
  import jax

  # Asking jax may have to wait for the others, so it is the second choice.
  explicit = arguments.coordinator is not None
  process = arguments.process if explicit else jax.process_index()
  processes = arguments.processes if explicit else jax.process_count()
  where = f"process {process} of {processes} on {socket.gethostname()}: "
  code = command_line.explained(error, show_traceback=arguments.traceback, where=where)
  if code is None:
    traceback.print_exception(error)
    print(f"{_program()}: {where}the error above ends this process", file=sys.stderr, flush=True)
  if code is None or _came_from_jax(error):
    # It may come from the loss of another process, which jax is then about to name.
    time.sleep(arguments.heartbeat_timeout + 5)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1 if code is None else code)


def _came_from_jax(error: BaseException | None) -> bool:
  import jax

  while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
    error = error.__cause__ or error.__context__
  return error is not None


def _program() -> str:
  return os.path.basename(sys.argv[0])
