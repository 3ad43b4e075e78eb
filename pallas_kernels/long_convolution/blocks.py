"""Rows of any length by the kernels for TPU, which take as many tokens as fit on the chip.

A longer row is cut into blocks of one length. What block i gives block j depends on j - i alone: it
is a convolution too, with the lags that lie between their tokens. One call makes those of one
distance, for all blocks of all rows; their sums are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.long_convolution import tpu
from pallas_kernels.long_convolution.fourier import mixed_dtypes

SMALLEST_VMEM = 16 * 2**20  # of the smallest chip: what a program without a mesh is made for


class Blocks(NamedTuple):
  """How rows are cut.

  Attributes:
    count: blocks of a row.   sizes: of the transform of one.   later: whether blocks give something
      to earlier ones.
  """

  count: int
  sizes: tpu.Sizes
  later: bool

  @classmethod
  def of(cls, u, *gates, later: bool) -> Blocks:
    """The fewest blocks of u [B, T, D] whose calls with these gates, some of which may be None, fit
    on the chip; the smallest ones where none fit."""
    gates = sum(gate is not None for gate in gates)
    count = 1
    while True:
      blocks = cls(count, tpu.Sizes.of(-(-u.shape[1] // count)), later)
      if blocks.sizes.tokens == tpu.MULTIPLE or blocks.shortage(u.dtype, gates) is None:
        return blocks
      count += 1

  def shortage(self, dtype, gates: int) -> str | None:
    """Why a call does not fit on the chip, or None."""
    vmem = pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else SMALLEST_VMEM
    needed = tpu.vmem_bytes(self.sizes, dtype.itemsize, gates)
    if needed <= vmem * 3 // 4:  # the compiler's own buffers take the rest
      return None
    return f"{self.sizes.tokens} tokens need {needed >> 20} MiB of VMEM, and {vmem >> 20} are there"

  @property
  def points(self) -> int:
    """N of the filters that `spectra` takes."""
    return self.count * self.sizes.points

  @property
  def distances(self) -> tuple[int, ...]:
    """j - i, first 0."""
    later = range(-1, -self.count, -1) if self.later else ()
    return (*range(self.count), *later)

  def span(self, distance: int) -> tpu.Span:
    """The blocks that have one at a distance, and those."""
    return tpu.Span(max(-distance, 0), max(distance, 0), self.count - abs(distance))


class _Sum:
  """Of blocks of rows, at their places in x [B, T, D]."""

  def __init__(self, x, blocks: Blocks):
    self.like, self.pieces = x, []
    self.tokens, self.whole = blocks.sizes.tokens, blocks.count * blocks.sizes.tokens

  def add(self, rows, start: int) -> None:
    before = start * self.tokens
    after = self.whole - before - rows.shape[1]
    self.pieces.append(jnp.pad(rows.astype(jnp.float32), ((0, 0), (before, after), (0, 0))))

  def total(self):
    """[B, T, D] in the dtype of x."""
    total = functools.reduce(jnp.add, self.pieces)
    return total[:, : self.like.shape[1]].astype(self.like.dtype)


def refusal(u, *gates) -> str | None:
  """Why the kernels cannot run on u [B, T, D] with gates, some of which may be None; or None."""
  if (reason := mixed_dtypes(u, *gates)) is not None:
    return reason
  count = sum(gate is not None for gate in gates)
  return Blocks.of(u, *gates, later=False).shortage(u.dtype, count)


def spectra(c, blocks: Blocks) -> tuple[jax.Array, ...]:
  """Those of filters c [D, N], lags from 0 on in front and later tokens at the end, a distance
  each."""
  parts = c.reshape(c.shape[0], 2 * blocks.count, blocks.sizes.tokens)

  def of(distance):
    # Lags between blocks reach a block less, and a block more.
    lags = jnp.concatenate([parts[:, distance], parts[:, distance - 1]], 1)
    return tpu.spectrum(lags, blocks.sizes)

  return tuple(map(of, blocks.distances))


def forward(u, spectra, skip, pre_gate, post_gate, blocks: Blocks):
  """y [B, T, D] of `tpu.forward`, with the `spectra` of `blocks`."""
  y = _Sum(u, blocks)
  for span, spectrum, skip_here in _calls(blocks, spectra, skip):
    y.add(tpu.forward(u, spectrum, skip_here, pre_gate, post_gate, span), span.target)
  return y.total()


def backward(u, spectra, skip, pre_gate, post_gate, dy, blocks: Blocks):
  """The gradients of `tpu.backward`; for the spectrum there are those of `spectra`."""
  sums = [None if x is None else _Sum(x, blocks) for x in (u, pre_gate, post_gate)]
  dspectra = []
  for span, spectrum, skip_here in _calls(blocks, spectra, skip):
    du, dspectrum, dpre, dpost = tpu.backward(u, spectrum, skip_here, pre_gate, post_gate, dy, span)
    dspectra.append(dspectrum)
    places = ((du, span.source), (dpre, span.source), (dpost, span.target))
    for of, (rows, start) in zip(sums, places, strict=True):
      if of is not None:
        of.add(rows, start)
  du, dpre, dpost = (None if of is None else of.total() for of in sums)
  return du, tuple(dspectra), dpre, dpost


def _calls(blocks: Blocks, spectra, skip) -> Iterator[tuple]:
  """Span, spectrum and skip of each call."""
  for distance, spectrum in zip(blocks.distances, spectra, strict=True):
    yield blocks.span(distance), spectrum, skip if distance == 0 else jnp.zeros_like(skip)
