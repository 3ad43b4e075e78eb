"""TensorFlow Datasets without TensorFlow: text from a data set, and a data set from any text.

The only file that imports `tensorflow_datasets`. Data sets are array_record files, read by index.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils.shard_utils import ShardConfig

from jaxmix.data.checks import check_integer
from jaxmix.data.paths import exclusive, expand_path, expand_variables
from jaxmix.data.sources import Source, check_split, with_text

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class TFDS:
  """Documents from a data set of TensorFlow Datasets that has been prepared as array_record files.

  Args:
    name: as TFDS names data sets: "imdb_reviews", "my_corpus:1.0.0", "wikipedia/simple:1.0.0".
    data_dir: the folder of data sets, local or a bucket; `~` and `$NAME` are expanded. None is
      TFDS's own default.
    train, validation, test: what of the data set makes up each split, in TFDS's notation:
      "train[:95%]". None, or a name that the data set does not have, means that there is no such
      split.
    text_feature: the feature that holds the text.
  Raises, when the data set is first used:
    FileNotFoundError: it is not there.
    ValueError: it has no such feature, is not array_record, or a split is wrong or without text.
  """

  def __init__(
    self,
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    train: str | None = "train",
    validation: str | None = "validation",
    test: str | None = "test",
    text_feature: str = "text",
  ):
    if not isinstance(name, str) or not isinstance(text_feature, str):
      raise TypeError(f"name={name!r}, text_feature={text_feature!r} — expected strings")
    named = {"train": train, "validation": validation, "test": test}
    wrong = {k: v for k, v in named.items() if v is not None and not isinstance(v, str)}
    if wrong:
      raise TypeError(f'{wrong} — expected parts of the data set as strings, e.g. "train[:95%]"')
    self._name = name
    self._data_dir = data_dir
    self._parts = {split: part for split, part in named.items() if part is not None}
    self._feature = text_feature

  @property
  def splits(self) -> tuple[str, ...]:
    """The splits whose part the data set has."""
    has = self._builder.info.splits
    return tuple(split for split, part in self._parts.items() if part.partition("[")[0] in has)

  def documents(self, split: str) -> Iterator[str]:
    """The documents of `split` in the order of the data set."""
    check_split(self, split)
    part = self._parts[split]
    where = f"split {part!r} of {self._name}"
    try:
      examples = self._builder.as_data_source(part)
    except NotImplementedError as error:
      raise ValueError(
        f"{self._name} cannot be read by index: {_line(error)} — expected array_record "
        'files — prepare it with file_format="array_record"'
      ) from error
    except ValueError as error:
      raise ValueError(
        f"{where} is not a part of the data set: {_line(error)} — expected TFDS's "
        "notation — write it like train[:95%]"
      ) from error
    yield from with_text(self._texts(examples, where), where=where)

  def fingerprint(self, split: str) -> dict[str, Any]:
    """Name, version, part, number and size of examples; what `prepare_tfds` made them from."""
    check_split(self, split)
    part = self._parts[split]
    info = self._builder.info
    stored_split = part.partition("[")[0]
    stored = info.splits[stored_split]
    return {
      "kind": "TFDS",
      "name": info.full_name,
      "part": part,
      "text_feature": self._feature,
      "examples": stored.num_examples,
      "bytes": int(stored.num_bytes),
      "shards": list(stored.shard_lengths),
      "made_from": (info.metadata or {}).get("made_from", {}).get(stored_split),
    }

  def shards(self, split: str) -> list[tuple[str, TFDS]]:
    """What each file has of `split`, as a source of its own."""
    check_split(self, split)
    stored, _, _ = self._parts[split].partition("[")
    splits = self._builder.info.splits
    lengths = splits[stored].shard_lengths
    starts = itertools.accumulate(lengths[:-1], initial=0)
    files = [piece.filename for piece in splits[stored].file_instructions]
    start_of = dict(zip(files, starts, strict=True))
    shards = []
    for piece in splits[self._parts[split]].file_instructions:
      start = start_of[piece.filename] + piece.skip
      shard = copy.copy(self)
      shard._parts = {split: f"{stored}[{start}:{start + piece.take}]"}
      shards.append((f"{self._name}, {shard._parts[split]}", shard))
    return shards

  def manifest(self, split: str) -> dict[str, Any]:
    """The fingerprint, which is made without reading any example."""
    return self.fingerprint(split)

  @functools.cached_property
  def _builder(self) -> tfds.core.DatasetBuilder:
    data_dir = None if self._data_dir is None else expand_variables(self._data_dir)
    try:
      builder = tfds.builder(self._name, data_dir=data_dir)
      prepared = builder.is_prepared()
    except tfds.core.DatasetNotFoundError:
      prepared = False
    if not prepared:
      raise FileNotFoundError(
        f"no prepared data set {self._name!r} in {data_dir or 'the default folder of TFDS'} — "
        "expected array_record files — make them by prepare_tfds, or check name and data_dir"
      )
    if self._feature not in builder.info.features:
      raise ValueError(
        f"{self._name} has no feature {self._feature!r} — it has "
        f"{', '.join(builder.info.features)} — name one by text_feature="
      )
    return builder

  def _texts(self, examples: Any, where: str) -> Iterator[str]:
    for number, example in enumerate(examples):
      text = example[self._feature]
      if not isinstance(text, bytes):
        raise ValueError(
          f"feature {self._feature!r} of {self._name} is {type(text).__name__} — expected text — "
          "name another by text_feature="
        )
      try:
        yield text.decode("utf-8")
      except UnicodeDecodeError as error:
        raise ValueError(
          f"{where}, example {number}: byte {error.start} does not decode as utf-8 — expected "
          "text — prepare the data set again from text in its right encoding"
        ) from None


def prepare_tfds(
  source: Source,
  *,
  name: str,
  data_dir: str | os.PathLike,
  version: str = "1.0.0",
  shards: int | None = None,
) -> Path:
  """Writes `source` as a data set of array_record files, which `TFDS(name, ...)` reads anywhere.

  All splits are written, in the order of the source; an example has one feature, `text`. Where the
  data set is there already and made from the same text, nothing is written. Several processes may
  call this at once.

  Args:
    name: lower-case letters, digits and underscores.
    data_dir: a local folder; copy it to where it is needed.
    version: three numbers; another version stands beside the first.
    shards: files of a split, which `TextDataset` with `readers` shares among hosts; a split of
      fewer documents has one for each. None leaves the number to TFDS, which goes by size.
  Returns:
    The folder of the data set, `data_dir/name/version`.
  Raises:
    ValueError: name, version or shards is malformed, or the folder holds a data set made from other
      text or in another number of shards.
  """
  if not _NAME.fullmatch(name):
    raise ValueError(
      f"name={name!r} — expected lower-case letters, digits and underscores, a letter first — e.g. "
      '"my_corpus"'
    )
  if not _VERSION.fullmatch(version):
    raise ValueError(f'version={version!r} — expected three numbers — e.g. "1.0.0"')
  if shards is not None:
    check_integer("shards", shards, minimum=1)
  folder = expand_path(data_dir)
  folder.mkdir(parents=True, exist_ok=True)
  with exclusive(folder / f".{name}.lock"):
    builder = _builder_of(source, name=name, version=version, data_dir=folder, shards=shards)
    if not builder.is_prepared():
      builder.download_and_prepare(download_config=_Preparing(num_shards=shards))
    elif TFDS(f"{name}:{version}", data_dir=folder)._builder.info.metadata != builder.made_from:
      raise ValueError(
        f"{builder.data_path} holds a data set made from other text or in other shards — expected "
        "none, or one from this source — give another version= or name=, or delete the folder"
      )
  return Path(builder.data_path)


class _Shards(ShardConfig):
  """So many shards, or one for each example of a split that has fewer."""

  def get_number_shards(self, total_size: int, num_examples: int, *others: bool) -> int:
    return min(super().get_number_shards(total_size, num_examples, *others), num_examples)


class _Preparing(tfds.download.DownloadConfig):
  def get_shard_config(self) -> ShardConfig:
    return _Shards(num_shards=self.num_shards)


def _line(error: Exception) -> str:
  return str(error).partition("\n")[0]


def _builder_of(
  source: Source, *, name: str, version: str, data_dir: Path, shards: int | None
) -> tfds.core.GeneratorBasedBuilder:
  made_from_text = {"made_from": {split: source.fingerprint(split) for split in source.splits}}
  if shards is not None:
    made_from_text["shards"] = shards

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(version)
    made_from = made_from_text

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
        builder=self,
        description="Text prepared by jaxmix.data.prepare_tfds.",
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        metadata=tfds.core.MetadataDict(made_from_text),
        disable_shuffling=True,  # otherwise examples are written in the order of a hash
      )

    def _split_generators(self, dl_manager):
      del dl_manager  # nothing is downloaded
      return {split: self._generate_examples(split) for split in source.splits}

    def _generate_examples(self, split):
      for number, text in enumerate(source.documents(split)):
        yield number, {"text": text}

  Builder.name = name
  return Builder(data_dir=data_dir, file_format="array_record")
