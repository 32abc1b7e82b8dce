"""BLIP-2 and InstructBLIP: where each tensor of a checkpoint goes, whatever the language model.

transformers names them alike on the hub, in memory and in what the base class saves, and always
has.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial

from catp_jax.models.blip2 import Blip2, Blip2Config
from catp_jax.models.instructblip import InstructBlip, InstructBlipConfig
from catp_jax.models.retrieval import Blip2Retrieval, RetrievalConfig
from convert import blip2_config
from convert.family import HUB, Family, Layout
from convert.rules import THREE, THREE_BIASES, Rule, patches

PATCHES = "vision_model.embeddings.patch_embedding"
QKV = "vision_model.encoder.layers.*.self_attn.qkv"
RULES = [
    Rule(f"{PATCHES}.kernel", f"{PATCHES}.weight", patches(3)),
    Rule(f"{QKV}.kernel", f"{QKV}.weight", THREE),
    Rule(f"{QKV}.bias", f"{QKV}.bias", THREE_BIASES),
]
"""What does not go without saying of the parameters."""

HEAD, SHARED = "language_model.lm_head.weight", "language_model.shared.weight"
TWINS = {
    "language_model.encoder.embed_tokens.weight": [SHARED],
    "language_model.decoder.embed_tokens.weight": [SHARED],
    HEAD: [SHARED, "language_model.model.decoder.embed_tokens.weight"],
}

COUNTED = "numbers of positions, which are computed"
UNUSED = "a leftover that no version of transformers reads"
IGNORES = {
    "vision_model.embeddings.position_ids": COUNTED,
    "qformer.embeddings.position_ids": COUNTED,
    "embeddings.position_ids": COUNTED,
    "language_model.model.decoder.version": UNUSED,
    "language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": UNUSED,
}

HINTS = {
    HEAD: (
        "config.json says that the head is not tied to the embedding, but there is no "
        "language_model.lm_head.weight; if it is tied, set tie_word_embeddings to true in "
        "text_config"
    ),
    "itm_head.weight": (
        "config.json says Blip2ForImageTextRetrieval; of a checkpoint that generates text, its "
        "architectures are wrong: write Blip2ForConditionalGeneration there"
    ),
    "language_projection.weight": (
        "config.json says Blip2ForConditionalGeneration (or nothing); of an image-text retrieval "
        "checkpoint, write Blip2ForImageTextRetrieval into its architectures"
    ),
}

ORIGINAL = (
    *("visual_encoder.", "Qformer.", "opt_model.", "t5_model.", "llm_model.", "ln_vision."),
)


def detect(names: Iterable[str], where: str, script: str = "blip_2") -> Layout:
    """The layout of a checkpoint: there is only one. Raises ValueError for LAVIS's own."""
    if theirs := next((name for name in names if name.startswith(ORIGINAL)), None):
        raise ValueError(
            f"{where} has tensors named as in LAVIS ({theirs}), where the model comes from; take "
            "the checkpoint in Hugging Face format, or convert it with the script "
            f"convert_{script}_original_to_pytorch.py of transformers 4"
        )
    return HUB


BLIP2 = Family(
    model_type="blip-2",
    models={Blip2Config: Blip2, RetrievalConfig: Blip2Retrieval},
    tables=(blip2_config.BLIP2, blip2_config.RETRIEVER),
    rules=lambda config: RULES,
    ignores=IGNORES,
    hints=HINTS,
    detect=detect,
    twins=TWINS,
    head=HEAD,
    with_own_head=blip2_config.with_own_head,
    float32=("qformer.", "query_tokens"),
    not_float16=(".DenseReluDense.wo.kernel",),  # of T5, see `catp_jax.models.t5`
)

INSTRUCT = Layout(  # its Q-Former has the norm at the entrance with the text embeddings
    "ours",
    (
        ("qformer.layernorm.", "qformer.embeddings.layernorm."),
        ("embeddings.", "qformer.embeddings."),
    ),
)
ROTARY = {
    "language_model.model.layers.*.self_attn.rotary_emb.inv_freq": (
        "frequencies of RoPE, which are computed"
    )
}

INSTRUCTBLIP = dataclasses.replace(
    BLIP2,
    model_type="instructblip",
    models={InstructBlipConfig: InstructBlip},
    tables=(blip2_config.INSTRUCTBLIP,),
    ignores=IGNORES | ROTARY,
    hints={HEAD: HINTS[HEAD]},
    detect=partial(detect, script="instructblip"),
    ours=INSTRUCT,
    float32=("query_tokens",),  # as in transformers, where the Q-Former goes with the rest
)
