"""Counting in optimised HLO: the bytes that each kernel moves, its FLOPs, what devices exchange.

A kernel reads its operands and writes its results. Of an operand that it slices or gathers from, it
reads what it takes; updated in place, it writes what it puts. Bitcasts, tuples and parameters move
nothing. Caches inside the device are not modelled: within a kernel a byte is read once, between
kernels everything goes through memory.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from catp_jax.targets.hlo import Computation, Instruction, parse
from catp_jax.targets.program import Collective, Kernel

MOVES_NOTHING = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"} | {
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
    "domain",
    "async-update",
}
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"} | {
    "collective-broadcast",
    "ragged-all-to-all",
}
# How often the data go round a ring.
ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}
TOGETHER = {"all-reduce", "all-gather", "reduce-scatter"}
TAKES = {"slice", "dynamic-slice", "gather"}
PUTS = {"dynamic-update-slice", "scatter"}
# In a fusion: any part of their result is made of all of their operands.
WHOLE = {"dot", "convolution", "custom-call", "sort", "reduce-window", "get-tuple-element"}
# Custom calls whose last result is memory to work in: nothing that anyone reads.
SCRATCH = ("__cublas", "__cudnn", "__cub$")


def count(
    text: str, hosts: int = 1
) -> tuple[tuple[Kernel, ...], tuple[Collective, ...], tuple[str, ...]]:
    """Kernels, collectives, and loops of unknown length of a module's text, which runs on devices
    that so many hosts have in order.
    """
    computations, entry = parse(text)
    counter = Counting(computations, devices_in(text), hosts)
    return counter.run(entry, 1)


def devices_in(text: str) -> int:
    first = text[: text.find("\n")]
    numbers = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", first)
    return math.prod(map(int, numbers))


Counts = tuple[tuple[Kernel, ...], tuple[Collective, ...], tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Counting:
    """What the computations of a module do."""

    computations: Mapping[str, Computation]
    devices: int
    hosts: int

    def run(self, name: str, times: int) -> Counts:
        """Everything a computation does when it runs so often."""
        computation = self.computations[name]
        kernels: list[Kernel] = []
        exchanged: list[Collective] = []
        loops: list[str] = []

        def add(counts: Counts) -> None:
            kernels.extend(counts[0])
            exchanged.extend(counts[1])
            loops.extend(counts[2])

        for one in computation.instructions.values():
            if one.opcode in MOVES_NOTHING or one.opcode.endswith("-done"):
                continue
            if one.opcode == "while":
                trips = re.search(r'known_trip_count": ?\{"n": ?"(\d+)"', one.attributes)
                if trips is None:
                    loops.append(one.name)
                again = times * (int(trips[1]) if trips else 1)
                add(self.run(one.named("body"), again))
                add(self.run(one.named("condition"), again))
            elif one.opcode == "conditional":
                add(max((self.run(branch, times) for branch in branches(one)), key=moved))
            elif one.opcode == "call":
                add(self.run(one.named("to_apply"), times))
            elif one.opcode == "async-start":
                add(self.run(one.named("calls"), times))
            else:
                read, written = self.moves(computation, one)
                kernel = Kernel(
                    one.name, self.kind(one), times, read, written, self.flops(computation, one)
                )
                kernels.append(kernel)
                if kernel.kind == "collective":
                    exchanged.append(self.collective(computation, one, times))
        return tuple(kernels), tuple(exchanged), tuple(loops)

    def moves(self, computation: Computation, one: Instruction) -> tuple[int, int]:
        """Bytes that a kernel reads and writes."""
        result = self.result(computation, one)
        operands = [computation.instructions[name] for name in dict.fromkeys(one.operands)]
        full = sum(operand.nbytes for operand in operands)
        opcode = one.opcode.removesuffix("-start")
        if opcode == "fusion":
            fused = self.computations[one.named("calls")]
            taken: Counter[str] = Counter()
            for name, nbytes in zip(one.operands, self.reads(fused), strict=True):
                taken[name] += nbytes
            # an operand given twice is there once
            read = sum(
                min(nbytes, computation.instructions[name].nbytes) for name, nbytes in taken.items()
            )
            return read, self.writes(fused)
        if opcode in TAKES:
            return result + full - operands[0].nbytes, result
        if opcode in PUTS:
            put = computation.operand(one, 1 if opcode == "dynamic-update-slice" else -1).nbytes
            return full - operands[0].nbytes, put
        if opcode == "custom-call":
            if one.target == "AllocateBuffer":
                return 0, 0
            return full, result
        return full, result

    def result(self, computation: Computation, one: Instruction) -> int:
        """Bytes of what an instruction, or the pair it starts, leaves in memory to be read."""
        if one.opcode.endswith("-start"):
            done = [
                other
                for other in computation.instructions.values()
                if other.opcode.endswith("-done") and one.name in other.operands
            ]
            return done[0].nbytes if done else one.nbytes
        return one.nbytes - scratch(one)

    def reads(self, fused: Computation) -> list[int]:
        """Bytes that a fused computation takes of each of its parameters."""
        wanted = self.wanted(fused)
        return [
            min(parameter.nbytes, -(-wanted[parameter.name] * parameter.shapes[0][0] // 8))
            if parameter.shapes
            else 0
            for parameter in fused.parameters
        ]

    def wanted(self, fused: Computation) -> dict[str, int]:
        """Elements of each instruction's result that the root is made of.

        Slices of one array add up; other readers of it want the same elements.
        """
        sliced: Counter[str] = Counter()
        same: dict[str, int] = {fused.root.name: fused.root.elements}
        done: dict[str, int] = {}
        updated = in_place(fused)
        for one in reversed(list(fused.instructions.values())):
            want = min(one.elements, same.get(one.name, 0) + sliced[one.name])
            done[one.name] = want
            if not want or one.opcode in {"parameter", "constant", "iota"}:
                continue
            fusion = one.named("calls") if one.opcode == "fusion" else ""
            nested = self.computations[fusion] if fusion else None
            for index, name in enumerate(one.operands):
                operand = fused.instructions[name]
                part = min(operand.elements, want)
                if nested is not None:
                    inner = nested.parameters[index]
                    part = self.wanted(nested)[inner.name]
                elif one.opcode in TAKES and index == 0:
                    sliced[name] += want
                    continue
                elif one.opcode in PUTS and index == 0:
                    part = 0 if one.name in updated else operand.elements
                elif one.opcode in WHOLE | PUTS | TAKES:
                    part = operand.elements
                elif one.opcode in {"reduce", "concatenate"}:
                    part = -(-operand.elements * want // one.elements)
                same[name] = max(same.get(name, 0), part)
        return done

    def writes(self, fused: Computation) -> int:
        """Bytes that a fused computation leaves in memory."""
        root, updated = fused.root, in_place(fused)
        nbytes = 0
        for one in outputs(fused, root):
            target = fused.behind(one)
            if target.name in updated:
                index = 1 if target.opcode == "dynamic-update-slice" else -1
                nbytes += fused.operand(target, index).nbytes
            elif target.opcode == "get-tuple-element":
                source = fused.operand(target)
                is_last = int(target.named("index") or 0) == len(source.shapes) - 1
                nbytes += 0 if is_last and scratch(source) else target.nbytes
            else:
                nbytes += one.nbytes - scratch(one)
        return nbytes

    def kind(self, one: Instruction) -> str:
        """A word for what a kernel does."""
        opcode = one.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            return "collective"
        if opcode == "custom-call":
            return kind_of_call(one)
        if opcode != "fusion":
            return opcode
        inside = list(self.inside(one))
        opcodes = {each.opcode for each in inside}
        for each in inside:
            if each.opcode == "custom-call":
                return kind_of_call(each)
        if "dot" in opcodes:
            return "matrix product"
        if opcodes & PUTS:
            return "update"
        for word in ("convolution", "sort", "reduce"):
            if word in opcodes:
                return word
        arithmetic = opcodes - MOVES_NOTHING - {"copy", "transpose", "broadcast", "pad", "slice"}
        if not arithmetic - {"concatenate", "dynamic-slice", "reverse", "reshape"}:
            return "copy"
        return "gather" if "gather" in opcodes else "elementwise"

    def inside(self, one: Instruction) -> Iterator[Instruction]:
        """The instructions of a fusion, and of fusions in it."""
        for each in self.computations[one.named("calls")].instructions.values():
            yield each
            if each.opcode == "fusion":
                yield from self.inside(each)

    def flops(self, computation: Computation, one: Instruction) -> int:
        """FLOPs of the matrix products and convolutions in one run of a kernel."""
        if one.opcode in {"fusion", "fusion-start"}:
            fused = self.computations[one.named("calls")]
            return sum(self.flops(fused, each) for each in fused.instructions.values())
        if one.opcode == "dot":
            return product_flops(computation, one, "lhs_contracting_dims")
        if one.opcode == "convolution" or one.target.startswith("__cudnn$conv"):
            return convolution_flops(computation, one)
        if one.target.startswith("__cublas"):
            return product_flops(computation, one, "lhs_contracting_dimensions")
        if one.target.startswith("__cudnn$fmha"):
            return attention_flops(computation, one)
        return 0

    def collective(self, computation: Computation, one: Instruction, times: int) -> Collective:
        kind, result = one.opcode.removesuffix("-start"), self.result(computation, one)
        groups = groups_in(one.attributes) or [[*range(self.devices)]]
        sums = sum(computation.instructions[name].nbytes for name in one.operands)
        data, size = result if kind == "all-gather" else sums, len(groups[0])
        each = self.devices // self.hosts
        hosts = max(len({device // each for device in group}) for group in groups)
        between = least_sent(kind, data, hosts) if hosts > 1 else 0
        if kind in TOGETHER:  # what a host's devices have is the same, or a sum: each sends a part
            between = between * hosts // size
        return Collective(
            one.name, kind, times, size, result, least_sent(kind, data, size), between
        )


def moved(counts: Counts) -> int:
    return sum(kernel.moved for kernel in counts[0])


def branches(one: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    if listed:
        return re.findall(r"[\w.\-]+", listed[1])
    return [one.named("true_computation"), one.named("false_computation")]


def outputs(fused: Computation, root: Instruction) -> list[Instruction]:
    if root.opcode != "tuple":
        return [root]
    return [fused.instructions[name] for name in root.operands]


def in_place(fused: Computation) -> set[str]:
    """The updates of parameters that a fused computation gives back, changed where they lie."""
    found = set()
    for one in outputs(fused, fused.root):
        target = fused.behind(one)
        if target.opcode in PUTS and fused.behind(fused.operand(target)).opcode == "parameter":
            found.add(target.name)
    return found


def scratch(one: Instruction) -> int:
    """Bytes of a call's results that are memory to work in."""
    if len(one.shapes) < 2 or not one.target.startswith(SCRATCH):
        return 0
    size, sizes = one.shapes[-1]
    return math.prod(sizes) if size == 8 and len(sizes) == 1 else 0


def kind_of_call(one: Instruction) -> str:
    if one.target.startswith("__cublas"):
        return "matrix product"
    if one.target.startswith("__cudnn$fmha"):
        return "attention"
    if one.target.startswith("__cudnn$conv"):
        return "convolution"
    return one.target


def product_flops(computation: Computation, one: Instruction, attribute: str) -> int:
    sizes = computation.operand(one).shapes[0][1]
    inner = math.prod(sizes[axis] for axis in one.numbers(attribute))
    return 2 * inner * math.prod(one.shapes[0][1])


def convolution_flops(computation: Computation, one: Instruction) -> int:
    """Each result is a sum over a kernel's window and the inputs that it sees."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", one.attributes)
    kernel = computation.operand(one, 1).shapes[0][1]
    made = kernel[labels[1].index("o")] if labels else 1
    return 2 * math.prod(one.shapes[0][1]) * math.prod(kernel) // made


def attention_flops(computation: Computation, one: Instruction) -> int:
    """Two products, over the logits that cuDNN never writes; heads are as wide as the queries'.

    0 where it is told as it runs how many rows and columns there are: they may be few.
    """
    logits = re.search(
        r'"intermediate_tensor_shape": ?\{[^}]*?"dimensions": ?\[([^\]]*)\]', one.attributes
    )
    if logits is None or re.search(r'"mask_type": ?"PADDING', one.attributes):
        return 0
    width = computation.operand(one).shapes[0][1][-1]
    return 4 * width * math.prod(int(size) for size in re.findall(r"\d+", logits[1]))


def groups_in(attributes: str) -> list[list[int]]:
    """Which devices exchange, of {{0,1},{2,3}}, [2,2]<=[4], or mesh['a'=2,'b'=2] {'b'}; else []."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[^=]*?\})\}", attributes)
    if listed:
        return [[*map(int, group.split(","))] for group in re.findall(r"[\d,]+\b", listed[1])]
    folded = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if folded:
        shape, order, turned = (
            [*map(int, re.findall(r"\d+", part or ""))] for part in folded.groups()
        )
        grid = np.arange(math.prod(shape)).reshape(order)
        return grid.transpose(turned or None).reshape(shape).tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        over = [[*sizes].index(axis) for axis in re.findall(r"'([^']*)'", named[2])]
        grid = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        grid = np.moveaxis(grid, over, range(-len(over), 0))
        return grid.reshape(-1, math.prod(grid.shape[-len(over) :])).tolist()
    return []


def least_sent(kind: str, nbytes: int, members: int) -> int:
    """Bytes that leave each of so many members, as in a ring."""
    if kind not in ROUNDS:
        return nbytes
    return ROUNDS[kind] * (members - 1) * nbytes // members
