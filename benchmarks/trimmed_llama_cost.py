"""What does Trimmed Llama save at the real sizes of Llama 3.2 Vision?

Regime: one image of 4 tiles (6,404 visual tokens), one short prompt, bf16, no padding. Everything
here is exact and needs no weights: FLOPs are XLA's count of the lowered prefill on abstract arrays,
cache bytes are the shapes of the cache that prefill returns. (XLA counts the body of a loop once,
so attention is lowered in one piece instead of in blocks: the same arithmetic.) A decode step is
bound by the bytes it reads, which are all weights but the vision tower's, and the cache; the floor
of its time is those bytes over the memory's bandwidth.

    python benchmarks/trimmed_llama_cost.py [--size 11b|90b] [--prompt 64] [--new 128]

The last line is one JSON object.
"""

import datetime
import json
from enum import Enum
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from flax import nnx
from rich.console import Console
from rich.table import Table

from catp_jax.generation.generate import prefill
from catp_jax.models import layers
from catp_jax.models.mllama import Images, Inputs, Mllama, MllamaConfig
from catp_jax.pruning import TrimmedLlama
from catp_jax.pruning.budget import count

SHARES = ("100%", "75%", "50%", "25%", "10%")


class Size(Enum):
    B11 = "11b"
    B90 = "90b"


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def one_image(config: MllamaConfig, rows: int) -> Inputs:
    """The shapes of one prompt with one image of all tiles."""
    vision = config.vision
    tiles, size = vision.max_num_tiles, vision.image_size
    return Inputs(
        tokens=abstract((1, rows), jnp.int32),
        token_valid=abstract((1, rows), jnp.bool_),
        images=Images(
            pixels=abstract((1, tiles, vision.num_channels, size, size), jnp.float32),
            aspect_ratio_ids=abstract((1,), jnp.int32),
            aspect_ratio_mask=abstract((1, tiles), jnp.bool_),
            tile_index=abstract((1, tiles), jnp.int32),
            tile_valid=abstract((1, tiles), jnp.bool_),
            tile_seen=abstract((1, rows, tiles), jnp.bool_),
        ),
    )


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main(
    size: Annotated[Size, typer.Option(help="Which model.")] = Size.B11,
    prompt: Annotated[int, typer.Option(help="Rows of text.")] = 64,
    new: Annotated[int, typer.Option(help="Room for new tokens.")] = 128,
) -> None:
    """Print what Trimmed Llama saves at several budgets."""
    layers.LOGITS_AT_ONCE = 2**62
    config = {Size.B11: MllamaConfig.llama_3_2_11b, Size.B90: MllamaConfig.llama_3_2_90b}[size]()
    model = nnx.eval_shape(lambda: Mllama(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda leaf: abstract(leaf.shape, jnp.bfloat16), model)
    inputs = one_image(config, prompt)
    tokens = config.vision.max_num_tiles * config.vision.tokens_per_tile
    cross = set(config.text.cross_attention_layers)

    tower = jax.jit(lambda model, images: model.encode(images)).lower(model, inputs.images)
    tower_flops = tower.cost_analysis()["flops"]
    weights = nbytes(model.language_model.layers) + nbytes(model.lm_head)

    rows: list[dict[str, Any]] = []
    for share in SHARES:
        keep = count(share, tokens)
        pruners = () if keep == tokens else (TrimmedLlama(keep=keep),)
        lowered = prefill.lower(model, pruners, inputs, mode="meta", new_slots=new)
        caches = lowered.out_info.cache.layers
        cross_bytes = sum(nbytes(layer) for i, layer in enumerate(caches) if i in cross)
        self_bytes = sum(nbytes(layer) for i, layer in enumerate(caches) if i not in cross)
        rows.append(
            {
                "keep": keep,
                "prefill_tflops": lowered.cost_analysis()["flops"] / 1e12,
                "decoder_prefill_tflops": (lowered.cost_analysis()["flops"] - tower_flops) / 1e12,
                "cross_kv_bytes": cross_bytes,
                "self_kv_bytes": self_bytes,
                "decode_step_bytes_batch_1": weights + cross_bytes + self_bytes,
                "decode_step_bytes_batch_16": weights + 16 * (cross_bytes + self_bytes),
            }
        )

    table = Table(title=f"Llama 3.2 Vision {size.value}, one image, {prompt} text rows, bf16")
    for column in ("kept", "prefill", "without tower", "cross KV", "step, batch 1", "batch 16"):
        table.add_column(column, justify="right")
    full = rows[0]
    for row in rows:
        table.add_row(
            f"{row['keep']:,}",
            f"{row['prefill_tflops']:.2f} TFLOP",
            f"{row['decoder_prefill_tflops']:.2f} TFLOP",
            f"{row['cross_kv_bytes'] / 2**20:.1f} MiB",
            *(
                f"{row[key] / 2**30:.2f} GiB ({row[key] / full[key]:.0%})"
                for key in ("decode_step_bytes_batch_1", "decode_step_bytes_batch_16")
            ),
        )
    Console().print(table)
    result = {
        "benchmark": "trimmed_llama_cost",
        "size": size.value,
        "prompt": prompt,
        "new": new,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": "none: lowered for cpu, abstract arrays",
        "tower_tflops": tower_flops / 1e12,
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
