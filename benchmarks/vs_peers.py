"""How fast is our BLIP-2 or Llama Vision against transformers' and keras-hub's, same weights here?

Regime: one random model of the given size, written once as a Hugging Face folder that every
implementation loads with its own loader; same images and prompts; greedy; float32 on a CPU,
bfloat16 on a GPU. Prefill is the time to the first token, images in, token out. Decode is the time
per further token: the difference between many tokens and one. Each is the median of several rounds;
in a round all implementations take their turn, so that a slow moment hits all alike. Compiling is
not timed. Floors: FLOPs of our prefill's matrix products over its time, weights of the language
model read once per decoded token over its time. Beside them one matrix product of the vision
tower's size, XLA's and torch's: what the prefills could reach.

On a machine with other work --cpu-time, on one core (`taskset -c 0`), times what the process itself
took of it.

    pip install torch==2.13.0 keras-hub           # keras-hub brings TensorFlow
    python -m benchmarks.vs_peers                 # BLIP-2, 0.3 B parameters; --size toy for a try
    python -m benchmarks.vs_peers --model llama   # Llama Vision, 0.1 B; --model t5

transformers runs eager, and with `torch.compile` and a static cache where that works. keras-hub
runs on JAX, in one compiled program as it comes, and has no Llama Vision. The last line is one JSON
object.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import numpy as np
from flax import nnx

import convert
from benchmarks import programs
from benchmarks.programs import LLAMA, OPT, T5
from benchmarks.timing import Clock, Run, measure, milliseconds
from catp_jax.generation.generate import generate, prefill
from catp_jax.generation.options import Options
from catp_jax.models.blip2 import Blip2Inputs
from catp_jax.models.frozen import freeze
from catp_jax.models.mllama import MllamaConfig
from catp_jax.readers.mllama_packing import ProcessedImage, pack
from catp_jax.targets.products import matrix_flops

SIZES = ("toy", "base", "real")
PROMPT = 16  # tokens

# ViT-B, BERT-base, and language models of 12 layers of 1024
BLIP2: dict[str, dict[str, Any]] = {
    "vision": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "qformer": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "encoder_hidden_size": 768,
    },
    OPT: {
        "vocab_size": 16384,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "ffn_dim": 4096,
    },
    T5: {
        "vocab_size": 16384,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_layers": 8,
        "num_decoder_layers": 8,
        "num_heads": 16,
    },
}
# four tiles of 257 tokens; three query heads share keys and values, every fifth layer looks at the
# image
SMALL_LLAMA: dict[str, dict[str, Any]] = {
    "vision": {
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "num_global_layers": 2,
        "attention_heads": 6,
        "intermediate_size": 1536,
        "image_size": 224,
        "intermediate_layers_indices": (1, 3, 5),
    },
    "text": {
        "vocab_size": 8192,
        "hidden_size": 768,
        "num_hidden_layers": 10,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "cross_attention_layers": (3, 8),
    },
}
MODELS = {"opt": OPT, "t5": T5, "llama": LLAMA}


def config_of(size: str, name: str) -> Any:
    """What is compared: toy, small, or as published."""
    config = programs.config_of(name, "toy" if size == "toy" else "real")
    if size == "base":
        parts = SMALL_LLAMA if name == LLAMA else {**BLIP2, "text": BLIP2[name]}
        config = dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, **parts["vision"]),
            text=dataclasses.replace(config.text, **parts["text"]),
        )
        vocabulary = config.text.vocab_size
        if name == LLAMA:
            return dataclasses.replace(config, image_token_index=vocabulary, vision=as_hf(config))
        qformer = dataclasses.replace(config.qformer, **parts["qformer"])
        return dataclasses.replace(config, qformer=qformer, image_token_index=vocabulary - 1)
    return dataclasses.replace(config, vision=as_hf(config)) if name == LLAMA else config


def as_hf(config: Any) -> Any:
    """The vision tower as transformers has it, for the same tokens."""
    return dataclasses.replace(config.vision, vision_mode="hf")


def write_checkpoint(config: Any, folder: Path, dtype: str) -> int:
    """A random model as transformers saves it. Returns its number of parameters."""
    import torch

    from benchmarks import peers

    torch.manual_seed(0)
    model = peers.random_model(config, dtype)
    model.save_pretrained(folder)
    # keras-hub reads some keys that transformers leaves out where they have their default
    written = json.loads((folder / "config.json").read_text())
    for part in ("vision_config", "qformer_config", "text_config"):
        if (own := getattr(model.config, part, None)) is not None:
            written[part] = {**own.to_dict(), **written[part]}
    (folder / "config.json").write_text(json.dumps(written))
    return sum(parameter.numel() for parameter in model.parameters())


def inputs(config: Any, batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images and prompts, as `peers.given` has them."""
    rng = np.random.default_rng(seed)
    side, vocabulary = config.vision.image_size, config.text.vocab_size
    tiles = (config.vision.max_num_tiles,) if isinstance(config, MllamaConfig) else ()
    images = rng.normal(size=(batch, *tiles, 3, side, side)).astype(np.float32)
    prompts = rng.integers(5, vocabulary - 5, (batch, PROMPT)).astype(np.int32)
    if tiles:
        prompts[:, 0] = config.image_token_index
    return images, prompts


def packed(config: Any, images: np.ndarray, prompts: np.ndarray) -> Any:
    """The arrays for our model, on the device."""
    batch = len(images)
    if isinstance(config, MllamaConfig):
        tiles = images.shape[1]
        own = [
            [ProcessedImage(image, config.vision.supported_aspect_ratios.index((2, 2)) + 1, tiles)]
            for image in images
        ]
        return jax.device_put(pack([row.tolist() for row in prompts], own, config, "hf").inputs)
    return jax.device_put(
        Blip2Inputs(
            pixels=images,
            image_index=np.arange(batch, dtype=np.int32),
            tokens=prompts,
            token_valid=np.ones(prompts.shape, bool),
        )
    )


def ours(
    folder: Path, images: np.ndarray, prompts: np.ndarray, dtype: str
) -> tuple[Run, float, int]:
    """Our run, the FLOPs of its prefill, and the bytes of weights that a decoded token reads."""
    network = freeze(convert.load(folder, dtype)[0])
    model = network.thaw()
    # what a decoded token reads: T5's encoder is done by then
    parts = nnx.state(model.language_model, nnx.Not(nnx.PathContains("encoder")))
    read = sum(x.nbytes for x in jax.tree.leaves(parts)) - programs.tables(model)
    read += programs.nbytes(getattr(model, "lm_head", ()))
    given = packed(model.config, images, prompts)

    def run(new: int) -> np.ndarray:
        options = Options(max_new_tokens=new)
        decoding, stop = options.decoding(len(images)), options.stop((-1,), 0)
        return np.asarray(generate(network, (), given, decoding, stop).tokens)

    traced = prefill.trace(network, (), given, new_slots=0)
    return run, float(matrix_flops(traced)), read


def agreement(runs: dict[str, Run], new: int) -> dict[str, float]:
    """Share of the tokens that are those of eager transformers, or else of the last that runs, as a
    check on who runs what.
    """
    wanted = runs.get("transformers", [*runs.values()][-1])(new)
    return {name: float((run(new) == wanted).mean()) for name, run in runs.items()}


def bare_product(config: Any, batch: int, clock: Clock) -> dict[str, Any]:
    """The first product of a vision layer's feed-forward part alone: GFLOP a second."""
    import torch

    vision = config.vision
    rows = batch * (vision.grid**2 + 1) * getattr(vision, "max_num_tiles", 1)
    width, inner = vision.hidden_size, vision.intermediate_size
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s).astype(np.float32) for s in ((rows, width), (width, inner)))
    given, product = jax.device_put((x, kernel)), jax.jit(jax.numpy.matmul)
    theirs = torch.from_numpy(x), torch.from_numpy(kernel.T.copy())
    xla, _ = milliseconds(lambda: product(*given), 9, clock)
    with torch.inference_mode():
        torchs, _ = milliseconds(lambda: torch.nn.functional.linear(*theirs), 9, clock)
    flops = 2 * rows * width * inner / 1e6
    return {
        "batch": batch,
        "shape": [rows, width, inner],
        "xla_gflops_per_s": flops / xla,
        "torch_gflops_per_s": flops / torchs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--model", choices=MODELS, default="opt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=17, help="tokens; decode is from 1 to these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=[], help="implementations to leave out")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, not the wall's")
    parser.add_argument("--out", type=Path, help="a file for the JSON object, too")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter

    import torch

    from benchmarks import peers

    config = config_of(arguments.size, MODELS[arguments.model])
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    rows, products, skipped = [], [], {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parameters = write_checkpoint(config, folder, dtype)
        print(f"{parameters / 1e6:.0f} M parameters, {dtype}, {jax.devices()[0].device_kind}")
        for batch in arguments.batches:
            images, prompts = inputs(config, batch)
            own, flops, read = ours(folder, images, prompts, dtype)

            def theirs(
                is_compiled: bool, images: np.ndarray = images, prompts: np.ndarray = prompts
            ) -> Run:
                model = peers.from_folder(folder, dtype)
                return peers.greedy(model, peers.given(model, images, prompts), is_compiled)

            makers: dict[str, Callable[[], Run]] = {
                "transformers": lambda run=theirs: run(False),
                "transformers, compiled": lambda run=theirs: run(True),
            }
            if arguments.model != "llama":
                makers["keras-hub"] = lambda i=images, p=prompts: peers.with_keras(
                    folder, i, p, dtype, arguments.model
                )
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
            times = measure(runs, arguments.new, arguments.rounds, clock)
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
            if dtype == "float32":
                products.append(bare_product(config, batch, clock))
                print(
                    f"         one product of the tower: XLA {products[-1]['xla_gflops_per_s']:.0f}"
                    f", torch {products[-1]['torch_gflops_per_s']:.0f} GFLOP/s"
                )

    versions = {"python": platform.python_version(), "jax": jax.__version__, **peers.versions()}
    if any(row["implementation"] == "keras-hub" for row in rows):
        import keras_hub

        versions["keras-hub"] = keras_hub.__version__
    result = {
        "benchmark": "vs_peers",
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if arguments.cpu_time else "wall",
        "versions": versions,
        "size": arguments.size,
        "model": arguments.model,
        "parameters": parameters,
        "dtype": dtype,
        "prompt_tokens": PROMPT,
        "visual_tokens": programs.inputs_of(config, 1, None, PROMPT)[1],
        "new_tokens": arguments.new,
        "rounds": arguments.rounds,
        "rows": rows,
        "products": products,
        "skipped": skipped,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
