"""InstructBLIP: where each tensor of a checkpoint goes, with Flan-T5 and with Vicuna.

The Q-Former's norm at the entrance stands with its text embeddings there; else all is as in BLIP-2.
"""

from functools import partial

from catp_jax.models.instructblip import InstructBlip, InstructBlipConfig
from convert import blip2
from convert.blip2 import HEAD, NOT_FLOAT16, TWINS
from convert.family import HUB, Family, Layout
from convert.instructblip_config import read, write
from convert.rules import Ignore

OURS = Layout(
    "ours",
    (
        ("qformer.layernorm.", "qformer.embeddings.layernorm."),
        ("embeddings.", "qformer.embeddings."),
    ),
)

IGNORES = [
    *blip2.IGNORES,
    Ignore(
        "language_model.model.layers.*.self_attn.rotary_emb.inv_freq",
        "frequencies of RoPE, which are computed",
    ),
]
HINTS = {HEAD: blip2.HINTS[HEAD]}

INSTRUCTBLIP = Family(
    model_type="instructblip",
    configs=(InstructBlipConfig,),
    read=read,
    write=write,
    build=lambda config, rngs: InstructBlip(config, rngs=rngs),
    rules=lambda config: blip2.RULES,
    ignores=IGNORES,
    hints=HINTS,
    layouts={HUB.name: HUB},
    detect=partial(blip2.detect, script="instructblip"),
    ours=OURS,
    twins=TWINS,
    head=HEAD,
    with_own_head=blip2.with_own_head,
    float32=("query_tokens",),  # as in transformers, where the Q-Former goes with the rest
    not_float16=NOT_FLOAT16,
)
