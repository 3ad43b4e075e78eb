"""The disk or bucket that checkpoints go to."""

from __future__ import annotations

import shutil
import tempfile

from etils import epath


def make_writable(directory: epath.Path) -> None:
  """Creates the folder and writes to it once: better now than after an hour of steps."""
  repair = "move it, change its permissions, or use another work directory"
  try:
    directory.mkdir(parents=True, exist_ok=True)
    if not _is_remote(directory):
      tempfile.TemporaryFile(dir=directory).close()
  except (FileExistsError, NotADirectoryError) as error:
    raise NotADirectoryError(
      f"no checkpoints can go to {directory}: a file is in the way — expected a folder — {repair}"
    ) from error
  except OSError as error:
    raise PermissionError(
      f"no checkpoints can go to {directory}: {error} — expected a writable folder — {repair}"
    ) from error


def free_bytes(directory: epath.Path) -> int | None:
  """Free space of a local disk; None for a bucket, which does not say."""
  return None if _is_remote(directory) else shutil.disk_usage(directory).free


def _is_remote(directory: epath.Path) -> bool:
  return "://" in str(directory)
