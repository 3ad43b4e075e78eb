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
    self._changing = threading.Lock()
    self._threads: list[threading.Thread] = []

  def start(self, work: Callable[[], T]) -> Future[T]:
    """What `work` returns or raises; CancelledError where this is closed."""
    future: Future[T] = Future()

    def run() -> None:
      try:
        future.set_result(work())
      except BaseException as error:  # it belongs to whoever asks for the result
        future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True, name="jaxmix-background")
    with self._changing:
      if self._closed.is_set():
        future.set_exception(_closed())
      else:
        thread.start()
        self._threads = [each for each in (*self._threads, thread) if each.is_alive()]
    return future

  def until_closed(self, items: Iterable[T]) -> Iterator[T]:
    """The items; CancelledError once this is closed."""
    for item in items:
      if self._closed.is_set():
        raise _closed()
      yield item

  def close(self) -> None:
    """Returns when no thread is at work any more."""
    with self._changing:
      self._closed.set()
    for thread in self._threads:
      if thread is not threading.current_thread():  # which may be collecting garbage
        thread.join()


def _closed() -> CancelledError:
  return CancelledError("the batches that this was read for are closed")
