"""Plans as figures, for programs and for people."""

import dataclasses
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from catp_jax.plan.compiled import Traffic, Work
from catp_jax.targets import GPUS
from catp_jax.terminal import as_text
from convert.report import readable


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device holds and does; sizes in bytes.

    `temporaries` is the larger of the prefill's and a step's. `prefill_flops` and `token_flops` are
    of all devices together, the second for one more token of every prompt. `kept` are a prompt's
    visual tokens that are left. `memory` is a device's, and `found_batch` the largest that was
    found to fit into it. `prefill_work` and `token_work` require a target.
    """

    model: str
    mesh: dict[str, int]
    dtype: str
    batch: int
    visual_tokens: int
    kept: int
    weights: int
    self_kv: int
    cross_kv: int
    inputs: int
    temporaries: int
    prefill_flops: int
    token_flops: int
    prefill_traffic: tuple[Traffic, ...]
    token_traffic: tuple[Traffic, ...]
    target: str | None
    hosts: int
    memory: int
    prefill_work: Work | None
    token_work: Work | None
    found_batch: int | None

    @property
    def total(self) -> int:
        """All that is there at a time."""
        return self.weights + self.self_kv + self.cross_kv + self.inputs + self.temporaries

    @property
    def largest_batch(self) -> int:
        """The one that was found; else about how many prompts fit, taking all but weights to grow
        with them.

        That is too few where weights are gathered (fsdp) and the planned batch is small. A line
        through two batches would be too many: temporaries of one phase hide another's.
        """
        if self.found_batch is not None:
            return self.found_batch
        each = (self.total - self.weights) / self.batch
        return max(0, int((self.memory - self.weights) / each))

    @property
    def tokens_per_second(self) -> float | None:
        """Of all prompts, if a step took no longer than its floor."""
        return None if self.token_work is None else self.batch / self.token_work.seconds

    def as_json(self) -> dict[str, Any]:
        """All figures, and what they mean for the devices."""
        figures = dataclasses.asdict(self)
        is_found = figures.pop("found_batch") is not None
        return {
            **figures,
            "total": self.total,
            "fits": self.total <= self.memory,
            "largest_batch": self.largest_batch,
            "largest_batch_is_compiled": is_found,
            "tokens_per_second": self.tokens_per_second,
        }


def table(plan: Plan) -> Table:
    """A plan for a terminal."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "1 device"
    kept = "" if plan.kept == plan.visual_tokens else f", {plan.kept:,} kept"
    where = "" if plan.target is None else f", {plan.target}"
    where += f" on {plan.hosts} hosts" if plan.hosts > 1 else ""
    out = Table(
        title=as_text(
            f"{plan.model} in {plan.dtype} on {mesh}{where}, batch {plan.batch}, "
            f"{plan.visual_tokens:,} visual tokens each{kept}"
        ),
        caption=missing(plan),
        show_header=False,
        box=SIMPLE_HEAD,
    )
    out.add_column()
    out.add_column(justify="right")
    sizes = {
        "weights": plan.weights,
        "KV cache of self-attention": plan.self_kv,
        "KV cache of cross-attention": plan.cross_kv,
        "inputs": plan.inputs,
        "temporaries" if plan.target else "temporaries, at most": plan.temporaries,
        "in all": plan.total,
    }
    for name, size in sizes.items():
        out.add_row(f"{name}, a device", readable(size))
    out.add_section()
    out.add_row("FLOPs of the prefill, all devices", f"{plan.prefill_flops:.3g}")
    out.add_row("FLOPs of a token for each prompt", f"{plan.token_flops:.3g}")
    for name, every in (("prefill", plan.prefill_traffic), ("token", plan.token_traffic)):
        for one in every:
            row = f"{one.number} × {one.kind}, {name}, a device"
            out.add_row(row, readable(one.nbytes))
    for name, work in (("prefill", plan.prefill_work), ("token", plan.token_work)):
        if work is None:
            continue
        out.add_section()
        row = f"{name}, bytes moved, a device; at least {readable(work.moved_at_least)}"
        out.add_row(row, readable(work.moved))
        for part, seconds in dataclasses.asdict(work.floor).items():
            if seconds:
                out.add_row(f"{name}, time of {part} alone", duration(seconds))
        out.add_row(f"{name}, floor: it takes at least", duration(work.seconds))
    if plan.tokens_per_second is not None:
        out.add_row("tokens a second at that floor, all prompts", f"{plan.tokens_per_second:,.0f}")
    out.add_section()
    verdict = "fits" if plan.total <= plan.memory else "does not fit"
    about = "about" if plan.found_batch is None else "compiled for"
    out.add_row(
        f"{verdict} into {readable(plan.memory)}; largest batch, {about}", f"{plan.largest_batch}"
    )
    return out


def duration(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def missing(plan: Plan) -> str | None:
    """What this plan leaves out, and how to get it."""
    if plan.prefill_work is None or plan.token_work is None:
        return (
            "Not shown: temporaries in the weights' number type, bytes moved, the least time, the "
            f"largest batch. --target names a GPU to compile for ({', '.join(GPUS)})."
        )
    notes = []
    if not plan.prefill_work.has_cudnn:
        notes.append(
            "cuDNN is not found, or refuses: attention goes through memory, as it would there. Its "
            "package is nvidia-cudnn-cu13."
        )
    if not (plan.prefill_work.has_triton and plan.token_work.has_triton):
        notes.append("XLA has no Triton kernel for these shapes: a GPU may copy less.")
    return " ".join(notes) or None
