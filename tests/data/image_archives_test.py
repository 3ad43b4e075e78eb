"""Images from ZIP archives: order, splits, the subset of CIFAR-10, errors."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxmix.data import ImageArchives, LabelledDataset


def png(value: int, size=(4, 3)) -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", size, (value, 0, 255)).save(buffer, "PNG")
  return buffer.getvalue()


def archive(path, classes=("cat", "dog"), count=3, **extra):
  with zipfile.ZipFile(path, "w") as file:
    for label, name in enumerate(classes):
      for number in range(count):
        file.writestr(f"some/{name}/{number:03}.png", png(10 * number + label))
    for name, data in extra.items():
      file.writestr(f"some/cat/{name}", data)
  return path


def test_rows(tmp_path):
  """Classes alternate, so that what is held out has all of them."""
  archive(tmp_path / "a.zip"), archive(tmp_path / "b.zip", count=1)
  source = ImageArchives(tmp_path / "a.zip", tmp_path / "b.zip", validation_examples=2)
  data = LabelledDataset(source)
  assert dict(data.outline.sizes) == {"image_shape": (3, 4, 3), "classes": 2}
  assert [data.targets(split) for split in source.splits] == [4, 2, 2]
  batch = next(data.epoch("train", batch_size=4))
  assert batch["label"].tolist() == [0, 1, 0, 1]
  np.testing.assert_allclose(batch["image"][:, 0, 0, 0] * 255, [0, 1, 10, 11], rtol=1e-6)
  assert (batch["image"][..., 1:] == [0, 1]).all()
  held_out = next(data.epoch("validation", batch_size=2))
  np.testing.assert_allclose(held_out["image"][:, 0, 0, 0] * 255, [20, 21], rtol=1e-6)


def test_cifar10_subset(shared):
  folder = shared / "data" / "cifar10-subset"
  data = LabelledDataset(ImageArchives(folder / "train.zip", folder / "test.zip"))
  assert dict(data.outline.sizes) == {"image_shape": (32, 32, 3), "classes": 10}
  assert [data.targets(split) for split in data.source.splits] == [9_000, 1_000, 2_000]
  for split, count in (("validation", 100), ("test", 200)):
    batch = next(data.epoch(split, batch_size=10 * count))
    assert np.bincount(batch["label"]).tolist() == [count] * 10


def test_errors(tmp_path):
  good = archive(tmp_path / "good.zip")
  with pytest.raises(FileNotFoundError, match=r"none.zip does not exist"):
    ImageArchives(tmp_path / "none.zip", good).rows("train")
  (tmp_path / "text.zip").write_text("no archive")
  with pytest.raises(ValueError, match=r"text.zip is no ZIP archive"):
    ImageArchives(tmp_path / "text.zip", good).rows("train")
  other = archive(tmp_path / "other.zip", classes=("cat", "emu"))
  with pytest.raises(ValueError, match=r"has the classes cat, emu — expected .* cat, dog"):
    ImageArchives(good, other).rows("test")
  sizes = archive(tmp_path / "sizes.zip", **{"9.png": png(0, (5, 5))})
  with pytest.raises(ValueError, match="images of 2 sizes"):
    ImageArchives(sizes, good, validation_examples=1).rows("train")
  text = archive(tmp_path / "readme.zip", **{"readme.txt": b"hello"})
  with pytest.raises(ValueError, match=r"some/cat/readme.txt is no image"):
    ImageArchives(text, good).rows("train")
  with pytest.raises(ValueError, match="validation_examples=6 of the 6 images"):
    ImageArchives(good, good, validation_examples=6).rows("train")
