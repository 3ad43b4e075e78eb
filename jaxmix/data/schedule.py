"""Whose turn it is in a mixture."""

from __future__ import annotations

import fractions
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

_LONGEST_PERIOD = 10_000


class Schedule:
  """Which source each row of a mixture is from, exactly by weight and without chance.

  Of any n rows from the first on, a source of weight w has n w / sum(weights), off by less than
  one; after `period` rows it has exactly its share, and all begins again.

  Every row that is due to a source is a job, which may be done once its share has reached the row
  and has to be before it reaches the next: the one with the nearest deadline is done first.

  Args:
    weights: source -> a positive number, such as 0.7 or 7; decimals are taken as written.
  """

  def __init__(self, weights: Mapping[str, float]):
    self.shares = _whole(weights)
    self.period = sum(self.shares.values())
    self._shares = shares = list(self.shares.values())
    self._turns = np.empty(self.period, np.int64)
    self._earlier = np.empty(self.period, np.int64)  # turns of the same source in this period
    done = [0] * len(shares)
    for turn in range(self.period):
      begun = [i for i, share in enumerate(shares) if done[i] * self.period // share <= turn]
      source = min(begun, key=lambda i: -(-(done[i] + 1) * self.period // shares[i]))
      self._turns[turn], self._earlier[turn] = source, done[source]
      done[source] += 1

  def __len__(self) -> int:
    """As many rows as Python can count: there is no end."""
    return sys.maxsize

  def __getitem__(self, row: int) -> tuple[int, int]:
    """(source, how many of its rows come before) of a row of the mixture; sources by number."""
    period, turn = divmod(row, self.period)
    source = int(self._turns[turn])
    return source, period * self._shares[source] + int(self._earlier[turn])

  def drawn(self, rows: int) -> dict[str, int]:
    """How many of the first `rows` rows are from each source."""
    periods, rest = divmod(rows, self.period)
    in_rest = np.bincount(self._turns[:rest], minlength=len(self.shares)).tolist()
    return {
      name: periods * share + more
      for (name, share), more in zip(self.shares.items(), in_rest, strict=True)
    }


def _whole(weights: Mapping[str, float]) -> dict[str, int]:
  """The weights as the smallest whole numbers of the same proportions."""
  for name, weight in weights.items():
    _check_weight(name, weight)
  exact = {name: fractions.Fraction(str(weight)) for name, weight in weights.items()}
  scale = math.lcm(*(weight.denominator for weight in exact.values()))
  whole = {name: int(weight * scale) for name, weight in exact.items()}
  divisor = math.gcd(*whole.values())
  whole = {name: weight // divisor for name, weight in whole.items()}
  if (total := sum(whole.values())) > _LONGEST_PERIOD:
    near = {name: max(1, round(1000 * weight / total)) for name, weight in whole.items()}
    raise ValueError(
      f"the weights {dict(weights)} have too many digits: the mixture would repeat after {total:,} "
      f"rows only — expected at most {_LONGEST_PERIOD:,} — set {near}"
    )
  return whole


def _check_weight(name: str, weight: Any) -> None:
  number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
  if not number or not 0 < weight < math.inf:
    raise (ValueError if number else TypeError)(
      f"the weight of source {name!r} is {weight!r} — expected a positive number — set one, or "
      "leave the source out"
    )
