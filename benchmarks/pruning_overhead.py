"""What does pruning at BLIP-2's entry cost, and what does it save in the language model?

Regime: a random BLIP-2 with OPT of 0.3 B parameters (ViT-B, BERT-base as Q-Former, 12 OPT layers of
1024), one image and a prompt of 16 tokens each, float32 on a CPU, bfloat16 on a GPU.

Cost: a prefill that scores and gathers but keeps all 32 queries, against one that does neither.
Goal: at most 2 %. Saving: the language model's prefill alone, on 16, 8, 4 queries against 32.
Goal: the time falls by at least what the FLOPs of the compiled programs say, within 10 points.

Medians of several rounds in which all programs take their turn. The last line is one JSON object.

    python benchmarks/pruning_overhead.py
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from catp_jax.contract import Keep, Room, Site
from catp_jax.generation import generate as programs
from catp_jax.models.blip2 import Blip2, Blip2Config, Blip2Inputs
from catp_jax.models.frozen import Frozen, freeze
from catp_jax.models.opt import OptConfig
from catp_jax.models.qformer import QFormerConfig
from catp_jax.models.vit import VitConfig
from catp_jax.pruning import CATP, L2Norm, Position, Random, SelfAttention
from catp_jax.struct import replace

PROMPT = 16
METHODS: dict[str, Callable[[int], Any]] = {
    "catp": lambda keep: CATP(keep=keep),
    "catp, all layers": lambda keep: CATP(keep=keep, layers="all"),
    "catp, image weights": lambda keep: CATP(keep=keep, image_weights=True),
    "l2": lambda keep: L2Norm(keep=keep),
    "self_attention": lambda keep: SelfAttention(keep=keep),
    "position": lambda keep: Position(keep=keep),
    "random": lambda keep: Random(keep=keep, site=Site.ENTRY),
}


def config(size: str) -> Blip2Config:
    """The benchmark's model; "toy" is for a try."""
    width, depth = (768, 12) if size == "base" else (48, 4)
    vision = dataclasses.replace(
        VitConfig.eva_vit_g(),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=12,
        image_size=224 if size == "base" else 56,
    )
    qformer = dataclasses.replace(QFormerConfig.blip2(), encoder_hidden_size=width)
    text = OptConfig(
        vocab_size=16384,
        hidden_size=1024 if size == "base" else 64,
        num_hidden_layers=depth,
        num_attention_heads=16,
        ffn_dim=4096 if size == "base" else 128,
        max_position_embeddings=512,
        activation_function="relu",
        tie_word_embeddings=True,
    )
    return Blip2Config(vision, qformer, text, 32, None)


def times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round."""
    for call in calls.values():
        jax.block_until_ready(call())
    out: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            out[name].append(1000 * (time.perf_counter() - started))
    return out


def ratio(some: list[float], base: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(some, base, strict=True))


@jax.jit
def language_model(network: Frozen, front: Any, keep: Keep | None) -> Any:
    """The prefill from the Q-Former's output on."""
    return network.back(front, programs.Selector((), network.sites, chosen=keep), Room(new=0))[0]


@jax.jit
def up_to_entry(network: Frozen, inputs: Blip2Inputs) -> Any:
    """The prefill up to the Q-Former's output."""
    return replace(network.front(inputs), view=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=("base", "toy"), default="base")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    arguments = parser.parse_args()
    methods = {name: METHODS[name] for name in arguments.methods}
    batch, shape = arguments.batch, config(arguments.size)
    model = Blip2(shape, rngs=nnx.Rngs(0))
    if jax.default_backend() != "cpu":
        graph, state = nnx.split(model)
        model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    network = freeze(model)
    rng = np.random.default_rng(0)
    side = shape.vision.image_size
    inputs = Blip2Inputs(
        pixels=jnp.asarray(rng.normal(size=(batch, 3, side, side)), jnp.float32),
        image_index=jnp.arange(batch),
        tokens=jnp.asarray(rng.integers(5, 16000, (batch, PROMPT)), jnp.int32),
        token_valid=jnp.ones((batch, PROMPT), bool),
    )

    def prefill(pruners: tuple[Any, ...]) -> Callable[[], Any]:
        return lambda: programs.prefill(network, pruners, inputs, new_slots=0).logits

    def flops(function: Any, *given: Any, **options: Any) -> float:
        return float(function.lower(*given, **options).compile().cost_analysis()["flops"])

    calls = {"unpruned": prefill(())}
    calls |= {name: prefill((make(32),)) for name, make in methods.items()}
    measured = times(calls, arguments.rounds)
    whole = flops(programs.prefill, network, (), inputs, new_slots=0)
    cost = []
    for name, make in methods.items():
        row = {
            "method": name,
            "time_percent": 100 * (ratio(measured[name], measured["unpruned"]) - 1),
            "flops_percent": 100
            * (flops(programs.prefill, network, (make(32),), inputs, new_slots=0) / whole - 1),
        }
        cost.append(row)
        print(
            f"{name:20} scoring and gathering: {row['time_percent']:+.2f} % of the prefill's time, "
            f"{row['flops_percent']:+.3f} % of its FLOPs"
        )

    front = up_to_entry(network, inputs)
    keeps: dict[int, Keep | None] = {32: None}
    for keep in (16, 8, 4):
        index = jnp.broadcast_to(jnp.arange(keep, dtype=jnp.int32) * (32 // keep), (batch, keep))
        keeps[keep] = Keep(indices=index, valid=jnp.ones((batch, keep), bool))
    calls = {
        str(keep): (lambda chosen=chosen: language_model(network, front, chosen))
        for keep, chosen in keeps.items()
    }
    measured = times(calls, arguments.rounds)
    full = flops(language_model, network, front, None)
    saving = []
    for keep, chosen in keeps.items():
        if chosen is None:
            continue
        row = {
            "keep": keep,
            "time_saved_percent": 100 * (1 - ratio(measured[str(keep)], measured["32"])),
            "flops_saved_percent": 100 * (1 - flops(language_model, network, front, chosen) / full),
        }
        saving.append(row)
        print(
            f"keep {keep:2}: the language model's prefill takes {row['time_saved_percent']:.1f} % "
            f"less time, {row['flops_saved_percent']:.1f} % fewer FLOPs"
        )
    print(
        json.dumps(
            {
                "benchmark": "pruning_overhead",
                "date": datetime.date.today().isoformat(),
                "device": jax.devices()[0].device_kind,
                "cores": os.cpu_count(),
                "versions": {"python": platform.python_version(), "jax": jax.__version__},
                "size": arguments.size,
                "batch": batch,
                "rounds": arguments.rounds,
                "language_model_ms": statistics.median(measured["32"]),
                "cost": cost,
                "saving": saving,
            }
        )
    )


if __name__ == "__main__":
    main()
