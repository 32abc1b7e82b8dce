"""What a model needs on a mesh, found by compiling it without weights.

The programs are compiled for as many forced CPU devices as the mesh has places, on abstract values:
nothing of the model is in memory, so 90B are planned on a laptop. Bytes of weights and caches are
exact. FLOPs are those of all matrix products, counted in the program before it is split. Where the
split programs send data, and how much, is read from the compiled ones. Temporaries are those of the
same programs in float32 (a CPU has no bfloat16 products, and would count converted weights): take
them as an upper bound.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

import convert
from catp_jax import checkpoint
from catp_jax.generation import generate as programs
from catp_jax.generation.inputs import TEXT_LENGTHS, round_up
from catp_jax.models.blip2 import Blip2Config, Blip2Inputs
from catp_jax.models.cache import Block
from catp_jax.models.frozen import freeze
from catp_jax.models.instructblip import InstructBlipConfig, InstructBlipInputs
from catp_jax.models.mllama import Images, Inputs, MllamaConfig
from catp_jax.models.querying import QueryingConfig, QueryingInputs
from catp_jax.sharding.mesh import MeshLike, make_mesh, parse_mesh
from catp_jax.sharding.place import Sharded, kv_heads, place, place_inputs
from convert.families import family_of
from convert.reader import cast, parse_dtype
from convert.report import readable

PRESETS: Mapping[str, Callable[[], Any]] = {
    "Llama-3.2-11B-Vision": MllamaConfig.llama_3_2_11b,
    "Llama-3.2-90B-Vision": MllamaConfig.llama_3_2_90b,
    "blip2-opt-2.7b": Blip2Config.opt_2_7b,
    "blip2-opt-6.7b": Blip2Config.opt_6_7b,
    "blip2-flan-t5-xl": Blip2Config.flan_t5_xl,
    "blip2-flan-t5-xxl": Blip2Config.flan_t5_xxl,
    "instructblip-vicuna-7b": InstructBlipConfig.vicuna_7b,
    "instructblip-vicuna-13b": InstructBlipConfig.vicuna_13b,
    "instructblip-flan-t5-xl": InstructBlipConfig.flan_t5_xl,
    "instructblip-flan-t5-xxl": InstructBlipConfig.flan_t5_xxl,
}
"""Configurations by the names of the published checkpoints."""

BYTES = {"bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}  # all others: 8
COLLECTIVE = re.compile(
    r"= (\([^)]*\)|\S+) "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a program, and the bytes of their results on a device."""

    kind: str
    number: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device holds and does; sizes in bytes.

    `temporaries` is the larger of the prefill's and a step's. `prefill_flops` and `token_flops` are
    of all devices together, the second for one more token of every prompt. `kept` are a prompt's
    visual tokens that are left.
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

    @property
    def total(self) -> int:
        """All that is there at a time."""
        return self.weights + self.self_kv + self.cross_kv + self.inputs + self.temporaries

    def largest_batch(self, memory: int) -> int:
        """About how many prompts fit into `memory`, taking all but weights to grow with them.

        That is too few where weights are gathered (fsdp) and the planned batch is small. A line
        through two batches would be too many: temporaries of one phase hide another's.
        """
        each = (self.total - self.weights) / self.batch
        return max(0, int((memory - self.weights) / each))

    def as_json(self, memory: int) -> dict[str, Any]:
        """All figures, and what they mean for devices of so many bytes."""
        return {
            **dataclasses.asdict(self),
            "total": self.total,
            "memory": memory,
            "fits": self.total <= memory,
            "largest_batch": self.largest_batch(memory),
        }


def make_plan(
    model: str | Path,
    mesh: MeshLike,
    *,
    batch: int | None = None,
    tiles: int | None = None,
    prompt: int = 128,
    new_tokens: int = 128,
    dtype: str = "bfloat16",
    pruner: Callable[[int, frozenset[Any]], Any] | None = None,
) -> Plan:
    """Plans a generation: `batch` prompts of `prompt` tokens with an image each, and `new_tokens`.

    `model` is one of `PRESETS` or a folder, of which only config.json is read. The batch is split
    over `data` and `fsdp` (None: one prompt each). `tiles` are those of an image, for Llama Vision
    (None: all four). `pruner` makes a method from the number of visual tokens and the model's
    sites. There have to be as many devices as the mesh has places.

    Raises ValueError for sizes that make no sense or do not divide.
    """
    config, number_type = find_config(model), parse_dtype(dtype) or np.dtype(np.float32)
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
    inputs, visual = inputs_of(config, batch, tiles, round_up(prompt, TEXT_LENGTHS))
    abstract = convert.abstract(config)
    grid = make_mesh(mesh, kv_heads(abstract))
    wide = place(abstract, grid)
    network = Sharded(mesh=grid, frozen=freeze(wide))
    pruners: tuple[Any, ...] = () if pruner is None else (pruner(visual, wide.sites),)
    inputs = place_inputs(inputs, grid)

    prefill = programs.prefill.trace(network, pruners, inputs, new_slots=new_tokens)
    first = prefill.lower().compile()
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        prefill.out_info.cache,
        first.output_shardings.cache,
    )
    tokens = place_inputs(jax.ShapeDtypeStruct((batch,), jnp.int32), grid)
    step = programs.step.trace(network, tokens, state)
    second = step.lower().compile()

    size = number_type.itemsize
    own, cross = caches(state)
    return Plan(
        model=str(model),
        mesh=sizes,
        dtype=dtype,
        batch=batch,
        visual_tokens=visual,
        kept=pruners[0].keep if pruners else visual,
        weights=weight_bytes(wide, config, number_type),
        self_kv=sum(map(shard_bytes, own)) * size // 4,
        cross_kv=sum(map(shard_bytes, cross)) * size // 4,
        inputs=sum(map(shard_bytes, jax.tree.leaves(inputs))),
        temporaries=max(temporaries(first), temporaries(second)),
        prefill_flops=matrix_flops(prefill.jaxpr.jaxpr),
        token_flops=matrix_flops(step.jaxpr.jaxpr),
        prefill_traffic=traffic(first.as_text() or "", size),
        token_traffic=traffic(second.as_text() or "", size),
    )


def force_devices(number: int) -> None:
    """Has JAX show so many CPU devices, whatever the machine has; before it is first used.

    Programs are compiled quickly rather than well: what is measured of them does not depend on it.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    jax.config.update("jax_disable_most_optimizations", True)


def find_config(model: str | Path) -> Any:
    """A configuration by its checkpoint's name, or a folder's. Raises ValueError for others."""
    if str(model) in PRESETS:
        return PRESETS[str(model)]()
    if not Path(model).is_dir():
        raise ValueError(f"{model} is no folder and none of {', '.join(PRESETS)}")
    return convert.read_config(Path(model))


def inputs_of(config: Any, batch: int, tiles: int | None, prompt: int) -> tuple[Any, int]:
    """Abstract inputs of prompts with an image each, and the visual tokens of one."""
    if isinstance(config, MllamaConfig):
        most = config.vision.max_num_tiles
        tiles = most if tiles is None else tiles
        if not 1 <= tiles <= most:
            raise ValueError(f"an image has 1 to {most} tiles, got {tiles}")
        make = partial(_mllama_inputs, config, batch, tiles, prompt)
        return jax.eval_shape(make), tiles * config.vision.tokens_per_tile
    if tiles is not None:
        raise ValueError("only images of Llama Vision have tiles")
    if not isinstance(config, QueryingConfig):
        raise ValueError("this model matches images and texts; a model that writes text is wanted")
    make = partial(_querying_inputs, config, batch, prompt)
    return jax.eval_shape(make), config.num_query_tokens


def _mllama_inputs(config: MllamaConfig, batch: int, tiles: int, prompt: int) -> Inputs:
    most, side = config.vision.max_num_tiles, config.vision.image_size
    return Inputs(
        tokens=jnp.zeros((batch, prompt), jnp.int32),
        token_valid=jnp.ones((batch, prompt), bool),
        images=Images(
            pixels=jnp.zeros((batch, most, 3, side, side), jnp.float32),
            aspect_ratio_ids=jnp.zeros((batch,), jnp.int32),
            aspect_ratio_mask=jnp.ones((batch, most), bool),
            tile_index=jnp.zeros((batch, tiles), jnp.int32),
            tile_valid=jnp.ones((batch, tiles), bool),
            tile_seen=jnp.ones((batch, prompt, tiles), bool),
        ),
    )


def _querying_inputs(config: QueryingConfig, batch: int, prompt: int) -> QueryingInputs:
    side = config.vision.image_size
    tokens, valid = jnp.zeros((batch, prompt), jnp.int32), jnp.ones((batch, prompt), bool)
    both: dict[str, Any] = {
        "pixels": jnp.zeros((batch, 3, side, side), jnp.float32),
        "image_index": jnp.zeros((batch,), jnp.int32),
        "tokens": tokens,
        "token_valid": valid,
    }
    if isinstance(config, InstructBlipConfig):
        return InstructBlipInputs(**both, instruction=tokens, instruction_valid=valid)
    return Blip2Inputs(**both)


def shard_bytes(struct: Any) -> int:
    """Bytes of an array that one device holds."""
    return math.prod(struct.sharding.shard_shape(struct.shape)) * struct.dtype.itemsize


def weight_bytes(model: Any, config: Any, dtype: np.dtype) -> int:
    """Bytes of the parameters that one device holds, those that stay float32 as such."""
    family = family_of(config)
    return sum(
        shard_bytes(leaf) // leaf.dtype.itemsize * cast(family, name, dtype).itemsize
        for name, leaf in checkpoint.names(model).items()
    )


def caches(state: Any) -> tuple[list[Any], list[Any]]:
    """The keys and values of self- and of cross-attention in a model's cache."""
    own: list[Any] = []
    cross: list[Any] = []
    leaves = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda node: isinstance(node, Block)
    )
    for path, leaf in leaves:
        if isinstance(leaf, Block):
            is_cross = jax.tree_util.keystr(path[:1], simple=True) == "cross"
            (cross if is_cross else own).extend([leaf.keys, leaf.values])
    return own, cross


def temporaries(program: Any) -> int:
    """Bytes that a compiled program wants on a device besides what comes in and goes out."""
    return program.memory_analysis().temp_size_in_bytes


def matrix_flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products in a program, loops counted out."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner_program in _programs_in(equation.params.values()):
            total += times * matrix_flops(inner_program)
    return total


def _programs_in(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _programs_in(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr


def traffic(program: str, itemsize: int) -> tuple[Traffic, ...]:
    """The collectives in the text of a compiled program, float32 counted as `itemsize` bytes."""
    numbers: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for shapes, kind in COLLECTIVE.findall(program):
        numbers[kind] = numbers.get(kind, 0) + 1
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            entries = math.prod(int(size) for size in dims.split(",") if size)
            one = itemsize if dtype == "f32" else BYTES.get(dtype, 8)
            sizes[kind] = sizes.get(kind, 0) + entries * one
    return tuple(Traffic(kind, numbers[kind], sizes[kind]) for kind in sorted(numbers))


def table(plan: Plan, memory: int) -> Table:
    """A plan for a terminal; `memory` is a device's."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "1 device"
    kept = "" if plan.kept == plan.visual_tokens else f", {plan.kept:,} kept"
    out = Table(
        title=f"{plan.model} in {plan.dtype} on {mesh}, batch {plan.batch}, "
        f"{plan.visual_tokens:,} visual tokens each{kept}",
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
        "temporaries, at most": plan.temporaries,
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
    out.add_section()
    verdict = "fits" if plan.total <= memory else "does not fit"
    out.add_row(
        f"{verdict} into {readable(memory)}; largest batch, about",
        f"{plan.largest_batch(memory)}",
    )
    return out
