"""Images and their labels from IDX files, the format of MNIST (LeCun et al. 1998) and its kin."""

from __future__ import annotations

import functools
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.data.checks import check_integer
from jaxmix.data.files import content, unpacked
from jaxmix.data.packing import Row
from jaxmix.data.paths import expand_path
from jaxmix.data.sources import check_split

_UINT8 = 8  # the code of the format for its dtype


class IDXImages:
  """The images of a folder of IDX files, in float32 from 0 (black) to 1: `image` [height, width].

  The folder holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, each as
  it is or as .gz. There are three splits: "train"; "validation", the last images of the training
  files, which "train" then lacks; and "test".

  Args:
    folder: of the files. `~` and `$NAME` are expanded.
    classes: labels are 0 to classes - 1.
    validation_examples: images of the training files that are held out; 5,000 of MNIST's 60,000.
  Raises, when a split is first used:
    FileNotFoundError: a file is missing.
    ValueError: a file is not of this format or cut short; images and labels differ in number; a
      label is out of range; nothing is left to train on.
  """

  splits = ("train", "validation", "test")

  def __init__(
    self, folder: str | os.PathLike, *, classes: int = 10, validation_examples: int = 5_000
  ):
    check_integer("classes", classes, minimum=2)
    check_integer("validation_examples", validation_examples, minimum=1)
    self._folder = folder
    self._classes = int(classes)
    self._held_out = int(validation_examples)

  @property
  def sizes(self) -> Mapping[str, Any]:
    """image_shape, (height, width) in pixels, and classes."""
    return {"image_shape": self._files("train")[0].shape[1:], "classes": self._classes}

  @property
  def length(self) -> int:
    """The pixels of an image."""
    return math.prod(self.sizes["image_shape"])

  def rows(self, split: str) -> ImageRows:
    """The images of a split with their labels, in the order of the files."""
    check_split(self, split)
    images, labels = self._files(split)
    if split != "test":
      if self._held_out >= len(images):
        raise ValueError(
          f"validation_examples={self._held_out} of the {len(images)} training images in "
          f"{self._path('train', 'images')} — expected fewer, so that some are left to train on — "
          f"set validation_examples={max(1, len(images) // 12)} or so"
        )
      part = slice(-self._held_out) if split == "train" else slice(-self._held_out, None)
      images, labels = images[part], labels[part]
    return ImageRows(images, labels)

  def fingerprint(self, split: str) -> dict[str, Any]:
    """What is held out, and the names, size and content of the files."""
    check_split(self, split)
    held_out = {} if split == "test" else {"validation_examples": self._held_out}
    files = [self._path(split, kind) for kind in ("images", "labels")]
    return {"kind": "IDXImages", "classes": self._classes, **held_out, **content(files)}

  def _files(self, split: str) -> tuple[np.ndarray, np.ndarray]:
    path, labels_path = self._path(split, "images"), self._path(split, "labels")
    images, labels = _read(path, 3), _read(labels_path, 1)
    if len(images) != len(labels):
      raise ValueError(
        f"{path} has {len(images)} images and {labels_path} {len(labels)} labels — expected one "
        "label an image — give the two files of one data set"
      )
    if labels.size and labels.max() >= self._classes:
      place = int(np.argmax(labels >= self._classes))
      raise ValueError(
        f"{labels_path} has the label {labels[place]} at image {place} — expected 0 to "
        f"{self._classes - 1} — set IDXImages.classes={int(labels.max()) + 1}, or repair the file"
      )
    return images, labels

  def _path(self, split: str, kind: str) -> Path:
    stem = "t10k" if split == "test" else "train"
    name = f"{stem}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    folder = expand_path(self._folder)
    for path in (folder / name, folder / f"{name}.gz"):
      if path.is_file():
        return path
    raise FileNotFoundError(
      f"{folder} has no {name} or {name}.gz — expected the four files of MNIST, or of a data set "
      "like it — check the folder, or fetch them"
    )


class ImageRows:
  """`image` [height, width] float32 and `label` int32 by index, from arrays of uint8."""

  def __init__(self, images: np.ndarray, labels: np.ndarray):
    self._images, self._labels = images, labels

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Row:
    image = self._images[index].astype(np.float32) / np.float32(255)
    return {"image": image, "label": self._labels[index].astype(np.int32)}


@functools.lru_cache(maxsize=8)
def _read(path: Path, dimensions: int) -> np.ndarray:
  """The array of uint8 in an IDX file, read once a process."""
  data = b"".join(unpacked(path))
  header = 4 * (1 + dimensions)
  if data[:4] != bytes([0, 0, _UINT8, dimensions]) or len(data) < header:
    raise ValueError(
      f"{path} begins with {data[:4].hex() or 'nothing'} — expected an IDX file of bytes in "
      f"{dimensions} dimensions, which begins with 00000{_UINT8}0{dimensions} — give the file that "
      "the name says"
    )
  shape = struct.unpack_from(f">{dimensions}I", data, 4)
  if len(data) - header != math.prod(shape):
    raise ValueError(
      f"{path} holds {len(data) - header} bytes behind its header — expected "
      f"{math.prod(shape)} for {' x '.join(map(str, shape))} — fetch it again"
    )
  return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
