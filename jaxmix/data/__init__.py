"""From text to batches: sources -> tokenizers -> a token store on disk -> rows -> batches; and from
labelled examples: sources -> rows -> batches.

`import jaxmix.data` is light. Each name below is imported from its file when it is first used, so
that Grain, TFDS and the `tokenizers` library are paid for only by those who use them.
"""

from __future__ import annotations

import importlib

_HOMES = {
  "BPE": "subword",
  "Batches": "batches",
  "ByteTokenizer": "tokenizers",
  "IDXImages": "images",
  "ImageArchives": "image_archives",
  "LabelledDataset": "labelled",
  "LabelledSource": "labelled",
  "LabelledText": "labelled_text",
  "LocalFiles": "local_files",
  "Mixture": "mixture",
  "Outline": "outline",
  "SentencePairs": "sentence_pairs",
  "ShardedSource": "sources",
  "Source": "sources",
  "SplitFiles": "local_files",
  "StandardLibrary": "sources",
  "StreamDecoder": "tokenizers",
  "TFDS": "tfds",
  "TextDataset": "pipeline",
  "TokenStore": "token_store",
  "Tokenizer": "tokenizers",
  "WordPiece": "subword",
  "Words": "words",
  "open_token_store": "token_store",
  "prepare_tfds": "tfds",
  "text_outline": "outline",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
  if name in _HOMES:
    return getattr(importlib.import_module(f"jaxmix.data.{_HOMES[name]}"), name)
  raise AttributeError(
    f"module 'jaxmix.data' has no attribute {name!r}; it has {', '.join(_HOMES)}"
  )


def __dir__():
  return [*globals(), *_HOMES]
