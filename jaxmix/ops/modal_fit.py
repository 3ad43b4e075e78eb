"""Modes that come near given filters: how long convolutions become recurrences.

The matrix H[i, j] = k[i + j] of a filter that is a sum of r waves has rank r, and its columns span
what powers of the poles span: shifted by one row, they are themselves times a matrix whose
eigenvalues are the poles. For any filter the largest singular vectors of H stand for these columns
(Kung 1978, "A new identification and model reduction algorithm via singular value decomposition"),
and given the poles the residues are a least-squares fit. All is in float64, on the host.
"""

from __future__ import annotations

import dataclasses

import numpy as np

SLOWEST = 1e-6  # the least decay of a fitted mode over a token: all of them decay
_EXTRA = 10  # directions beside those that are wanted (Halko et al. 2011, arXiv 0909.4061)
_NEGLIGIBLE = 1e-10  # of the largest singular value, in the fit of the residues


@dataclasses.dataclass(frozen=True)
class FilterErrors:
  """How far filters are from those that they stand for.

  Attributes:
    relative: [channels], the norm of the difference over that of the filter.
    largest: [channels], the largest difference at a lag.
    bound: [channels], the sum of differences over the lags. Of a convolution with inputs of at most
      1 the result differs by no more.
  """

  relative: np.ndarray
  largest: np.ndarray
  bound: np.ndarray

  @classmethod
  def of(cls, found: np.ndarray, exact: np.ndarray) -> FilterErrors:
    """Of filters [channels, L] and those that they stand for."""
    difference = np.abs(found - exact)
    norms = np.maximum(np.linalg.norm(exact, axis=1), np.finfo(float).tiny)
    relative = np.linalg.norm(difference, axis=1) / norms
    return cls(relative, difference.max(1), difference.sum(1))


def fit_modes(filters: np.ndarray, modes: int) -> tuple[np.ndarray, np.ndarray]:
  """Poles and residues whose waves come near filters.

      k[n] ~ Re sum_m residues[:, m] exp(n log_poles[:, m])        |exp(log_poles)| < 1

  A wave of complex pole stands for two real dimensions of a recurrence, so that S modes fit a sum
  of at most S waves exactly. The same filters give the same modes.

  Args:
    filters: [D, L], the filter of each channel by lag.
    modes: S, below L / 4.
  Returns:
    log_poles, residues: [D, S] complex128; residues are 0 where fewer waves are enough.
  Raises:
    ValueError: there are too many modes for the lags.
  Source: Massaroli et al. 2023 (arXiv 2310.18780), section 3, where poles are found by gradient
    descent; by singular vectors it is Kung's method, see the module. Cost O(L S (S + log L)) a
    channel.
  """
  filters = np.asarray(filters, np.float64)
  if filters.ndim != 2 or not 1 <= modes < filters.shape[1] / 4:
    raise ValueError(
      f"fit_modes: {modes} modes for filters of shape {filters.shape}, expected [D, L] and from 1 "
      "to less than L / 4 modes; with more a stream is as cheap by long_convolution"
    )
  fits = [_fit(filter_, modes) for filter_ in filters]
  return tuple(np.stack(each) for each in zip(*fits, strict=True))


def _fit(k: np.ndarray, modes: int) -> tuple[np.ndarray, np.ndarray]:
  """log_poles and residues [S] of one filter [L]."""
  poles = _poles(_leading_vectors(k, 2 * modes), modes)
  with np.errstate(divide="ignore"):  # a pole at 0 is one token alone
    logs = np.log(poles)
  logs = np.clip(logs.real, -50, -SLOWEST) + 1j * logs.imag
  waves = np.exp(np.arange(len(k))[:, None] * logs)
  parts = np.concatenate([waves.real, -waves.imag], 1)
  real, imaginary = np.split(np.linalg.lstsq(parts, k, rcond=_NEGLIGIBLE)[0], 2)
  missing = (0, modes - len(logs))
  return np.pad(logs, missing, constant_values=-1), np.pad(real + 1j * imaginary, missing)


def _poles(vectors: np.ndarray, modes: int) -> np.ndarray:
  """At most so many poles with angles from 0 to pi: of as many of the vectors as give no more."""
  for rank in range(vectors.shape[1], 0, -1):
    basis = vectors[:, :rank]
    poles = np.linalg.eigvals(np.linalg.lstsq(basis[:-1], basis[1:], rcond=None)[0])
    poles = poles[poles.imag >= 0]  # the others are conjugate to some of these
    if len(poles) <= modes:
      return poles.astype(complex)
  return np.zeros(0, complex)  # of a filter of zeros


def _leading_vectors(k: np.ndarray, count: int) -> np.ndarray:
  """[rows, at most count]: the left singular vectors of H, square but for one row, whose singular
  values are the largest; found from random directions, by Fourier transforms."""
  rows = (len(k) + 1) // 2
  columns, spectrum = len(k) + 1 - rows, np.fft.rfft(k)[:, None]

  def multiply(x: np.ndarray, rows: int) -> np.ndarray:  # no lag of H is above len(k) - 1
    y = np.fft.irfft(spectrum * np.conj(np.fft.rfft(x, len(k), axis=0)), len(k), axis=0)
    return y[:rows]

  directions = np.random.default_rng(0).normal(size=(columns, min(count + _EXTRA, columns)))
  for _ in range(2):
    directions = np.linalg.qr(multiply(directions, rows))[0]
    directions = np.linalg.qr(multiply(directions, columns))[0]
  vectors, sizes, _ = np.linalg.svd(multiply(directions, rows), full_matrices=False)
  significant = sizes > np.finfo(float).eps * len(k) * sizes[0]
  return vectors[:, :count][:, significant[:count]]
