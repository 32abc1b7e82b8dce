"""Strict settings for every test: eight CPU devices, no silent promotion, shapes checked."""

import os
import sys
from pathlib import Path

# JAX's compiler for GPUs, where `make test` could get it. It lies beside the environment's packages
# and not among them: there JAX would look for a driver at every start, and complain.
sys.path.append(str(Path(sys.prefix) / "gpu-compiler"))

# Read once, when jax starts, so they come before its first import.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a download
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin while they wait for a core

from collections.abc import Iterator

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Parity is measured in float32; some backends multiply matrices in less.
jax.config.update("jax_default_matmul_precision", "float32")
# Nearly all the time goes into compiling tiny programs. This takes LLVM's passes out, a third to a
# half of it; XLA's own (dead code, fusion, aliases) stay, so that FLOPs and buffers are the same.
jax.config.update("jax_disable_most_optimizations", True)

# Checks the shapes in our signatures at each call. It has to be in place before they are imported.
# The command line has no shapes, and Typer puts other types into its signatures.
OURS = Path(__file__).parents[1] / "catp_jax"
PARTS = [f"catp_jax.{path.stem}" for path in OURS.iterdir() if not path.stem.startswith("cli")]
install_import_hook([*PARTS, "convert"], "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs() -> Iterator[None]:
    """Each file compiles its own: thousands of programs in one process take gigabytes, and run into
    the kernel's limit of memory maps, where the next compilation crashes.
    """
    yield
    jax.clear_caches()
