"""InstructBLIP: a BLIP-2 whose Q-Former also reads the instruction.

    pixels ─ vision_model ─────────────────┐
    instruction ─ embeddings ─┐            │
    query tokens ─────────────┴─ qformer ──┴─ the queries' states, the text's are dropped

So queries look at what is asked for: the ViT runs once for an image, the Q-Former once for a
prompt. The instruction has tokens of its own for the Q-Former, beside those for the language model.

Source: Dai et al., "InstructBLIP", arXiv 2305.06500; Hugging Face transformers
(`models/instructblip`).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Attention, Evidence
from catp_jax.models.llama import Llama, LlamaConfig
from catp_jax.models.qformer import QFormerConfig, TextEmbeddings
from catp_jax.models.querying import QueryingConfig, QueryingInputs, QueryingModel
from catp_jax.models.t5 import T5, T5Config
from catp_jax.models.vit import VitConfig
from catp_jax.struct import AnyArray, pytree


@dataclasses.dataclass(frozen=True)
class InstructBlipConfig(QueryingConfig):
    """An InstructBLIP checkpoint's `config.json`, as far as it shapes the computation."""

    text: T5Config | LlamaConfig

    @classmethod
    def vicuna_7b(cls) -> "InstructBlipConfig":
        """instructblip-vicuna-7b."""
        qformer = dataclasses.replace(
            QFormerConfig.blip2(), vocab_size=30523, use_qformer_text_input=True
        )
        return cls(VitConfig.eva_vit_g(), qformer, LlamaConfig.vicuna_7b(), 32, 32001)

    @classmethod
    def vicuna_13b(cls) -> "InstructBlipConfig":
        """instructblip-vicuna-13b."""
        return dataclasses.replace(cls.vicuna_7b(), text=LlamaConfig.vicuna_13b())

    @classmethod
    def flan_t5_xl(cls) -> "InstructBlipConfig":
        """instructblip-flan-t5-xl."""
        return dataclasses.replace(
            cls.vicuna_7b(), text=T5Config.flan_t5_xl(), image_token_index=32100
        )

    @classmethod
    def flan_t5_xxl(cls) -> "InstructBlipConfig":
        """instructblip-flan-t5-xxl."""
        return dataclasses.replace(cls.flan_t5_xl(), text=T5Config.flan_t5_xxl())


@pytree
class InstructBlipInputs(QueryingInputs):
    """A batch for InstructBLIP; `instruction` are the prompts in the Q-Former's tokens, padded on
    the right.
    """

    instruction: Int[AnyArray, "b t"]
    instruction_valid: Bool[AnyArray, "b t"]


class InstructBlip(QueryingModel):
    """`InstructBlipForConditionalGeneration`."""

    config: InstructBlipConfig
    language_model: T5 | Llama

    def __init__(self, config: InstructBlipConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.embeddings = TextEmbeddings(config.qformer, rngs=rngs)

    def read_images(self, inputs: InstructBlipInputs) -> tuple[Float[Array, "b q d"], Evidence]:
        """The last hidden states of each prompt's queries, and how they came about."""
        image, vision = self.vision_model(jnp.asarray(inputs.pixels))
        index, batch = jnp.asarray(inputs.image_index), inputs.tokens.shape[0]
        queries = self.query_tokens[...].astype(jnp.float32)
        number = queries.shape[1]
        queries = jnp.broadcast_to(queries, (batch, *queries.shape[1:]))
        x = jnp.concatenate([queries, self.embeddings(jnp.asarray(inputs.instruction))], axis=1)
        valid = jnp.concatenate([jnp.ones((batch, number), bool), inputs.instruction_valid], axis=1)
        x, among, cross = self.qformer(x, number, image[index], valid)
        return x[:, :number], Evidence(
            cross=cross,
            among=tuple(
                Attention(queries=layer.queries[:, :number], keys=layer.keys) for layer in among
            ),
            vision=Attention(queries=vision.queries[index], keys=vision.keys[index]),
            among_valid=valid,
        )
