"""Every mesh of up to eight devices, and every method with every kind of model."""

import math
from itertools import product

from catp_jax.contract import Site
from catp_jax.pruning import methods_for
from catp_jax.sharding.mesh import AXES
from tests.sharding.models import CONFIGS

SIZES = [sizes for sizes in product((1, 2, 4, 8), repeat=3) if math.prod(sizes) in (2, 4, 8)]
SITES = {
    "mllama": frozenset({Site.CROSS, Site.CACHE}),
    "opt": frozenset({Site.ENTRY, Site.LAYER, Site.CACHE}),
    "t5": frozenset({Site.ENTRY}),
    "vicuna": frozenset({Site.ENTRY, Site.LAYER}),
}
INSTRUCTED = ("catp", "self_attention")  # what of InstructBLIP is not as in BLIP-2 with OPT
CASES = [
    (kind, "fastv:layer=1" if (kind, method) == ("opt", "fastv") else method)
    for kind in CONFIGS
    for method in (None, *(INSTRUCTED if kind == "vicuna" else methods_for(SITES[kind])))
]


def name_of(sizes: tuple[int, ...]) -> str:
    """As --mesh takes it."""
    return ",".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
