"""What a compiled program does on one device, and the least time that can take."""

import dataclasses
from collections import Counter

from catp_jax.targets.gpus import Gpu


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, or a copy, of a program; bytes and FLOPs are of one of its runs.

    There are `times` of them. `flops` are those of matrix products and convolutions.
    """

    name: str
    kind: str
    times: int
    read: int
    written: int
    flops: int

    @property
    def moved(self) -> int:
        """Bytes to and from memory in all runs."""
        return self.times * (self.read + self.written)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange in groups of `group` devices; `nbytes` of its result, and `sent`, by one device.

    `sent` is what has to leave a device at least, as in a ring; `between_hosts` what has to leave
    its host, shared by all devices there.
    """

    name: str
    kind: str
    times: int
    group: int
    nbytes: int
    sent: int
    between_hosts: int


@dataclasses.dataclass(frozen=True)
class Floor:
    """The seconds that memory, arithmetic, links between GPUs and the network between hosts need at
    least, each if it were alone.
    """

    memory: float
    arithmetic: float
    links: float
    network: float

    @property
    def seconds(self) -> float:
        """The least time: all at once, and each as fast as its data sheet says."""
        return max(self.memory, self.arithmetic, self.links, self.network)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program compiled for a GPU, as one device sees it. Sizes in bytes.

    Loops count as often as the compiler knows that they run; `open_loops` names those of which it
    does not, counted once. Of branches the one that moves most counts. `graphs` are the CUDA graphs
    that kernels are gathered in, None if the compiler did not say. Without Triton, which fails on a
    few shapes, matrix products are cuBLAS's, with what these pad and copy.
    """

    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    open_loops: tuple[str, ...]
    graphs: int | None
    arguments: int
    outputs: int
    temporaries: int
    has_triton: bool = True

    @property
    def moved(self) -> int:
        """Bytes read from memory and written to it."""
        return sum(kernel.moved for kernel in self.kernels)

    @property
    def moved_by_kind(self) -> dict[str, int]:
        """`moved`, most first."""
        sums: Counter[str] = Counter()
        for kernel in self.kernels:
            sums[kernel.kind] += kernel.moved
        return dict(sums.most_common())

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products and convolutions."""
        return sum(kernel.times * kernel.flops for kernel in self.kernels)

    @property
    def launches(self) -> int:
        """How often a kernel or a copy is started."""
        return sum(kernel.times for kernel in self.kernels)

    @property
    def sent(self) -> int:
        """Bytes that have to leave the device for others."""
        return sum(one.times * one.sent for one in self.collectives)

    @property
    def between_hosts(self) -> int:
        """Bytes that have to leave the device for other hosts."""
        return sum(one.times * one.between_hosts for one in self.collectives)

    def floor(self, gpu: Gpu) -> Floor:
        """The least time that this very program takes on such GPUs."""
        return Floor(
            memory=self.moved / gpu.bandwidth,
            arithmetic=self.flops / gpu.bf16_flops,
            links=self.sent / gpu.link,
            network=self.between_hosts / gpu.network,
        )
