"""Which processes of a run are there, before jax connects them: jax does not say who is missing."""

from __future__ import annotations

import contextlib
import json
import socket
import time


def roll_call(coordinator: str, *, processes: int, process: int, seconds: float) -> dict[int, str]:
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
  callers: list[tuple[int, str, socket.socket]] = []
  twice = {}
  with socket.create_server(("", address[1])) as server:
    while not twice and time.monotonic() < deadline:
      callers = [each for each in callers if not _hung_up(each[2])]
      if len(callers) == processes - 1:
        break
      server.settimeout(min(max(deadline - time.monotonic(), 0.01), 1))
      try:
        caller = server.accept()[0]
        caller.settimeout(5)
        index, name = json.loads(caller.makefile().readline(1000))
      except (OSError, ValueError):
        continue  # nobody yet, or not one of ours
      if index in (process, *(other for other, _, _ in callers)):
        twice = {"twice": index}
      callers.append((index, name, caller))
  hosts = {process: socket.gethostname(), **{index: name for index, name, _ in callers}}
  for _, _, caller in callers:
    with caller, contextlib.suppress(OSError):
      caller.sendall(json.dumps({"hosts": hosts, **twice}).encode() + b"\n")
      caller.recv(1)  # it hangs up first, so that the port is free for jax at once
  return {"hosts": hosts, **twice}


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
