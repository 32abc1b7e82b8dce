"""What a model needs on a mesh, found by compiling it without weights.

The programs are compiled for as many forced CPU devices as the mesh has places, or for GPUs that
are not there (`target`), on abstract values: nothing of the model is in memory, so 90B are planned
on a laptop. Bytes of weights and caches are exact. FLOPs are those of all matrix products, counted
in the program before it is split. Where the split programs send data, and how much, is read from
the compiled ones. Temporaries are a target's own; without one, those of the same programs in
float32: an upper bound. What programs move, and the least time they take, requires a target.
"""

from catp_jax.plan.compiled import Compiled, Traffic, Work
from catp_jax.plan.making import force_devices, make_plan
from catp_jax.plan.report import Plan, table
from catp_jax.plan.sizes import (
    abstract_model,
    inputs_of,
    shard_bytes,
)

__all__ = [
    "Compiled",
    "Plan",
    "Traffic",
    "Work",
    "abstract_model",
    "force_devices",
    "inputs_of",
    "make_plan",
    "shard_bytes",
    "table",
]
