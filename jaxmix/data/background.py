"""Work beside the training loop, in threads that can be told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from typing import TypeVar

T = TypeVar("T")


class Background:
  """Threads that work ahead.

  A thread that is inside of compiled code when the interpreter ends aborts the process, and one
  that is waited for may hold up its end for minutes: so `close` asks them all to stop, at the next
  item of `until_closed`, and waits for that.
  """

  def __init__(self):
    self._closed = threading.Event()
    self._threads: list[threading.Thread] = []

  def start(self, work: Callable[[], T]) -> Future[T]:
    """What `work` returns or raises."""
    future: Future[T] = Future()

    def run() -> None:
      try:
        future.set_result(work())
      except BaseException as error:  # it belongs to whoever asks for the result
        future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True, name="jaxmix-background")
    self._threads = [other for other in self._threads if other.is_alive()] + [thread]
    thread.start()
    return future

  def until_closed(self, items: Iterable[T]) -> Iterator[T]:
    """The items; CancelledError once this is closed."""
    for item in items:
      if self._closed.is_set():
        raise CancelledError("the batches that this was read for are closed")
      yield item

  def close(self) -> None:
    """Returns when no thread is at work any more."""
    self._closed.set()
    for thread in self._threads:
      thread.join()
