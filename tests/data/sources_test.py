"""The standard library as a source, and paths with variables."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jaxmix.data import StandardLibrary
from jaxmix.data.paths import cache_folder, expand_path
from jaxmix.data.sources import _library_files


def test_standard_library_has_three_splits_of_real_source_text():
  source = StandardLibrary()
  sizes = {split: source.fingerprint(split)["bytes"] for split in source.splits}
  assert source.splits == ("train", "validation", "test")
  assert sizes["train"] > 5_000_000
  assert all(0.01 < sizes[split] / sizes["train"] < 0.15 for split in ("validation", "test"))
  documents = list(source.documents("validation"))
  assert len(documents) > 10
  assert sum("import " in document for document in documents) > len(documents) // 2


def test_standard_library_splits_share_no_document():
  source = StandardLibrary()
  splits = [set(source.documents(split)) for split in source.splits]
  assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


def test_standard_library_leaves_out_tests_and_installed_packages():
  names = [name for split in StandardLibrary.splits for name, _ in _library_files(split)]
  assert "json/decoder.py" in names
  parts = {part for name in names for part in name.split("/")}
  assert not parts & {"site-packages", "test", "tests", "idle_test", "__pycache__"}


def test_standard_library_is_the_same_in_a_fresh_interpreter():
  script = (
    "import json; from jaxmix.data import StandardLibrary as S; s = S();"
    "print(json.dumps([s.fingerprint('test'), next(s.documents('test'))]))"
  )
  result = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, check=True
  )
  source = StandardLibrary()
  here = [source.fingerprint("test"), next(source.documents("test"))]
  assert json.loads(result.stdout) == here


def test_an_unknown_split_lists_those_that_exist():
  with pytest.raises(ValueError, match="no split 'dev' — it has train, validation, test"):
    next(StandardLibrary().documents("dev"))


def test_paths_expand_home_and_variables(monkeypatch, tmp_path):
  monkeypatch.setenv("CORPUS", str(tmp_path))
  monkeypatch.setenv("HOME", "/home/someone")
  assert expand_path("${CORPUS}/a.txt") == expand_path("$CORPUS/a.txt") == tmp_path / "a.txt"
  assert str(expand_path("~/a.txt")) == "/home/someone/a.txt"


def test_an_unset_variable_is_named(monkeypatch):
  monkeypatch.delenv("CORPUS", raising=False)
  with pytest.raises(ValueError, match=r"environment variable CORPUS, which is not set — set it"):
    expand_path("${CORPUS}/a.txt")


@pytest.mark.parametrize("path, error", [(3, TypeError), (None, TypeError), ("", ValueError)])
def test_what_is_no_path_is_an_error(path, error):
  with pytest.raises(error, match="expected"):
    expand_path(path)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert cache_folder(None) == tmp_path / "jaxmix"
  assert cache_folder(tmp_path / "own") == tmp_path / "own"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert cache_folder(None) == tmp_path / ".cache" / "jaxmix"
