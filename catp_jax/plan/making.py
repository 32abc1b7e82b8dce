"""Makes a plan: traces a prefill and a step on abstract values, compiles both, adds up."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catp_jax.families import find_config
from catp_jax.generation import generate as programs
from catp_jax.generation.buckets import TEXT_LENGTHS, round_up
from catp_jax.models.frozen import freeze
from catp_jax.plan.compiled import Compiled, for_cpu, for_gpu
from catp_jax.plan.report import Plan
from catp_jax.plan.sizes import abstract_model, caches, inputs_of, shard_bytes
from catp_jax.pruning.named import Named, is_fixed
from catp_jax.pruning.named import pruners as pruners_of
from catp_jax.sharding.mesh import MeshLike, make_mesh, parse_mesh
from catp_jax.sharding.place import Sharded, kv_heads, place, place_inputs
from catp_jax.targets import devices_of, find_gpu
from catp_jax.targets.gpus import Gpu
from catp_jax.targets.products import matrix_flops
from convert.dtypes import parse_dtype

HOST = 8  # GPUs
MEMORY = 80_000_000_000  # of a device that is not named


def make_plan(
    model: str | Path,
    mesh: MeshLike,
    *,
    batch: int | None = None,
    tiles: int | None = None,
    prompt: int = 128,
    new_tokens: int = 128,
    dtype: str = "bfloat16",
    methods: Named = (),
    target: str | None = None,
    hosts: int | None = None,
    memory: int | None = None,
    find_largest_batch: bool = False,
    report: Callable[[int, int], None] = lambda batch, total: None,
    ignore_config: Sequence[str] = (),
) -> Plan:
    """Plans a generation: `batch` prompts of `prompt` tokens with an image each, and `new_tokens`.

    `model` is one of `families.PRESETS` or a folder, of which only config.json is read, without
    the keys `ignore_config`. The batch is split over `data` and `fsdp` (None: one prompt each).
    `tiles` are those of an image, for Llama Vision (None: all four). `methods` prune in order, each
    with a fixed budget, see `pruning.named`.

    `target` is one of `targets.GPUS`, of which `hosts` have the same number each (None: 8, and any
    fewer are on one); without it JAX has to see as many devices as the mesh has places. `memory` is
    a device's, in bytes (None: the target's, or 80 GB). `find_largest_batch` compiles for several
    batches; `report` hears of each, and of its bytes on a device.

    Raises ValueError for sizes that make no sense or do not divide, and for a target without its
    compiler.
    """
    if not all(is_fixed(*one) for one in methods):
        raise ValueError(
            "a plan has fixed budgets: --keep auto is for generate, and for methods that have "
            "learned their own (eigen)"
        )
    config = find_config(model, ignore_config)
    number_type = parse_dtype(dtype) or np.dtype(np.float32)
    sizes = parse_mesh(mesh)
    split = sizes["data"] * sizes["fsdp"]
    batch = split if batch is None else batch
    for name, number in (("batch", batch), ("prompt", prompt), ("new_tokens", new_tokens)):
        if number < 1:
            raise ValueError(f"{name} is at least 1, got {number}")
    if batch % split:
        raise ValueError(
            f"a batch of {batch} is not split over data={sizes['data']}, fsdp={sizes['fsdp']}: "
            f"every device would hold all of it; plan a multiple of {split}"
        )
    room = getattr(config.text, "max_position_embeddings", None)
    if room is not None and prompt + new_tokens > room:
        raise ValueError(
            f"{prompt} prompt tokens and {new_tokens} new ones do not fit the model's {room} "
            "positions"
        )
    gpu = devices = None
    places = math.prod(sizes.values())
    if target is not None:
        hosts = -(-places // HOST) if hosts is None else hosts
        gpu = find_gpu(target)
        devices = devices_of(gpu, places, hosts)
    elif hosts is not None or find_largest_batch:
        raise ValueError("hosts, and the largest batch, require a target")
    memory = memory or (MEMORY if gpu is None else gpu.memory)

    asked = Asked(config, sizes, tiles, prompt, new_tokens, number_type, methods, gpu, devices)
    made = asked.trace(batch)
    prefill, step = made.prefill(), made.step()
    plan = Plan(
        model=str(model),
        mesh=sizes,
        dtype=dtype,
        batch=batch,
        visual_tokens=made.visual_tokens,
        kept=made.kept,
        weights=made.weights,
        self_kv=made.self_kv,
        cross_kv=made.cross_kv,
        inputs=made.inputs,
        temporaries=max(prefill.temporaries, step.temporaries),
        prefill_flops=made.prefill_flops,
        token_flops=made.token_flops,
        prefill_traffic=prefill.traffic,
        token_traffic=step.traffic,
        target=target,
        hosts=hosts or 1,
        memory=memory,
        prefill_work=prefill.work,
        token_work=step.work,
        found_batch=None,
    )
    if not find_largest_batch:
        return plan

    def total(batch: int) -> int:
        """Bytes on a device, without a step's temporaries where the prefill's are too many."""
        made = asked.trace(batch)
        size = made.held + made.prefill().temporaries
        if size <= memory:
            size = max(size, made.held + made.step().temporaries)
        report(batch, size)
        return size

    known = {0: plan.weights, batch: plan.total}
    return dataclasses.replace(plan, found_batch=largest(total, memory, known, split))


def largest(total: Callable[[int], int], memory: int, known: dict[int, int], unit: int) -> int:
    """The multiple of `unit` whose total is within `memory` while the next one's is not.

    `known` has the totals of 0 and of some other. Few more are asked for: where a line through the
    two nearest meets `memory`, and every third time halfway between what fits and what does not.
    """
    known = dict(known)
    while True:
        fitting = [number for number, size in known.items() if size <= memory]
        if not fitting:
            return 0
        low = max(fitting)
        high = min((number for number in known if number > low), default=None)
        if high == low + unit:
            return low
        if high is None:
            before = sorted(known)[-2]
            each = (known[low] - known[before]) / (low - before)
            # totals may fall where other kernels are chosen, and lines through them mislead
            each = max(each, (known[low] - known[0]) / low / 4, 1)
            guess = low + int((memory - known[low]) / each)
        elif len(known) % 3 == 1:
            guess = (low + high) // 2
        else:
            guess = low + int((memory - known[low]) / (known[high] - known[low]) * (high - low))
        guess = max(guess // unit * unit, low + unit)
        guess = guess if high is None else min(guess, high - unit)
        known[guess] = total(guess)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A generation that can be compiled: what a device holds in bytes, FLOPs of all devices."""

    weights: int
    self_kv: int
    cross_kv: int
    inputs: int
    visual_tokens: int
    kept: int
    prefill_flops: int
    token_flops: int
    prefill: Callable[[], Compiled]
    step: Callable[[], Compiled]

    @property
    def held(self) -> int:
        """What is there in both programs."""
        return self.weights + self.self_kv + self.cross_kv + self.inputs


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `make_plan` was asked for, but the batch."""

    config: Any
    mesh: dict[str, int]
    tiles: int | None
    prompt: int
    new_tokens: int
    dtype: np.dtype
    methods: Named
    gpu: Gpu | None
    devices: list[Any] | None

    def trace(self, batch: int) -> Traced:
        """For a batch."""
        length = round_up(self.prompt, TEXT_LENGTHS)
        inputs, visual = inputs_of(self.config, batch, self.tiles, length)
        compiled_in = np.dtype(np.float32) if self.gpu is None else self.dtype
        scale = self.dtype.itemsize / compiled_in.itemsize
        model = abstract_model(self.config, compiled_in)
        mesh = make_mesh(self.mesh, kv_heads(model), self.devices)
        model = place(model, mesh)
        network = Sharded(mesh=mesh, frozen=freeze(model))
        pruners = pruners_of(self.methods, [visual] * batch, visual, model.sites, visual)
        inputs = place_inputs(inputs, mesh)
        tokens = place_inputs(jax.ShapeDtypeStruct((batch,), jnp.int32), mesh)
        prefill = programs.prefill.trace(network, pruners, inputs, new_slots=self.new_tokens)
        cache = place_inputs(prefill.out_info.cache, mesh)
        step = programs.step.trace(network, (), tokens, cache)
        self_attention, cross = caches(cache)
        left = [one.keep for one in pruners if not getattr(one, "keeps_all", False)]
        flops = [matrix_flops(program) for program in (prefill, step)]
        first, second = (partial(for_cpu, program, scale) for program in (prefill, step))
        if self.gpu is not None:
            # of a device, if all is divided
            own_flops = [number // mesh.size for number in flops]
            given = (network, pruners, inputs), (network, (), tokens, cache)
            first = partial(for_gpu, prefill, self.gpu, own_flops[0], given[0], cache)
            second = partial(for_gpu, step, self.gpu, own_flops[1], given[1])
        return Traced(
            weights=shard_bytes(place(abstract_model(self.config, self.dtype), mesh)),
            self_kv=int(shard_bytes(self_attention) * scale),
            cross_kv=int(shard_bytes(cross) * scale),
            inputs=shard_bytes(inputs),
            visual_tokens=visual,
            kept=next(iter(left[::-1]), visual),
            prefill_flops=flops[0],
            token_flops=flops[1],
            prefill=first,
            step=second,
        )


def force_devices(number: int) -> None:
    """Has JAX show so many CPU devices, whatever the machine has; before it is first used.

    Programs are compiled quickly rather than well: what is read from them does not depend on it.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    jax.config.update("jax_disable_most_optimizations", True)
