"""Programs compiled for GPUs that are not there: what they move, compute, send and allocate.

from catp_jax import targets

program = targets.compile_for("h100", jax.jit(step), weights, tokens)
program.moved, program.floor(targets.find_gpu("h100")).seconds
"""

from catp_jax.targets.compiling import compile_for, devices_of, is_available
from catp_jax.targets.gpus import GPUS, Gpu, find_gpu
from catp_jax.targets.program import Collective, Floor, Kernel, Program

__all__ = [
    "GPUS",
    "Collective",
    "Floor",
    "Gpu",
    "Kernel",
    "Program",
    "compile_for",
    "devices_of",
    "find_gpu",
    "is_available",
]
