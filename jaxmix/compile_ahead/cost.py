"""What a compiled program costs a device: matmul flops, HBM bytes, what it saves for the backward
pass, the Pallas kernels that it runs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

from jaxmix.compile_ahead.communication import KINDS, goes_on
from jaxmix.compile_ahead.hlo import Computation, Instruction, Module, Shape

# Names for memory that is there already, and control flow, whose parts are counted themselves.
_FREE = frozenset((
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id",
  "while", "call", "conditional", "async-start", "call-start",
  "after-all", "opt-barrier", "add-dependency", "domain",
))  # fmt: skip
_LIBRARIES = ("__cublas$", "__cudnn$")
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast")
_SLICES = ("slice", "dynamic-slice", "gather")
# Of these a part of the result needs more than as large a part of the operands.
_MIXES = (*KINDS, "dot", "convolution", "custom-call", "sort", "reduce-window", "fft")
_MOVES = ("copy", "copy-start", "copy-done", "slice-start", "slice-done")
# Operand -> the one written into it, of instructions that change a part of an array.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one run of a program costs one device, loops multiplied out.

  Attributes:
    flops: of matmuls, a multiply-add counted as two, and what cost estimates say of Pallas kernels.
    xla_flops: those of one run of each instruction of XLA's own that has some, by its name.
    hbm_bytes: see `count`.
    saved_activations, stacked_gradients: bytes of the arrays that loops fill row by row in the
      forward and in the backward pass: what scanned layers save, and their parameters' gradients.
      Loops inside the layers are left out.
    kernels: name of a Pallas kernel -> how often it runs.
    unpriced: kernels, Pallas' and the GPU libraries', that do not say what they cost; their flops
      are in no figure.
  """

  flops: int
  xla_flops: Mapping[str, int]
  hbm_bytes: int
  saved_activations: int
  stacked_gradients: int
  kernels: dict[str, int]
  unpriced: tuple[str, ...]


def count(module: Module) -> Cost:
  """Counts what a program does on a device.

  `hbm_bytes` is what its instructions read and write in HBM: every operand and result once, of an
  array that is only sliced the slices, of one that is updated in place the update. What lies on the
  chip or on the host is left out. Real traffic differs: a fusion or a Pallas kernel may fetch a
  block again and again; a GPU's cache may keep an array between two instructions; a TPU pads the
  last two dimensions of an array to whole tiles. Only one branch of a conditional runs, and all are
  counted. Flops of anything but matmuls and convolutions are not counted.
  """
  all_flops = hbm_bytes = 0
  xla_flops: Counter[str] = Counter()
  kernels: Counter[str] = Counter()
  unpriced: dict[str, None] = {}
  for executed, times, where in module.executed():
    hbm_bytes += times * _hbm_bytes(module, executed, where)
    for instruction, computation in module.within(executed, where):
      if instruction.is_pallas:
        kernels[instruction.kernel] += times
        flops = _estimated_flops(instruction)
      else:
        flops = matmul_flops(instruction, computation)
        xla_flops[executed.name] += flops or 0
      all_flops += times * (flops or 0)
      if flops is None:
        unpriced[instruction.kernel if instruction.is_pallas else instruction.target] = None
  saved, gradients = _stacked(module)
  return Cost(
    flops=all_flops,
    xla_flops=+xla_flops,
    hbm_bytes=hbm_bytes,
    saved_activations=saved,
    stacked_gradients=gradients,
    kernels=dict(kernels),
    unpriced=tuple(unpriced),
  )


def matmul_flops(instruction: Instruction, computation: Computation) -> int | None:
  """2 M N K of a matmul or a convolution, 0 of anything else; None of a library call that keeps
  its shape to itself."""
  if instruction.operation == "dot":
    lhs = computation.operand_shapes(instruction)[0]
    contracted = _integers(instruction.attribute("lhs_contracting_dims"))
  elif instruction.operation == "convolution":
    return _convolution_flops(instruction, *computation.operand_shapes(instruction)[:2])
  elif instruction.target.startswith("__cublas$"):
    lhs = computation.operand_shapes(instruction)[0]
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.backend_config)
    contracted = _integers(dims[1])
  else:
    return None if instruction.target.startswith("__cudnn$") else 0
  return 2 * instruction.results[0].elements * math.prod(lhs.dims[dim] for dim in contracted)


def _convolution_flops(instruction: Instruction, lhs: Shape, rhs: Shape) -> int:
  """Flops of a convolution, of which the TPU compiler makes every matmul.

  Batch dimensions become spatial ones in which all but one position fall on padding or between the
  dilated elements; those are no work.
  """
  labels = re.fullmatch(r"(.+)_(.+)->(.+)", instruction.attribute("dim_labels"))
  window = dict(part.split("=") for part in instruction.attribute("window").strip("{}").split())
  result = instruction.results[0]
  flops = 2 * rhs.dims[labels[2].index("i")]
  flops *= result.dims[labels[3].index("b")] * result.dims[labels[3].index("f")]
  for axis, size in enumerate(window.get("size", "").split("x") if window else ()):

    def field(name: str, default: str, axis: int = axis) -> str:
      return window[name].split("x")[axis] if name in window else default

    flops *= _products(
      outputs=result.dims[labels[3].index(str(axis))],
      inputs=lhs.dims[labels[1].index(str(axis))],
      size=int(size),
      stride=int(field("stride", "1")),
      low=int(field("pad", "0_0").split("_")[0]),
      spread=int(field("lhs_dilate", "1")),
      step=int(field("rhs_dilate", "1")),
    )
  return flops


@functools.cache
def _products(
  *, outputs: int, inputs: int, size: int, stride: int, low: int, spread: int, step: int
) -> int:
  """Pairs of an output and a kernel position that meet an element of the input, along one axis."""
  kernel = np.arange(size) * step - low
  found = 0
  for output in range(outputs):
    position = output * stride + kernel
    found += int(
      ((position >= 0) & (position <= (inputs - 1) * spread) & (position % spread == 0)).sum()
    )
  return found


def _estimated_flops(instruction: Instruction) -> int | None:
  estimate = instruction.backend_config.partition('"cost_estimate":{')[2].partition("}")[0]
  flops = re.search(r'"flops":"?(\d+)', estimate)
  return int(flops[1]) if flops else None


def _integers(text: str) -> tuple[int, ...]:
  return tuple(int(x) for x in re.findall(r"\d+", text))


@dataclasses.dataclass
class _Graph:
  """Instructions with all fusions among them opened, in an order in which operands come first.

  A value is the number of an instruction, or a list of values where it is a tuple. Bitcasts, tuples
  and what takes tuples apart are gone: they only name values.
  """

  instructions: list[Instruction] = dataclasses.field(default_factory=list)
  operands: list[list] = dataclasses.field(default_factory=list)
  goes_on: set[int] = dataclasses.field(default_factory=set)  # what was started elsewhere
  in_place: set[int] = dataclasses.field(default_factory=set)  # updates of an argument

  def add(self, instruction: Instruction, operands: list) -> int:
    """The number of a new instruction."""
    self.instructions.append(instruction)
    self.operands.append(operands)
    return len(self.operands) - 1

  def expand(self, module: Module, computation: Computation, arguments: list | None = None):
    """Adds a computation, as a fusion of `arguments` where they are given; returns its value."""
    values: dict[str, object] = {}
    for instruction in computation:
      operands = [values[name] for name in instruction.operands]
      match instruction.operation:
        case "bitcast":
          value = operands[0]
        case "tuple":
          value = operands
        case "get-tuple-element" if isinstance(operands[0], list):
          value = operands[0][instruction.index]
        case "parameter" if arguments is not None:
          value = arguments[int(instruction.arguments)]
        case "fusion":
          value = self.expand(module, module.fused(instruction), operands)
        case _:
          value = self.add(instruction, operands)
          if instruction.target == "AsyncCollectiveDone" or goes_on(instruction, computation):
            self.goes_on.add(value)
      values[instruction.name] = value
    return values[computation.root.name]

  def updated(self, value: int) -> tuple[int, list[int]]:
    """Behind a chain of updates: the array that they update, and the numbers of the updates."""
    updates = []
    while self.instructions[value].operation in _UPDATES and self.operands[value]:
      updates.append(value)
      value = self.operands[value][0]
    return value, updates

  def update_shape(self, number: int) -> Shape:
    """The array that an update writes."""
    position = _UPDATES[self.instructions[number].operation]
    return self.instructions[self.operands[number][position]].shapes[0]


def _hbm_bytes(module: Module, instruction: Instruction, computation: Computation) -> int:
  """Bytes that one run of an instruction reads and writes in HBM."""
  opcode, target = instruction.opcode, instruction.target
  if opcode in _FREE or opcode.endswith(("-done", "-update")) or target in _FREE_TARGETS:
    return 0
  graph = _Graph()
  arguments = {
    name: graph.add(computation[name], []) for name in dict.fromkeys(instruction.operands)
  }
  operands = [arguments[name] for name in instruction.operands]
  if instruction.operation == "fusion":
    value = graph.expand(module, module.fused(instruction), operands)
  else:
    value = graph.add(instruction, operands)
  wanted, written = _results(graph, value, instruction, len(arguments))
  _propagate(graph, wanted, len(arguments))
  read = 0
  for number in arguments.values():
    for shape in graph.instructions[number].results:
      read += _in_hbm(shape, wanted[number])
  return read + written


def _in_hbm(shape: Shape, elements: int | None = None) -> int:
  """Bytes of so many elements of an array, of all by default; 0 where it is not in HBM."""
  if shape.memory_space != 0:
    return 0
  elements = shape.elements if elements is None else min(elements, shape.elements)
  return -(-elements * shape.bits // 8)


def _elements(instruction: Instruction) -> int:
  return sum(shape.elements for shape in instruction.results)


def _results(graph: _Graph, value, instruction: Instruction, arguments: int) -> tuple[list, int]:
  """How many elements of each value of a graph its results need, and the bytes these write."""
  wanted = [0] * len(graph.instructions)
  written = 0
  shapes = iter(instruction.results)
  for number in value if isinstance(value, list) else [value]:
    source = graph.instructions[number]
    wrote = tuple(itertools.islice(shapes, len(source.results)))
    array, updates = graph.updated(number)
    space = graph.instructions[array].results[0].memory_space
    if array < arguments and space == wrote[0].memory_space:  # in place, or handed through
      for update in updates:
        graph.in_place.add(update)
        wanted[update] = wrote[0].elements
        written += _in_hbm(wrote[0], graph.update_shape(update).elements)
    elif number not in graph.goes_on:
      wanted[number] = _elements(source)
      if source.target == "AsyncCollectiveStart":  # its first result is its operand
        wrote = wrote[1:2]
      elif source.target.startswith(_LIBRARIES):  # its last result is scratch
        wrote = wrote[:1]
      written += sum(map(_in_hbm, wrote))
  return wanted, written


def _propagate(graph: _Graph, wanted: list[int], arguments: int) -> None:
  """Adds to `wanted` what each instruction needs of its operands, users first."""
  for number in reversed(range(arguments, len(graph.instructions))):
    instruction = graph.instructions[number]
    own = _elements(instruction)
    needed = min(wanted[number], own)
    if not needed or number in graph.goes_on:
      continue
    needs: dict[int, int] = {}
    for position, operand in enumerate(graph.operands[number]):
      sliced = instruction.operation in _SLICES and position == 0
      for source in operand if isinstance(operand, list) else [operand]:
        full = _elements(graph.instructions[source])
        if number in graph.in_place and position == 0:
          # An addition into an array reads what it changes; an assignment does not.
          added = instruction.operation == "scatter"
          need = graph.update_shape(number).elements if added else 0
        elif sliced or (own == full and instruction.operation not in _MIXES):
          need = needed
        else:
          need = min(needed, full) if instruction.opcode == "broadcast" else full
        needs[source] = max(need, needs.get(source, 0))
    for source, need in needs.items():
      wanted[source] += need


def _stacked(module: Module) -> tuple[int, int]:
  """Bytes of the arrays that scanned layers fill row by row, in the forward pass and backward."""
  saved = gradients = 0
  for loop in module.loops:
    place = re.match(r"(.*)\bjvp\(.*?\)+/(.*)", loop.instruction.op_name)
    # A loop inside a layer, or one that computes a layer again, fills what the layer alone needs.
    if place is None or place[2].count("while") > 1 or "rematted_computation" in place[2]:
      continue
    graph = _Graph()
    results = graph.expand(module, loop.body)
    filled = sum(
      shape.bytes
      for index, value in enumerate(results)
      if (shape := _filled(graph, value, index, loop.trips)) is not None
    )
    if "transpose(" in place[1]:
      gradients += filled
    else:
      saved += filled
  return saved, gradients


def _filled(graph: _Graph, value, index: int, turns: int | None) -> Shape | None:
  """The array that a loop carries at `index`, if each turn writes one row of as many as turns."""
  shape = row = None
  while isinstance(value, int) and graph.operands[value]:
    instruction = graph.instructions[value]
    if instruction.opcode == "get-tuple-element":
      source = graph.instructions[graph.operands[value][0]]
      carried = source.opcode == "parameter" and instruction.index == index
      if not carried or row is None or turns not in shape.dims:
        return None
      return shape if shape.elements == turns * row.elements else None
    if instruction.opcode == "dynamic-update-slice":
      shape, row = instruction.shapes[0], graph.update_shape(value)
    elif instruction.opcode not in _MOVES and instruction.target not in _FREE_TARGETS:
      return None
    value = graph.operands[value][0]
  return None
