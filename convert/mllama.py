"""Llama 3.2 Vision: where each tensor of a checkpoint goes, in the three ways it may be named.

What is said here of tensors is for their names on the Hugging Face hub, which is also what
transformers saves; the other layouts differ from it in their prefixes.
"""

from collections.abc import Iterable

from catp_jax.models.mllama import Mllama, MllamaConfig
from convert.family import Family, Layout
from convert.mllama_config import MODEL
from convert.rules import Rule, patches

ROTARY = "RoPE frequencies, which are computed from config.json"

IGNORES = {
    "language_model.model.rotary_emb.inv_freq": ROTARY,
    "language_model.model.layers.*.self_attn.rotary_emb.inv_freq": ROTARY,
}

HINTS = {
    "language_model.lm_head.weight": (
        "without lm_head.weight there is nothing to generate with: a save of the base class "
        "(MllamaModel) has none; save MllamaForConditionalGeneration instead"
    )
}

TEXT = (
    ("language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
LAYOUTS = {
    layout.name: layout
    for layout in [
        Layout("hub"),
        Layout(  # transformers 5 with save_original_format=False
            "transformers 5",
            (
                ("model.language_model.", "language_model.model."),
                ("lm_head.", "language_model.lm_head."),
                ("model.vision_model.", "vision_model."),
                ("model.multi_modal_projector.", "multi_modal_projector."),
            ),
        ),
        Layout("base class", TEXT),  # MllamaModel, likewise
    ]
}


def rules(config: MllamaConfig) -> list[Rule]:
    """What does not go without saying of the parameters."""
    vision = "vision_model."
    return [
        Rule(
            f"{vision}patch_embedding.kernel",
            f"{vision}patch_embedding.weight",
            patches(config.vision.num_channels),
        ),
        Rule(  # a parameter of that name, not an embedding's
            f"{vision}gated_positional_embedding.embedding",
            f"{vision}gated_positional_embedding.embedding",
        ),
    ]


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


MLLAMA = Family(
    model_type="mllama",
    models={MllamaConfig: Mllama},
    tables=(MODEL,),
    rules=rules,
    ignores=IGNORES,
    hints=HINTS,
    layouts=LAYOUTS,
    detect=detect_layout,
    ours=Layout("ours", TEXT),
)
