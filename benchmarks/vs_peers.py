"""How fast is BLIP-2 here against transformers and keras-hub, on the same weights and machine?

Regime: one random BLIP-2 of the given size, written once as a Hugging Face folder that every
implementation loads with its own loader; same images and prompts; greedy; float32 on a CPU,
bfloat16 on a GPU. Prefill is the time to the first token, images in, token out. Decode is the time
per further token: the difference between many tokens and one. Each is the median of several rounds;
in a round all implementations take their turn, so that a slow moment hits all alike. Compiling is
not timed. Floors: FLOPs of our compiled prefill over its time, weights of the language model read
once per decoded token over its time.

    pip install torch==2.13.0 keras-hub          # keras-hub brings TensorFlow
    python benchmarks/vs_peers.py                # 0.3 B parameters; --size toy for a try
    python benchmarks/vs_peers.py --language-model t5

transformers runs eager, and with `torch.compile` and a static cache where that works. keras-hub
runs on JAX, in one compiled program as it comes. The last line is one JSON object.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import jax.numpy as jnp
import numpy as np

SIZES: dict[str, dict[str, Any]] = {
    "toy": {
        "vision": (2, 64, 2, 128, 56),
        "qformer": (2, 48, 2, 96),
        "opt": (2, 64, 2, 128),
        "t5": (2, 64, 2, 128),
        "vocabulary": 512,
    },
    # ViT-B, BERT-base, and language models of 12 layers of 1024
    "base": {
        "vision": (12, 768, 12, 3072, 224),
        "qformer": (12, 768, 12, 3072),
        "opt": (12, 1024, 16, 4096),
        "t5": (8, 1024, 16, 2816),
        "vocabulary": 16384,
    },
    # the real BLIP-2 opt-2.7b, flan-t5-xl
    "real": {
        "vision": (39, 1408, 16, 6144, 224),
        "qformer": (12, 768, 12, 3072),
        "opt": (32, 2560, 32, 10240),
        "t5": (24, 2048, 32, 5120),
        "vocabulary": 50304,
    },
}
QUERIES, PROMPT = 32, 16  # tokens


def write_checkpoint(size: str, kind: str, folder: Path, dtype: str) -> int:
    """A random BLIP-2 as transformers saves it. Returns its number of parameters."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    shape = SIZES[size]
    layers, width, heads, inner, image = shape["vision"]
    vision = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "image_size": image,
        "initializer_range": 0.02,
    }
    layers, width, heads, inner = shape["qformer"]
    qformer = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "encoder_hidden_size": vision["hidden_size"],
    }
    layers, width, heads, inner = shape[kind]
    vocabulary = shape["vocabulary"]
    if kind == "opt":
        text = {
            "model_type": "opt",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "word_embed_proj_dim": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "ffn_dim": inner,
        }
    else:
        text = {
            "model_type": "t5",
            "vocab_size": vocabulary,
            "d_model": width,
            "d_kv": width // heads,
            "num_heads": heads,
            "d_ff": inner,
            "num_layers": layers,
            "num_decoder_layers": layers,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        }
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=vocabulary - 1,
        tie_word_embeddings=text.get("tie_word_embeddings", True),
    )
    model = Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.query_tokens, std=0.02)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    # keras-hub reads some keys that transformers leaves out where they have their default
    written = json.loads((folder / "config.json").read_text())
    for part in ("vision_config", "qformer_config", "text_config"):
        written[part] = {**getattr(config, part).to_dict(), **written[part]}
    (folder / "config.json").write_text(json.dumps(written))
    return sum(parameter.numel() for parameter in model.parameters())


def inputs(size: str, batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images [batch, 3, side, side] and prompts [batch, PROMPT]."""
    rng = np.random.default_rng(seed)
    side, vocabulary = SIZES[size]["vision"][4], SIZES[size]["vocabulary"]
    images = rng.normal(size=(batch, 3, side, side)).astype(np.float32)
    return images, rng.integers(5, vocabulary - 5, (batch, PROMPT)).astype(np.int32)


Run = Callable[[int], np.ndarray]
"""Generates so many tokens and returns them [batch, new]."""


def ours(
    folder: Path, images: np.ndarray, prompts: np.ndarray, dtype: str
) -> tuple[Run, float, int]:
    from flax import nnx

    import convert
    from catp_jax.generation import generate as programs
    from catp_jax.generation.decoding import Stop
    from catp_jax.generation.sampling import sampling
    from catp_jax.models.blip2 import Blip2Inputs
    from catp_jax.models.frozen import freeze

    model = convert.load(folder, dtype)[0]
    network = freeze(model)
    # what a decoded token reads: T5's encoder is done by then
    parts = nnx.state(model.language_model, nnx.Not(nnx.PathContains("encoder")))
    read = sum(x.nbytes for x in jax.tree.leaves(parts))
    packed = Blip2Inputs(
        pixels=jnp.asarray(images),
        image_index=jnp.arange(len(images)),
        tokens=jnp.asarray(prompts),
        token_valid=jnp.ones(prompts.shape, bool),
    )
    never, pad = jnp.asarray([-1], jnp.int32), jnp.asarray(0, jnp.int32)
    greedy = sampling(len(images))

    def run(new: int) -> np.ndarray:
        out = programs.generate(
            network, (), packed, greedy, Stop(ends=never, pad=pad, max_new_tokens=new)
        )
        return np.asarray(out.tokens)

    lowered = programs.prefill.lower(network, (), packed, new_slots=0)
    return run, float(lowered.compile().cost_analysis()["flops"]), read


def with_transformers(
    folder: Path, images: np.ndarray, prompts: np.ndarray, dtype: str, is_compiled: bool
) -> Run:
    import torch
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().to(device)
    options: dict[str, Any] = {"do_sample": False}
    if is_compiled:
        options["cache_implementation"] = "static"
        model.vision_model.forward = torch.compile(model.vision_model.forward)
        model.qformer.forward = torch.compile(model.qformer.forward)
        model.language_model.forward = torch.compile(model.language_model.forward)
    marks = np.full((len(prompts), QUERIES), model.config.image_token_index)
    tokens = torch.from_numpy(np.concatenate([marks, prompts], axis=1).astype(np.int64)).to(device)
    pixels = torch.from_numpy(images).to(device, getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    model.language_model.generation_config.eos_token_id = None

    def run(new: int) -> np.ndarray:
        out = model.generate(
            pixel_values=pixels,
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            **options,
        )
        return out[:, -new:].cpu().numpy()

    return run


def with_keras(folder: Path, images: np.ndarray, prompts: np.ndarray, dtype: str, kind: str) -> Run:
    import keras_hub

    backbone = keras_hub.models.BLIP2Backbone.from_preset(str(folder), dtype=dtype)
    pixels = images.transpose(0, 2, 3, 1)
    batch, length = prompts.shape
    if kind == "opt":
        model = keras_hub.models.BLIP2CausalLM(preprocessor=None, backbone=backbone)
    else:
        model = keras_hub.models.BLIP2Seq2SeqLM(preprocessor=None, backbone=backbone)

    def run(new: int) -> np.ndarray:
        first = length if kind == "opt" else 1
        room = np.zeros((batch, first + new), np.int32)
        room[:, :first] = prompts if kind == "opt" else 0
        mask = np.zeros(room.shape, bool)
        mask[:, :first] = True
        given = {"images": pixels}
        if kind == "opt":
            given |= {"token_ids": room, "padding_mask": mask}
        else:
            given |= {
                "encoder_token_ids": prompts,
                "encoder_padding_mask": np.ones(prompts.shape, bool),
                "decoder_token_ids": room,
                "decoder_padding_mask": mask,
            }
        out = model.generate(given, stop_token_ids=None)
        key = "token_ids" if kind == "opt" else "decoder_token_ids"
        return np.asarray(out[key])[:, first:]

    return run


def seconds(run: Run, new: int) -> float:
    started = time.perf_counter()
    run(new)
    return time.perf_counter() - started


def measure(runs: dict[str, Run], new: int, rounds: int) -> dict[str, dict[str, float]]:
    """Prefill and decode times in ms, medians and half interquartile ranges."""
    for run in runs.values():
        run(1), run(new)  # compiles
    one: dict[str, list[float]] = {name: [] for name in runs}
    more: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            first = seconds(run, 1)
            one[name].append(1000 * first)
            more[name].append(1000 * (seconds(run, new) - first) / (new - 1))
    out = {}
    for name in runs:
        out[name] = {
            "prefill_ms": statistics.median(one[name]),
            "prefill_spread_ms": half_range(one[name]),
            "token_ms": statistics.median(more[name]),
            "token_spread_ms": half_range(more[name]),
        }
    return out


def half_range(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2


def agreement(runs: dict[str, Run], new: int) -> dict[str, float]:
    """Share of the tokens that are those of eager transformers, or else of the last that runs, as a
    check on who runs what.
    """
    wanted = runs.get("transformers", [*runs.values()][-1])(new)
    return {name: float((run(new) == wanted).mean()) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--language-model", choices=("opt", "t5"), default="opt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=17, help="tokens; decode is from 1 to these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=[], help="implementations to leave out")
    arguments = parser.parse_args()
    kind, size = arguments.language_model, arguments.size
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"

    rows, skipped = [], {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parameters = write_checkpoint(size, kind, folder, dtype)
        print(f"{parameters / 1e6:.0f} M parameters, {dtype}, {jax.devices()[0].device_kind}")
        for batch in arguments.batches:
            images, prompts = inputs(size, batch)
            own, flops, read = ours(folder, images, prompts, dtype)
            makers: dict[str, Callable[[], Run]] = {
                "transformers": lambda i=images, p=prompts: with_transformers(
                    folder, i, p, dtype, False
                ),
                "transformers, compiled": lambda i=images, p=prompts: with_transformers(
                    folder, i, p, dtype, True
                ),
                "keras-hub": lambda i=images, p=prompts: with_keras(folder, i, p, dtype, kind),
            }
            runs = {"catp-jax": own}
            for name, make in makers.items():
                if name in arguments.without:
                    continue
                try:
                    runs[name] = make()
                    runs[name](2)
                except Exception as error:  # of somebody else's code: say so, and go on
                    runs.pop(name, None)
                    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    skipped[f"{name}, batch {batch}"] = said
                    print(f"{name} does not run here: {said}")
            same = agreement(runs, arguments.new)
            times = measure(runs, arguments.new, arguments.rounds)
            mine = times["catp-jax"]
            mine["prefill_gflops_per_s"] = flops / mine["prefill_ms"] / 1e6
            mine["decode_gb_per_s"] = read / mine["token_ms"] / 1e6
            for name, row in times.items():
                row |= {
                    "same_tokens": same[name],
                    "prefill_ratio": row["prefill_ms"] / mine["prefill_ms"],
                    "token_ratio": row["token_ms"] / mine["token_ms"],
                }
                rows.append({"batch": batch, "implementation": name} | row)
                print(
                    f"batch {batch}  {name:24} prefill {row['prefill_ms']:8.1f} ms "
                    f"({row['prefill_ratio']:.2f} ×)  token {row['token_ms']:7.2f} ms "
                    f"({row['token_ratio']:.2f} ×)  same tokens {row['same_tokens']:.0%}"
                )
            print(
                f"         ours: {mine['prefill_gflops_per_s']:.0f} GFLOP/s in the prefill, "
                f"{mine['decode_gb_per_s']:.1f} GB/s of weights in decode"
            )

    import torch
    import transformers

    versions = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if any(row["implementation"] == "keras-hub" for row in rows):
        import keras_hub

        versions["keras-hub"] = keras_hub.__version__
    result = {
        "benchmark": "vs_peers",
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": versions,
        "size": size,
        "language_model": kind,
        "parameters": parameters,
        "dtype": dtype,
        "prompt_tokens": PROMPT,
        "query_tokens": QUERIES,
        "new_tokens": arguments.new,
        "rounds": arguments.rounds,
        "rows": rows,
        "skipped": skipped,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
