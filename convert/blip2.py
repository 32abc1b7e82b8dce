"""BLIP-2: where each tensor of a checkpoint goes, with OPT, with T5 and for image-text retrieval.

transformers names them alike on the hub, in memory and in what the base class saves, and always
has. One table serves all kinds of model: a rule for a parameter that a model lacks stays idle.
"""

from collections.abc import Iterable

from flax import nnx

from catp_jax.models.blip2 import Blip2, Blip2Config
from catp_jax.models.retrieval import Blip2Retrieval, RetrievalConfig
from convert.blip2_config import read, with_own_head, write
from convert.family import HUB, Family, Layout
from convert.rules import THREE, THREE_BIASES, TRANSPOSE, Ignore, Rule, Twin, patches

SHARED = [
    # Vision model.
    Rule(
        "vision_model.embeddings.{class,position}_embedding",
        "vision_model.embeddings.{class,position}_embedding",
    ),
    Rule(
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.patch_embedding.kernel",
        patches(3),
    ),
    Rule(
        "vision_model.embeddings.patch_embedding.bias",
        "vision_model.embeddings.patch_embedding.bias",
    ),
    Rule(
        "vision_model.encoder.layers.*.self_attn.qkv.weight",
        "vision_model.encoder.layers.*.self_attn.qkv.kernel",
        THREE,
    ),
    Rule(
        "vision_model.encoder.layers.*.self_attn.qkv.bias",
        "vision_model.encoder.layers.*.self_attn.qkv.bias",
        THREE_BIASES,
    ),
    Rule(
        "vision_model.encoder.layers.*.self_attn.projection.weight",
        "vision_model.encoder.layers.*.self_attn.projection.kernel",
        TRANSPOSE,
    ),
    Rule(
        "vision_model.encoder.layers.*.self_attn.projection.bias",
        "vision_model.encoder.layers.*.self_attn.projection.bias",
    ),
    Rule(
        "vision_model.encoder.layers.*.mlp.{fc1,fc2}.weight",
        "vision_model.encoder.layers.*.mlp.{fc1,fc2}.kernel",
        TRANSPOSE,
    ),
    Rule(
        "vision_model.encoder.layers.*.mlp.{fc1,fc2}.bias",
        "vision_model.encoder.layers.*.mlp.{fc1,fc2}.bias",
    ),
    Rule(
        "vision_model.encoder.layers.*.{layer_norm1,layer_norm2}.weight",
        "vision_model.encoder.layers.*.{layer_norm1,layer_norm2}.scale",
    ),
    Rule(
        "vision_model.encoder.layers.*.{layer_norm1,layer_norm2}.bias",
        "vision_model.encoder.layers.*.{layer_norm1,layer_norm2}.bias",
    ),
    Rule("vision_model.post_layernorm.weight", "vision_model.post_layernorm.scale"),
    Rule("vision_model.post_layernorm.bias", "vision_model.post_layernorm.bias"),
    # Q-Former.
    Rule("query_tokens", "query_tokens"),
    Rule(
        "qformer.encoder.layer.*.{attention,crossattention}.attention.{query,key,value}.weight",
        "qformer.encoder.layer.*.{attention,crossattention}.attention.{query,key,value}.kernel",
        TRANSPOSE,
    ),
    Rule(
        "qformer.encoder.layer.*.{attention,crossattention}.attention.{query,key,value}.bias",
        "qformer.encoder.layer.*.{attention,crossattention}.attention.{query,key,value}.bias",
    ),
    Rule(
        "qformer.encoder.layer.*.{attention,crossattention}.output.dense.weight",
        "qformer.encoder.layer.*.{attention,crossattention}.output.dense.kernel",
        TRANSPOSE,
    ),
    Rule(
        "qformer.encoder.layer.*.{attention,crossattention}.output.dense.bias",
        "qformer.encoder.layer.*.{attention,crossattention}.output.dense.bias",
    ),
    Rule(
        "qformer.encoder.layer.*.{attention,crossattention}.output.LayerNorm.weight",
        "qformer.encoder.layer.*.{attention,crossattention}.output.LayerNorm.scale",
    ),
    Rule(
        "qformer.encoder.layer.*.{attention,crossattention}.output.LayerNorm.bias",
        "qformer.encoder.layer.*.{attention,crossattention}.output.LayerNorm.bias",
    ),
    Rule(
        "qformer.encoder.layer.*.{intermediate,intermediate_query,output,output_query}.dense.weight",
        "qformer.encoder.layer.*.{intermediate,intermediate_query,output,output_query}.dense.kernel",
        TRANSPOSE,
    ),
    Rule(
        "qformer.encoder.layer.*.{intermediate,intermediate_query,output,output_query}.dense.bias",
        "qformer.encoder.layer.*.{intermediate,intermediate_query,output,output_query}.dense.bias",
    ),
    Rule(
        "qformer.encoder.layer.*.{output,output_query}.LayerNorm.weight",
        "qformer.encoder.layer.*.{output,output_query}.LayerNorm.scale",
    ),
    Rule(
        "qformer.encoder.layer.*.{output,output_query}.LayerNorm.bias",
        "qformer.encoder.layer.*.{output,output_query}.LayerNorm.bias",
    ),
    # Into the language model, and the retrieval model's text and heads.
    Rule(
        "{language_projection,vision_projection,text_projection,itm_head}.weight",
        "{language_projection,vision_projection,text_projection,itm_head}.kernel",
        TRANSPOSE,
    ),
    Rule(
        "{language_projection,vision_projection,text_projection,itm_head}.bias",
        "{language_projection,vision_projection,text_projection,itm_head}.bias",
    ),
    # Any language model's head; T5.
    Rule("language_model.lm_head.weight", "language_model.lm_head.kernel", TRANSPOSE),
    Rule("language_model.shared.weight", "language_model.shared.embedding"),
    Rule(
        "language_model.{encoder,decoder}.block.*.layer.0.SelfAttention.{q,k,v,o}.weight",
        "language_model.{encoder,decoder}.block.*.layer.0.SelfAttention.{q,k,v,o}.kernel",
        TRANSPOSE,
    ),
    Rule(
        "language_model.{encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "language_model.{encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.embedding",
    ),
    Rule(
        "language_model.decoder.block.*.layer.1.EncDecAttention.{q,k,v,o}.weight",
        "language_model.decoder.block.*.layer.1.EncDecAttention.{q,k,v,o}.kernel",
        TRANSPOSE,
    ),
    Rule(
        "language_model.{encoder,decoder}.block.*.layer.*.DenseReluDense.{wi_0,wi_1,wo}.weight",
        "language_model.{encoder,decoder}.block.*.layer.*.DenseReluDense.{wi_0,wi_1,wo}.kernel",
        TRANSPOSE,
    ),
    Rule(
        "language_model.{encoder,decoder}.block.*.layer.*.layer_norm.weight",
        "language_model.{encoder,decoder}.block.*.layer.*.layer_norm.scale",
    ),
    Rule(
        "language_model.{encoder,decoder}.final_layer_norm.weight",
        "language_model.{encoder,decoder}.final_layer_norm.scale",
    ),
]
"""BLIP-2's and InstructBLIP's."""

RULES = [
    *SHARED,
    # What goes into the Q-Former.
    Rule("qformer.layernorm.weight", "qformer.layernorm.scale"),
    Rule("qformer.layernorm.bias", "qformer.layernorm.bias"),
    Rule(
        "embeddings.{word,position}_embeddings.weight",
        "embeddings.{word,position}_embeddings.embedding",
    ),
    # OPT.
    Rule(
        "language_model.model.decoder.{embed_tokens,embed_positions}.weight",
        "language_model.model.decoder.{embed_tokens,embed_positions}.embedding",
    ),
    Rule(
        "language_model.model.decoder.layers.*.self_attn.{q,k,v,out}_proj.weight",
        "language_model.model.decoder.layers.*.self_attn.{q,k,v,out}_proj.kernel",
        TRANSPOSE,
    ),
    Rule(
        "language_model.model.decoder.layers.*.self_attn.{q,k,v,out}_proj.bias",
        "language_model.model.decoder.layers.*.self_attn.{q,k,v,out}_proj.bias",
    ),
    Rule(
        "language_model.model.decoder.layers.*.{fc1,fc2}.weight",
        "language_model.model.decoder.layers.*.{fc1,fc2}.kernel",
        TRANSPOSE,
    ),
    Rule(
        "language_model.model.decoder.layers.*.{fc1,fc2}.bias",
        "language_model.model.decoder.layers.*.{fc1,fc2}.bias",
    ),
    Rule(
        "language_model.model.decoder.layers.*.{self_attn,final}_layer_norm.weight",
        "language_model.model.decoder.layers.*.{self_attn,final}_layer_norm.scale",
    ),
    Rule(
        "language_model.model.decoder.layers.*.{self_attn,final}_layer_norm.bias",
        "language_model.model.decoder.layers.*.{self_attn,final}_layer_norm.bias",
    ),
    Rule(
        "language_model.model.decoder.final_layer_norm.weight",
        "language_model.model.decoder.final_layer_norm.scale",
    ),
    Rule(
        "language_model.model.decoder.final_layer_norm.bias",
        "language_model.model.decoder.final_layer_norm.bias",
    ),
]

HEAD = "language_model.lm_head.weight"
TWINS = [
    Twin("language_model.encoder.embed_tokens.weight", "language_model.shared.weight"),
    Twin("language_model.decoder.embed_tokens.weight", "language_model.shared.weight"),
    Twin(HEAD, "language_model.shared.weight"),
    Twin(HEAD, "language_model.model.decoder.embed_tokens.weight"),
]

COUNTED = "numbers of positions, which are computed"
UNUSED = "a leftover that no version of transformers reads"
IGNORES = [
    Ignore("vision_model.embeddings.position_ids", COUNTED),
    Ignore("qformer.embeddings.position_ids", COUNTED),
    Ignore("embeddings.position_ids", COUNTED),
    Ignore("language_model.model.decoder.version", UNUSED),
    Ignore(
        "language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
        UNUSED,
    ),
]

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


def build(config: Blip2Config | RetrievalConfig, rngs: nnx.Rngs) -> Blip2 | Blip2Retrieval:
    """A new model."""
    if isinstance(config, RetrievalConfig):
        return Blip2Retrieval(config, rngs=rngs)
    return Blip2(config, rngs=rngs)


def detect(names: Iterable[str], where: str, script: str = "blip_2") -> Layout:
    """The layout of a checkpoint: there is only one. Raises ValueError for LAVIS's own."""
    if theirs := next((name for name in names if name.startswith(ORIGINAL)), None):
        raise ValueError(
            f"{where} has tensors named as in LAVIS ({theirs}), where the model comes from; take "
            "the checkpoint in Hugging Face format, or convert it with the script "
            f"convert_{script}_original_to_pytorch.py of transformers 4"
        )
    return HUB


NOT_FLOAT16 = (".DenseReluDense.wo.kernel",)  # of T5, see `catp_jax.models.t5`

BLIP2 = Family(
    model_type="blip-2",
    configs=(Blip2Config, RetrievalConfig),
    read=read,
    write=write,
    build=build,
    rules=lambda config: RULES,
    ignores=IGNORES,
    hints=HINTS,
    layouts={HUB.name: HUB},
    detect=detect,
    twins=TWINS,
    head=HEAD,
    with_own_head=with_own_head,
    float32=("qformer.", "query_tokens"),
    not_float16=NOT_FLOAT16,
)
