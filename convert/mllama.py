"""Llama 3.2 Vision: where each tensor of a checkpoint goes, in the three ways it may be named.

The table is written for the names on the Hugging Face hub, which is also what transformers saves;
the other layouts are first renamed to it, prefix by prefix.
"""

from collections.abc import Iterable

from flax import nnx

from catp_jax.models.mllama import Mllama, MllamaConfig
from convert.family import Family, Layout
from convert.mllama_config import read, write
from convert.rules import TRANSPOSE, Ignore, Rule, patches


def rules(config: MllamaConfig) -> list[Rule]:
    """The table: tensor name on the hub, parameter of `Mllama`, change of layout."""
    return [
        # Text decoder and head.
        Rule(
            "language_model.model.embed_tokens.weight",
            "language_model.embed_tokens.embedding",
        ),
        Rule(
            "language_model.model.layers.*.{self,cross}_attn.{q,k,v,o}_proj.weight",
            "language_model.layers.*.{self,cross}_attn.{q,k,v,o}_proj.kernel",
            TRANSPOSE,
        ),
        Rule(
            "language_model.model.layers.*.cross_attn.{q,k}_norm.weight",
            "language_model.layers.*.cross_attn.{q,k}_norm.scale",
        ),
        Rule(
            "language_model.model.layers.*.cross_attn_{attn,mlp}_gate",
            "language_model.layers.*.cross_attn_{attn,mlp}_gate",
        ),
        Rule(
            "language_model.model.layers.*.mlp.{gate,up,down}_proj.weight",
            "language_model.layers.*.mlp.{gate,up,down}_proj.kernel",
            TRANSPOSE,
        ),
        Rule(
            "language_model.model.layers.*.{input,post_attention}_layernorm.weight",
            "language_model.layers.*.{input,post_attention}_layernorm.scale",
        ),
        Rule("language_model.model.norm.weight", "language_model.norm.scale"),
        Rule("language_model.lm_head.weight", "lm_head.kernel", TRANSPOSE),
        # Projector.
        Rule("multi_modal_projector.weight", "multi_modal_projector.kernel", TRANSPOSE),
        Rule("multi_modal_projector.bias", "multi_modal_projector.bias"),
        # Vision tower: embeddings.
        Rule(
            "vision_model.patch_embedding.weight",
            "vision_model.patch_embedding.kernel",
            patches(config.vision.num_channels),
        ),
        Rule("vision_model.class_embedding", "vision_model.class_embedding"),
        Rule(
            "vision_model.gated_positional_embedding.{gate,embedding}",
            "vision_model.gated_positional_embedding.{gate,embedding}",
        ),
        Rule(
            "vision_model.gated_positional_embedding.tile_embedding.weight",
            "vision_model.gated_positional_embedding.tile_embedding.embedding",
        ),
        Rule(
            "vision_model.{pre,post}_tile_positional_embedding.gate",
            "vision_model.{pre,post}_tile_positional_embedding.gate",
        ),
        Rule(
            "vision_model.{pre,post}_tile_positional_embedding.embedding.weight",
            "vision_model.{pre,post}_tile_positional_embedding.embedding.embedding",
        ),
        Rule("vision_model.layernorm_{pre,post}.weight", "vision_model.layernorm_{pre,post}.scale"),
        Rule("vision_model.layernorm_{pre,post}.bias", "vision_model.layernorm_{pre,post}.bias"),
        # Vision tower: layers.
        Rule(
            "vision_model.{transformer,global_transformer}.layers.*.self_attn.{q,k,v,o}_proj.weight",
            "vision_model.{transformer,global_transformer}.layers.*.self_attn.{q,k,v,o}_proj.kernel",
            TRANSPOSE,
        ),
        Rule(
            "vision_model.{transformer,global_transformer}.layers.*.mlp.{fc1,fc2}.weight",
            "vision_model.{transformer,global_transformer}.layers.*.mlp.{fc1,fc2}.kernel",
            TRANSPOSE,
        ),
        Rule(
            "vision_model.{transformer,global_transformer}.layers.*.mlp.{fc1,fc2}.bias",
            "vision_model.{transformer,global_transformer}.layers.*.mlp.{fc1,fc2}.bias",
        ),
        Rule(
            "vision_model.{transformer,global_transformer}.layers.*.{input,post_attention}_layernorm.weight",
            "vision_model.{transformer,global_transformer}.layers.*.{input,post_attention}_layernorm.scale",
        ),
        Rule(
            "vision_model.{transformer,global_transformer}.layers.*.{input,post_attention}_layernorm.bias",
            "vision_model.{transformer,global_transformer}.layers.*.{input,post_attention}_layernorm.bias",
        ),
        Rule(
            "vision_model.global_transformer.layers.*.gate_{attn,ffn}",
            "vision_model.global_transformer.layers.*.gate_{attn,ffn}",
        ),
    ]


ROTARY = "RoPE frequencies, which are computed from config.json"

IGNORES = [
    Ignore("language_model.model.rotary_emb.inv_freq", ROTARY),
    Ignore("language_model.model.layers.*.self_attn.rotary_emb.inv_freq", ROTARY),
]

HINTS = {
    "language_model.lm_head.weight": (
        "without lm_head.weight there is nothing to generate with: a save of the base class "
        "(MllamaModel) has none; save MllamaForConditionalGeneration instead"
    )
}


HUB = Layout(
    "hub",
    tuple(
        (prefix, prefix)
        for prefix in (
            "language_model.model.",
            "language_model.lm_head.",
            "vision_model.",
            "multi_modal_projector.",
        )
    ),
)
LAYOUTS = {
    layout.name: layout
    for layout in [
        HUB,
        Layout(  # transformers 5 with save_original_format=False
            "transformers 5",
            (
                ("model.language_model.", "language_model.model."),
                ("lm_head.", "language_model.lm_head."),
                ("model.vision_model.", "vision_model."),
                ("model.multi_modal_projector.", "multi_modal_projector."),
            ),
        ),
        Layout(  # MllamaModel, likewise
            "base class",
            (
                ("language_model.", "language_model.model."),
                ("lm_head.", "language_model.lm_head."),
                ("vision_model.", "vision_model."),
                ("multi_modal_projector.", "multi_modal_projector."),
            ),
        ),
    ]
}


def detect_layout(names: Iterable[str], where: str) -> Layout:
    """The layout in which all the names are. Raises ValueError if they come from several."""
    # What only one layout has; the vision tower is named alike in two of them.
    examples: dict[str, str] = {}
    for name in names:
        if name.startswith(("language_model.model.", "language_model.lm_head.")):
            examples.setdefault("hub", name)
        elif name.startswith("model."):
            examples.setdefault("transformers 5", name)
        elif name.startswith("language_model."):
            examples.setdefault("base class", name)
    if len(examples) > 1:
        shown = "; ".join(f"{layout}: {name}" for layout, name in examples.items())
        raise ValueError(
            f"{where} mixes tensors named in different ways ({shown}); "
            "it seems to hold files of two checkpoints: keep one of them"
        )
    return LAYOUTS[next(iter(examples), "hub")]


def build(config: MllamaConfig, rngs: nnx.Rngs) -> Mllama:
    """A new model."""
    return Mllama(config, rngs=rngs)


MLLAMA = Family(
    model_type="mllama",
    configs=(MllamaConfig,),
    read=read,
    write=write,
    build=build,
    rules=rules,
    ignores=IGNORES,
    hints=HINTS,
    layouts=LAYOUTS,
    detect=detect_layout,
)
