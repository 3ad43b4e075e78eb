"""Leaving a run in good order when the machine is taken away or the user presses Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# EX_TEMPFAIL of sysexits.h: a failure that goes away when the same command is run again. With it a
# scheduler tells an interrupted run from success (0), from an error of the program (1, 2) and from
# death by a signal (128 + n), and can put it back into the queue.
EXIT_CODE = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
  """A context in which SIGTERM and SIGINT ask the loop to stop between two steps.

      with Interruption() as interruption:
        for step in steps:
          ...
          if interruption.requested:
            save and leave with EXIT_CODE

  `requested` is None, then the name of the first signal, "SIGTERM" or "SIGINT". A SIGINT after that
  raises KeyboardInterrupt at once, for the user who does not want to wait for the save; another
  SIGTERM changes nothing. The former handlers come back when the context ends. Each process sees
  only the signals sent to it.

  Raises:
    RuntimeError: entered outside the main thread, where Python allows no signal handlers.
  """

  def __init__(self):
    self.requested: str | None = None
    self._former: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Interruption:
    thread = threading.current_thread()
    if thread is not threading.main_thread():
      raise RuntimeError(
        f"Interruption was entered in thread {thread.name!r} — expected the main thread, the only "
        "one that may handle signals — call the training loop from the main thread"
      )
    self._former = {number: signal.signal(number, self._handle) for number in _SIGNALS}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._former.items():
      # None stands for a handler that was not installed from Python and cannot be put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if self.requested is None:
      self.requested = signal.Signals(number).name
    elif number == signal.SIGINT:
      raise KeyboardInterrupt
