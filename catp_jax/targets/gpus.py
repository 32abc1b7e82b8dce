"""The GPUs that programs can be compiled for, by name."""

import dataclasses

# What XLA asks a device before it compiles, as text of its GpuTargetConfigProto. Versions are those
# of a machine with CUDA 13 and its driver; without them XLA makes no graphs of whole loops.
CONFIG = """
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{description}"
gpu_device_info {{
  name: "{description}"
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory}
  shared_memory_per_block_optin: {shared_memory_optin}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2_cache}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory}
  cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU: what its compiler must know, and what bounds its programs from below.

    `memory` in bytes; `bandwidth` of it, `link` to other GPUs and `network` to other hosts, each in
    one direction, in bytes a second; `bf16_flops` a second, dense.
    """

    name: str
    description: str
    memory: int
    bandwidth: int
    bf16_flops: int
    link: int
    network: int
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_cache: int
    shared_memory: int
    shared_memory_optin: int
    capability: str

    @property
    def config(self) -> str:
        """The text of XLA's GpuTargetConfigProto."""
        return CONFIG.format(**dataclasses.asdict(self))


# Memory, its bandwidth, cores, clocks and caches: XLA's own files, target_config/specs/h100_sxm,
# h200, a100_sxm_80 and b200.txtpb. FLOP/s without sparsity and NVLink, half of the published sum of
# both directions: NVIDIA's data sheets of the SXM parts (A100: 312 TFLOP/s, 600 GB/s; H100 and
# H200: 1,979 TFLOP/s with sparsity, 900 GB/s; B200 in an HGX: 4.5 PFLOP/s with sparsity, 1.8 TB/s).
# Network: one adapter a GPU, as in NVIDIA's DGX (A100: 200 Gbit/s; the others: 400 Gbit/s).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
            description="NVIDIA H100 80GB HBM3",
            memory=84_978_434_048,
            bandwidth=3_352_320_000_000,
            bf16_flops=989_500_000_000_000,
            link=450_000_000_000,
            network=50_000_000_000,
            cores=132,
            fpus_per_core=128,
            clock_ghz=1.98,
            l2_cache=52_428_800,
            shared_memory=233_472,
            shared_memory_optin=232_448,
            capability="major: 9 feature_extension: ACCELERATED_FEATURES",
        ),
        Gpu(
            name="h200",
            description="NVIDIA H200 141GB HBM3e",
            memory=151_397_597_184,
            bandwidth=4_800_000_000_000,
            bf16_flops=989_500_000_000_000,
            link=450_000_000_000,
            network=50_000_000_000,
            cores=132,
            fpus_per_core=128,
            clock_ghz=1.98,
            l2_cache=52_428_800,
            shared_memory=233_472,
            shared_memory_optin=232_448,
            capability="major: 9 feature_extension: ACCELERATED_FEATURES",
        ),
        Gpu(
            name="a100",
            description="NVIDIA A100-SXM4-80GB",
            memory=85_100_068_864,
            bandwidth=2_039_040_000_000,
            bf16_flops=312_000_000_000_000,
            link=300_000_000_000,
            network=25_000_000_000,
            cores=108,
            fpus_per_core=64,
            clock_ghz=1.41,
            l2_cache=41_943_040,
            shared_memory=167_936,
            shared_memory_optin=166_912,
            capability="major: 8",
        ),
        Gpu(
            name="b200",
            description="NVIDIA B200",
            memory=191_514_411_008,
            bandwidth=7_672_320_000_000,
            bf16_flops=2_250_000_000_000_000,
            link=900_000_000_000,
            network=50_000_000_000,
            cores=148,
            fpus_per_core=128,
            clock_ghz=1.965,
            l2_cache=132_644_864,
            shared_memory=233_472,
            shared_memory_optin=232_448,
            capability="major: 10 feature_extension: ACCELERATED_FEATURES",
        ),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name. Raises ValueError for others."""
    if name not in GPUS:
        raise ValueError(f"a target is one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name]
