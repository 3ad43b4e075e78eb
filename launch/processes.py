"""Several processes that are one program: how they find one another, and how they leave.

Each runs the same script with the same options but for --process. jax.distributed connects them and
watches over them; it ends the others when one is lost. Before that, where the processes are given
one by one, each calls process 0, because jax does not say who is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import command_line

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
    hosts = _roll_call(
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


def _roll_call(coordinator: str, *, processes: int, process: int, seconds: float) -> dict[int, str]:
  """Every process calls process 0, which tells all who is there: process -> name of its host.

  Raises:
    TimeoutError: some did not call in time, or process 0 did not answer; it names them.
    ValueError: two have the same place.
  """
  host, _, port = coordinator.rpartition(":")
  deadline = time.monotonic() + seconds
  answer = _listen if process == 0 else _call
  called = answer((host.strip("[]"), int(port)), process, processes, deadline)
  if called is None:
    raise TimeoutError(
      f"process 0 did not answer at {coordinator} within {seconds} seconds — expected it to wait "
      "there — start it, or check the address and the firewall"
    )
  if "twice" in called:
    raise ValueError(
      f"two processes have --process {called['twice']} — expected each of 0 to {processes - 1} "
      "once — count them"
    )
  hosts = {int(index): name for index, name in called["hosts"].items()}
  missing = [str(index) for index in range(processes) if index not in hosts]
  if missing:
    here = ", ".join(f"{index} on {name}" for index, name in sorted(hosts.items()))
    raise TimeoutError(
      f"process {', '.join(missing)} of {processes} did not call {coordinator} within {seconds} "
      f"seconds; there are {here} — expected all — look at what the missing one says, and start it"
    )
  return hosts


def _listen(address: tuple[str, int], process: int, processes: int, deadline: float) -> dict:
  callers: dict[int, tuple[str, socket.socket]] = {}
  twice = {}
  with socket.create_server(("", address[1])) as server:
    while not twice and time.monotonic() < deadline:
      callers = {index: each for index, each in callers.items() if not _hung_up(each[1])}
      if len(callers) == processes - 1:
        break
      server.settimeout(min(max(deadline - time.monotonic(), 0.01), 1))
      try:
        caller = server.accept()[0]
        caller.settimeout(5)
        index, name = json.loads(caller.makefile().readline(1000))
      except (OSError, ValueError):
        continue  # nobody yet, or not one of ours
      if index == process or index in callers:
        twice = {"twice": index}
      callers[index] = (name, caller)
  names = {index: name for index, (name, _) in callers.items()}
  called = {"hosts": {process: socket.gethostname(), **names}, **twice}
  for _, caller in callers.values():
    with caller, contextlib.suppress(OSError):
      caller.sendall(json.dumps(called).encode() + b"\n")
      caller.recv(1)  # it hangs up first, so that the port is free for jax at once
  return called


def _hung_up(caller: socket.socket) -> bool:
  caller.setblocking(False)
  try:
    return not caller.recv(1)
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    caller.settimeout(5)


def _call(address: tuple[str, int], process: int, processes: int, deadline: float) -> dict | None:
  while time.monotonic() < deadline:
    try:
      with socket.create_connection(address, timeout=5) as caller:
        caller.sendall(json.dumps([process, socket.gethostname()]).encode() + b"\n")
        caller.settimeout(max(deadline - time.monotonic(), 0) + 10)  # process 0 may be slower
        return json.loads(caller.makefile().readline())
    except (OSError, ValueError):
      time.sleep(0.1)  # process 0 is not there yet, or what answers is a former one that ends
  return None


def _leave(error: BaseException, arguments: argparse.Namespace) -> None:
  """Tells of the error and ends the process at once: at its usual end it waits for the others."""
  import jax

  where = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
  code = command_line.explained(error, show_traceback=arguments.traceback, where=where)
  if code is None:
    traceback.print_exception(error)
    print(f"{_program()}: {where}the error above ends this process", file=sys.stderr, flush=True)
    code = 1
    # It may come from the loss of another process, which jax is then about to name.
    time.sleep(arguments.heartbeat_timeout + 5)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _program() -> str:
  return os.path.basename(sys.argv[0])
