"""What a generation's compiled programs tell: for CPU devices, or for a GPU of `targets`.

A CPU has no bfloat16 products and would count converted weights, so that programs are compiled in
float32 there: their temporaries are an upper bound, and what is sent is scaled to the number type.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax

from catp_jax.plan.sizes import shard_bytes
from catp_jax.targets.compiling import program_of
from catp_jax.targets.counting import count
from catp_jax.targets.gpus import Gpu
from catp_jax.targets.program import Collective, Floor


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a program, and the bytes of their results on a device."""

    kind: str
    number: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program compiled for a GPU does on one device, sizes in bytes.

    `moved` goes through memory, most of it by the kinds of kernels that come first; of it
    `moved_at_least` cannot be spared: arrays that the program is given are read once, tables that
    it takes rows from apart, and a prompt's cache is written. `floor` are the seconds that its
    bytes, products and exchanges need at least; `seconds` the largest of them. With cuDNN its
    kernels compute attention of whole prompts; without Triton, which fails on a few shapes, there
    are copies that a GPU would not have made.
    """

    moved: int
    moved_at_least: int
    moved_by_kind: dict[str, int]
    flops: int
    sent: int
    sent_between_hosts: int
    temporaries: int
    launches: int
    has_cudnn: bool
    has_triton: bool
    floor: Floor
    seconds: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program's temporaries in bytes, what its devices exchange, and its work on a GPU."""

    temporaries: int
    traffic: tuple[Traffic, ...]
    work: Work | None


def for_cpu(program: Any, scale: float) -> Compiled:
    """A traced program on CPU devices, the bytes that they exchange times `scale`."""
    executable = program.lower().compile()
    _, collectives, _ = count(executable.as_text() or "")
    temporaries = executable.memory_analysis().temp_size_in_bytes
    return Compiled(temporaries, traffic(collectives, scale), None)


def for_gpu(program: Any, gpu: Gpu, flops: int, given: Any, left: Any = ()) -> Compiled:
    """A traced program on GPUs, each of which has at least so many `flops`. `given` are all its
    arguments and `left` the arrays that it cannot but write, both placed.
    """
    made = program_of(program)
    flops = max(flops, made.flops if made.has_triton else 0)  # cuBLAS pads
    floor = dataclasses.replace(made.floor(gpu), arithmetic=flops / gpu.bf16_flops)
    work = Work(
        moved=made.moved,
        moved_at_least=read_whole(program.jaxpr.jaxpr, given) + shard_bytes(left),
        moved_by_kind=made.moved_by_kind,
        flops=flops,
        sent=made.sent,
        sent_between_hosts=made.between_hosts,
        temporaries=made.temporaries,
        launches=made.launches,
        has_cudnn=any(kernel.kind == "attention" for kernel in made.kernels),
        has_triton=made.has_triton,
        floor=floor,
        seconds=floor.seconds,
    )
    return Compiled(made.temporaries, traffic(made.collectives), work)


def traffic(collectives: Iterable[Collective], scale: float = 1) -> tuple[Traffic, ...]:
    """Collectives by kind, their bytes times `scale`."""
    numbers: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for one in collectives:
        numbers[one.kind] += one.times
        sizes[one.kind] += one.times * one.nbytes
    return tuple(Traffic(kind, numbers[kind], int(sizes[kind] * scale)) for kind in sorted(numbers))


def read_whole(jaxpr: Any, given: Any) -> int:
    """Bytes on a device of the arrays that a program uses otherwise than as a table of rows."""
    leaves = jax.tree.leaves(given)
    return sum(
        shard_bytes(leaf) for leaf, is_read in zip(leaves, uses(jaxpr), strict=True) if is_read
    )


def uses(jaxpr: Any) -> list[bool]:
    """Whether each argument of a program is used, and otherwise than as a table of rows."""
    used = {id(out) for out in jaxpr.outvars}
    for equation in jaxpr.eqns:
        inner = getattr(equation.params.get("jaxpr"), "jaxpr", None)
        if equation.primitive.name == "gather":
            is_read = [False, True]
        elif inner is not None and len(inner.invars) == len(equation.invars):
            is_read = uses(inner)
        else:
            is_read = [True] * len(equation.invars)
        used |= {id(var) for var, read in zip(equation.invars, is_read, strict=True) if read}
    return [id(var) in used for var in jaxpr.invars]
