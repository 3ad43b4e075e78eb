"""Images in ZIP archives with a folder a class, such as subsets of CIFAR-10 are handed around."""

from __future__ import annotations

import functools
import io
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from jaxmix.data.checks import check_integer
from jaxmix.data.files import content
from jaxmix.data.images import ImageRows
from jaxmix.data.paths import expand_path
from jaxmix.data.sources import check_split


class ImageArchives:
  """RGB images in float32 from 0 to 1, `image` [height, width, 3], from two ZIP files.

  Names in an archive end in `class/image.suffix`, in any format that Pillow reads. Classes are
  numbered by name. Images stand in the order of their names, one of each class after the other, so
  that every part of a split has all classes.

  Args:
    train, test: the archives. `~` and `$NAME` are expanded.
    validation_examples: the last images of `train`, which are held out.
  Raises, when a split is first used:
    FileNotFoundError: an archive is missing.
    ValueError: a file is no ZIP archive or no image, images differ in size, the archives have other
      classes, or nothing is left to train on.
  """

  splits = ("train", "validation", "test")

  def __init__(
    self, train: str | os.PathLike, test: str | os.PathLike, *, validation_examples: int = 1_000
  ):
    check_integer("validation_examples", validation_examples, minimum=1)
    self._paths = {"train": train, "test": test}
    self._held_out = int(validation_examples)

  @property
  def sizes(self) -> Mapping[str, Any]:
    """image_shape, (height, width, 3), and classes."""
    images, _, classes = self._files("train")
    return {"image_shape": images.shape[1:], "classes": len(classes)}

  @property
  def length(self) -> int:
    """The pixels of an image."""
    return math.prod(self.sizes["image_shape"][:2])

  def rows(self, split: str) -> ImageRows:
    """The images of a split with their labels."""
    check_split(self, split)
    images, labels, classes = self._files("test" if split == "test" else "train")
    if split == "test":
      expected = self._files("train")[2]
      if classes != expected:
        raise ValueError(
          f"{self._path('test')} has the classes {', '.join(classes)} — expected those of "
          f"{self._path('train')}: {', '.join(expected)} — give two archives of one data set"
        )
      return ImageRows(images, labels)
    if self._held_out >= len(images):
      raise ValueError(
        f"validation_examples={self._held_out} of the {len(images)} images in "
        f"{self._path('train')} — expected fewer, so that some are left to train on — set "
        f"validation_examples={max(1, len(images) // 10)} or so"
      )
    part = slice(-self._held_out) if split == "train" else slice(-self._held_out, None)
    return ImageRows(images[part], labels[part])

  def fingerprint(self, split: str) -> dict[str, Any]:
    """What is held out, and the name, size and content of the archive."""
    check_split(self, split)
    if split == "test":
      return {"kind": "ImageArchives", **content([self._path("test")])}
    held_out = {"validation_examples": self._held_out}
    return {"kind": "ImageArchives", **held_out, **content([self._path("train")])}

  def _files(self, name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    return _read(self._path(name))

  def _path(self, name: str) -> Path:
    path = expand_path(self._paths[name])
    if not path.is_file():
      raise FileNotFoundError(f"{path} does not exist — expected a ZIP archive — check the path")
    return path


@functools.lru_cache(maxsize=4)
def _read(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  """Images [N, height, width, 3] uint8, labels [N] and names of classes, read once a process."""
  if not zipfile.is_zipfile(path):
    raise ValueError(
      f"{path} is no ZIP archive — expected one with a folder a class — fetch it again"
    )
  with zipfile.ZipFile(path) as archive:
    names = [PurePosixPath(name) for name in archive.namelist() if not name.endswith("/")]
    classes = tuple(sorted({name.parent.name for name in names}))
    names.sort(key=lambda name: (name.name, name.parent.name))
    images = [_decoded(path, name, archive.read(str(name))) for name in names]
  shapes = {image.shape for image in images}
  if len(shapes) != 1:
    raise ValueError(
      f"{path} holds images of {len(shapes)} sizes — expected one size, and at least one image — "
      "resize them"
    )
  labels = [classes.index(name.parent.name) for name in names]
  return np.stack(images), np.array(labels, np.int32), classes


def _decoded(path: Path, name: PurePosixPath, data: bytes) -> np.ndarray:
  try:
    with Image.open(io.BytesIO(data)) as image:
      return np.asarray(image.convert("RGB"))
  except UnidentifiedImageError:
    raise ValueError(
      f"{path}: {name} is no image — expected a folder a class with images alone — remove it"
    ) from None
