"""The programs that GPU benchmarks look at, by name, and what they need: abstract or on a device.

    Case("Llama-3.2-11B-Vision", "decode", batch=8, percent=50)

A case is compiled for a GPU that is not there (`gpu_programs`) or timed on one (`gpu_suite`).
Prompts have 64 text tokens and an image, with Llama of four tiles; 64 tokens are generated.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from catp_jax.contract import Basis
from catp_jax.families import PRESETS
from catp_jax.generation import generate as programs
from catp_jax.generation.options import Options
from catp_jax.leaves import named
from catp_jax.models import one_row
from catp_jax.models.narrow import Weights, with_scales
from catp_jax.plan import abstract_model, inputs_of
from catp_jax.pruning import make
from catp_jax.pruning.attention_predictor import AttentionPredictor, Network
from catp_jax.pruning.eigen import EigenAttention

TEXT, NEW = 64, 64
LLAMA, OPT, T5, VICUNA = (
    "Llama-3.2-11B-Vision",
    "blip2-opt-2.7b",
    "blip2-flan-t5-xl",
    "instructblip-vicuna-7b",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """`prefill`; `step`: one token more for every row; `decode`: the loop after the prefill, to the
    last new token; `generate`: all in one.

    `largest` is `generate` at the largest batch that should fit. `percent` of the visual tokens are
    kept, by `method`, one of `pruning.METHODS` or of `LEARNED`. `model` is one of `plan.PRESETS`,
    its weights narrowed as `weights` says. `fused`: new tokens attend in one kernel
    (`models.one_row`).
    """

    model: str
    what: Literal["prefill", "step", "decode", "generate", "largest"]
    batch: int
    percent: int = 100
    beams: int = 1
    weights: Weights | None = None
    fused: bool = False
    method: str = "k_norm"

    @property
    def name(self) -> str:
        """What tells it from the others, to be read."""
        parts = [
            f"{self.model} {self.what}",
            "" if self.what == "largest" else f"batch {self.batch}",
            "" if self.percent == 100 else f"{self.percent} % kept",
            "" if self.beams == 1 else f"{self.beams} beams",
            self.weights or "",
            "one kernel" if self.fused else "",
            "" if self.method == "k_norm" else self.method,
        ]
        return ", ".join(part for part in parts if part)


# Most telling first: a run that is cut off has the better part.
TABLE = (
    Case(LLAMA, "decode", 8),
    Case(LLAMA, "decode", 8, 50),
    Case(LLAMA, "decode", 1),
    Case(LLAMA, "decode", 32),
    Case(LLAMA, "decode", 32, 50),
    Case(LLAMA, "decode", 32, fused=True),
    Case(LLAMA, "prefill", 8),
    Case(LLAMA, "decode", 32, 25),
    Case(LLAMA, "decode", 8, beams=5),
    Case(OPT, "decode", 1),
    Case(OPT, "decode", 16),
    Case(OPT, "decode", 16, beams=5),
    Case(OPT, "prefill", 16),
    Case(T5, "decode", 1),
    Case(T5, "decode", 16),
    Case(VICUNA, "decode", 1),
    Case(VICUNA, "decode", 16),
    Case(LLAMA, "generate", 8),
    Case(LLAMA, "largest", 0),
    Case(LLAMA, "decode", 64),
    Case(LLAMA, "decode", 64, 50),
    Case(LLAMA, "decode", 64, 25),
    Case(LLAMA, "decode", 8, 25),
    Case(LLAMA, "decode", 1, 50),
    Case(LLAMA, "decode", 1, 25),
    Case(OPT, "decode", 64),
    Case(T5, "decode", 64),
    Case(VICUNA, "decode", 64),
)
"""What is held against its floor on one GPU."""


SMALL: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
TOYS: Mapping[str, Mapping[str, Any]] = {
    "TiledVitConfig": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "attention_heads": 4,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "image_size": 28,
        "intermediate_layers_indices": (0, 1),
    },
    "CrossDecoderConfig": {
        **SMALL,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "vocab_size": 256,
        "cross_attention_layers": (1, 3),
    },
    "VitConfig": {**SMALL, "image_size": 56},
    "QFormerConfig": {**SMALL, "encoder_hidden_size": 32},
    "OptConfig": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "vocab_size": 256,
    },
    "T5Config": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "vocab_size": 256,
    },
    "LlamaConfig": {**SMALL, "num_key_value_heads": 4, "vocab_size": 256},
}
SHALLOW: Mapping[str, Mapping[str, Any]] = {
    "TiledVitConfig": {
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "intermediate_layers_indices": (0,),
    },
    "CrossDecoderConfig": {"num_hidden_layers": 5, "cross_attention_layers": (3,)},
    "VitConfig": {"num_hidden_layers": 1},
    "QFormerConfig": {"num_hidden_layers": 2},
    "OptConfig": {"num_hidden_layers": 3},
    "T5Config": {"num_layers": 1, "num_decoder_layers": 3},
    "LlamaConfig": {"num_hidden_layers": 3},
}
SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "real": {},
    "shallow": SHALLOW,
    "toy": TOYS,
}
"""What is smaller, by the class of the configuration: nothing; layers; everything."""


def config_of(model: str, size: str = "real") -> Any:
    """A model's configuration in one of `SIZES`; they all have the same parts."""
    config = PRESETS[model]()
    parts = {
        part: dataclasses.replace(own, **SIZES[size].get(type(own).__name__, {}))
        for part in ("vision", "qformer", "text")
        if (own := getattr(config, part, None)) is not None
    }
    if size == "toy":  # of 256 words
        parts["image_token_index"] = 255 if "qformer" in parts else 256
    return dataclasses.replace(config, **parts)


def abstract(case: Case, size: str = "real") -> tuple[Any, Any]:
    """A case's abstract model in bfloat16, and its configuration."""
    config = config_of(case.model, size)
    model = abstract_model(config, jnp.bfloat16)
    return (model if case.weights is None else with_scales(model, case.weights)), config


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, which may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tables(model: Any) -> int:
    """Bytes of the embedding tables of which a step takes a row each: not of one that is the head,
    too.
    """
    arrays = named(model)
    marks = ("embed_positions",)
    if any("lm_head" in name for name in arrays):
        marks += ("embed_tokens", "shared.embedding")
    return nbytes([leaf for name, leaf in arrays.items() if any(mark in name for mark in marks)])


@dataclasses.dataclass(frozen=True)
class Program:
    """A case's jitted function and its arguments after the model, arrays of a prompt abstract.

    `cache` has the bytes that a step reads of it, `steps` says how often the loop runs.
    """

    function: Any
    arguments: tuple[Any, ...]
    visual: int
    kept: int
    cache: int
    steps: int


@contextlib.contextmanager
def kernel(is_used: bool) -> Iterator[None]:
    """While a program is traced: whether new tokens attend in one kernel."""
    before, one_row.USE_KERNEL = one_row.USE_KERNEL, is_used
    try:
        yield
    finally:
        one_row.USE_KERNEL = before


def _eigen(kept: int, visual: int, config: Any) -> EigenAttention:
    """Of Llama; directions of no meaning, as many as leave so many bytes."""
    text = config.text
    rank = text.head_dim * kept // visual // 8 * 8
    basis = Basis(matrix=jnp.ones((text.num_key_value_heads, text.head_dim, rank), jnp.float32))
    layers = text.cross_attention_layers
    return EigenAttention(keep=kept, bases=dict.fromkeys(layers, (basis, basis)))


def _attention_predictor(kept: int, visual: int, config: Any) -> AttentionPredictor:
    """A network that has learned nothing."""
    network = Network.start(jax.random.key(0))
    return AttentionPredictor(keep=kept // 16 * 16, network=network)


LEARNED: Mapping[str, Callable[[int, int, Any], Any]] = {
    "eigen": _eigen,
    "attention_predictor": _attention_predictor,
}
"""Methods that learn first, as if they had."""


def pruner_of(method: str, kept: int, visual: int, model: Any) -> Any:
    """A method for so many of the visual tokens."""
    if method in LEARNED:
        return LEARNED[method](kept, visual, model.config)
    return make(method, kept, model.sites, of=visual)


def program_of(case: Case, network: Any, config: Any) -> Program:
    """The program of a case, for a frozen model that may be abstract."""
    inputs, visual = inputs_of(config, case.batch, None, TEXT)
    kept = visual * case.percent // 100
    model = network.thaw()
    pruners = () if case.percent == 100 else (pruner_of(case.method, kept, visual, model),)
    options = Options(max_new_tokens=NEW, num_beams=case.beams)
    decoding, stop = options.decoding(case.batch), options.stop((-1,), 0)

    def prefill(network: Any, inputs: Any) -> Any:
        return programs.prefill_with(network, pruners, inputs, NEW)

    start = jax.eval_shape(prefill, network, inputs)
    if case.what == "prefill":
        return Program(jax.jit(prefill), (inputs,), visual, kept, nbytes(start.cache), 0)
    carry = jax.eval_shape(programs.begin, start, decoding, stop)
    cache = nbytes(carry.cache)
    if case.what == "step":

        def step(network: Any, carry: Any, decoding: Any, stop: Any) -> Any:
            with kernel(case.fused):
                return programs.advance(network, pruners, carry, decoding, stop)

        function = jax.jit(step, donate_argnames=("carry",))
        return Program(function, (carry, decoding, stop), visual, kept, cache, 1)
    if case.what == "decode":

        def decode(network: Any, start: Any, decoding: Any, stop: Any) -> Any:
            with kernel(case.fused):
                return programs.decode(network, pruners, start, decoding, stop)

        return Program(jax.jit(decode), (start, decoding, stop), visual, kept, cache, NEW - 1)
    arguments = (pruners, inputs, decoding, stop)
    return Program(programs.generate, arguments, visual, kept, cache, NEW - 1)
