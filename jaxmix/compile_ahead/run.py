"""A training run on a target: its real step, compiled, and what of the memory is what."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jaxmix import configuration, training
from jaxmix.compile_ahead.process import Task
from jaxmix.compile_ahead.report import Report
from jaxmix.compile_ahead.targets import Target, target
from jaxmix.data import Outline, TextDataset, text_outline
from jaxmix.models import Stack, abstract_parameters
from jaxmix.training.run import SUPPLIED, abstract_run


@dataclasses.dataclass(frozen=True)
class Run:
  """A run as its files and overrides say.

  Attributes:
    gin_files, gin_params: as `launch/train.py` takes them.
    vocab_size, length: used in place of the text's, which then need not be here; None asks the
      data.
  """

  gin_files: tuple[str, ...]
  gin_params: tuple[str, ...] = ()
  vocab_size: int | None = None
  length: int | None = None

  def with_params(self, *params: str) -> Run:
    """The run with more overrides."""
    return dataclasses.replace(self, gin_params=(*self.gin_params, *params))

  def configuration(self) -> configuration.Configuration:
    """The checked configuration.

    Raises:
      ConfigurationError: a file or an override is wrong.
    """
    return configuration.load(
      self.gin_files, self.gin_params, root=training.train, supplied=SUPPLIED
    )

  def model(self) -> tuple[nnx.GraphDef, dict, dict, nnx.Module]:
    """Graph, parameters and their axes as `jaxmix.models.abstract_parameters` has them, and the
    model that the first two make, without any array."""
    factory = functools.partial(self.configuration().value("model"), **self.outline().sizes)
    graph, parameters, axes = abstract_parameters(factory)
    return graph, parameters, axes, nnx.merge(graph, parameters)

  def stack(self) -> Stack:
    """The layers of the model."""
    *_, model = self.model()
    return model if isinstance(model, Stack) else model.encoder

  def outline(self) -> Outline:
    """That of the data.

    Raises:
      FileNotFoundError: the data is not here and its sizes were not given.
      ValueError: the sizes of a text were given, and the data is none.
    """
    if self.vocab_size is not None and self.length is not None:
      return self._text_outline(self.vocab_size, self.length)
    try:
      outline = self.configuration().value("data").outline
    except OSError as error:
      raise FileNotFoundError(
        f"the data of this run is not here: {error} — expected it, or its sizes — "
        "give --vocab_size and --length to compile without it"
      ) from error
    if self.vocab_size is None and self.length is None:
      return outline
    if outline.unit != "tokens":
      raise ValueError(
        f"vocab_size={self.vocab_size}, length={self.length} for data that is labelled "
        f"{outline.unit} — expected text — leave both out, so that the data is asked"
      )
    vocab_size = self.vocab_size or outline.sizes["vocab_size"]
    return self._text_outline(vocab_size, self.length or outline.length)

  def _text_outline(self, vocab_size: int, length: int) -> Outline:
    packing = self.configuration().value("packing", of=TextDataset)
    return text_outline(vocab_size, length, packing=packing)


@dataclasses.dataclass(frozen=True)
class RunReport:
  """What a training step needs and costs on a target; bytes are those of one device.

  Attributes:
    report: of the compiled step.
    parameters: their number.
    parameter_bytes, optimizer_bytes: as they lie on the mesh; a moving average of the parameters
      counts to the optimizer.
    batch_bytes: of one device's rows.
    tokens: positions of the rows of a step, over all devices; of images these are pixels.
    model_flops: of a step, over all devices: three times the forward pass, without what is computed
      again.
  """

  report: Report
  parameters: int
  parameter_bytes: int
  optimizer_bytes: int
  batch_bytes: int
  tokens: int
  model_flops: int

  @property
  def gradient_bytes(self) -> int:
    """One gradient for each parameter; part of the temporaries."""
    return min(self.parameter_bytes, self.report.memory.temporaries)

  @property
  def activation_bytes(self) -> int:
    """What the layers keep for the backward pass; part of the temporaries."""
    rest = self.report.memory.temporaries - self.gradient_bytes
    return min(self.report.saved_activations, rest)

  @property
  def other_bytes(self) -> int:
    """The temporaries that are neither gradients nor kept activations."""
    return self.report.memory.temporaries - self.gradient_bytes - self.activation_bytes

  @property
  def mfu(self) -> float:
    """The model flops utilisation that the lower bound of the step time allows."""
    chip = target(self.report.target)
    peak = chip.matmul_flops * chip.device_count
    return self.model_flops / (peak * self.report.bound.seconds)

  @property
  def tokens_per_second(self) -> float:
    """The most tokens a second that the lower bound of the step time allows, over all devices."""
    return self.tokens / self.report.bound.seconds

  def to_dict(self) -> dict[str, Any]:
    """Every figure under its name."""
    derived = ("gradient_bytes", "activation_bytes", "other_bytes", "mfu", "tokens_per_second")
    bound = self.report.bound
    memory = self.report.memory
    return {
      **dataclasses.asdict(self),
      **{name: getattr(self, name) for name in derived},
      "fits": memory.fits,
      "needed": memory.needed,
      "headroom": memory.headroom,
      "bound": {
        **dataclasses.asdict(bound),
        "seconds": bound.seconds,
        "limited_by": bound.limited_by,
      },
    }


def run_task(run: Run, target: str) -> Task:
  """The compilation of a run's training step for a target."""
  return Task(functools.partial(_program, run), target)


def run_report(run: Run, report: Report) -> RunReport:
  """The report of a run from that of its compiled step."""
  length = run.outline().length
  _, parameters, _, model = run.model()
  batch_size = run.configuration().value("batch_size")
  figures = report.figures
  return RunReport(
    report=report,
    parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(parameters)),
    parameter_bytes=figures["parameter_bytes"],
    optimizer_bytes=figures["optimizer_bytes"],
    batch_bytes=figures["batch_bytes"],
    tokens=batch_size * length,
    model_flops=3 * model.flops(batch_size, length),
  )


def _program(run: Run, chip: Target):
  """The step, its abstract arguments, the mesh, and bytes a device of each argument."""
  settings = run.configuration()
  mesh = settings.value("mesh")(devices=chip.devices())
  with jax.set_mesh(mesh):
    step, batch = abstract_run(settings, mesh, outline=run.outline())
    state = step.abstract_state()
  figures = {
    "parameter_bytes": _bytes(state["params"]),
    "optimizer_bytes": _bytes([state["opt_state"], state.get("ema", ())]),
    "batch_bytes": _bytes(batch),
  }
  return step.update, (state, batch), mesh, figures


def _bytes(tree) -> int:
  """Bytes of one device."""
  return sum(
    x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
  )


def remedies(run: Run, devices: int) -> tuple[tuple[tuple[str, ...], ...], ...]:
  """What to try where a run does not fit: rounds of overrides, the cheapest in time first.

  A round is to be tried where none of the round before it helped.

  Args:
    devices: of the target.
  """
  settings = run.configuration()
  text = settings.text()
  is_cut = devices == 1 or "make_mesh.fsdp = -1" in text
  cut = () if is_cut else (("make_mesh.data = 1", "make_mesh.fsdp = -1"),)
  stack = run.stack()
  harder = {"none": ("dots", "full"), "dots": ("full",), "full": ()}[stack.remat]
  remat = tuple((f'{type(stack).__name__}.remat = "{policy}"',) for policy in harder)
  parts = [
    count
    for count in (2, 4, 8, 16)
    if settings.value("batch_size") % count == 0
    and settings.value("batch_size") // count >= devices
    and count > settings.value("microbatches")
  ]
  micro = tuple((f"train.microbatches = {count}",) for count in parts)
  alone = (*cut, *remat, *micro)
  gathered, full = (options[-1] if options else () for options in (cut, remat))
  both = tuple((*gathered, *policy) for policy in remat)
  all_three = tuple((*gathered, *full, *count) for count in micro)
  later = (tuple(x for x in more if x not in alone) for more in (both, all_three))
  return (alone, *later)


def sweep(run: Run, devices: int, batch_sizes: Sequence[int]) -> tuple[tuple[str, ...], ...]:
  """Overrides for every mesh worth trying on so many devices, with each batch size.

  Tensor parallelism over 1, 2, 4 and 8 neighbouring devices; of the rest, all cut the parameters,
  none does, or groups of a quarter do.
  """
  meshes = []
  for tensor in (1, 2, 4, 8):
    rest = devices // tensor
    if devices % tensor:
      continue
    for data in dict.fromkeys((1, 4, rest)):
      if rest % data == 0:
        meshes.append((data, rest // data, tensor))
  return tuple(
    (
      f"make_mesh.data = {data}",
      f"make_mesh.fsdp = {fsdp}",
      f"make_mesh.tensor = {tensor}",
      f"train.batch_size = {batch_size}",
    )
    for batch_size in batch_sizes
    for data, fsdp, tensor in dict.fromkeys(meshes)
    if batch_size % (data * fsdp) == 0
  )
