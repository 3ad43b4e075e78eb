"""What every test shares: the data folder, the golden vectors, and a cache of compiled programs."""

from __future__ import annotations

import os
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
  """The root of the checkout."""
  return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of real data sets and golden vectors that stands beside the checkout."""
  folder = pathlib.Path(os.environ.get("JAXMIX_SHARED", REPOSITORY.parent / "shared"))
  if not folder.is_dir():
    pytest.skip(f"no shared data at {folder}; set JAXMIX_SHARED to the folder that holds it")
  return folder


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
  """The folder of golden vectors, computed by reference programs."""
  folder = pathlib.Path(os.environ.get("JAXMIX_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
  if not folder.is_dir():
    pytest.skip(f"no golden vectors at {folder}; set JAXMIX_GOLDEN to the folder that holds them")
  return folder
