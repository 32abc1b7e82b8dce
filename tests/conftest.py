"""Strict settings for every test: eight CPU devices, no silent promotion, shapes checked; and where
the time went.
"""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# JAX's compiler for GPUs, where `make test` could get it. It lies beside the environment's packages
# and not among them: there JAX would look for a driver at every start, and complain.
sys.path.append(str(Path(sys.prefix) / "gpu-compiler"))

# Read once, when jax starts, so they come before its first import.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
    + " --xla_cpu_parallel_codegen_split_count=1"  # LLVM's work in one piece: parts cost more
).strip()
# Nearly all the time goes into compiling tiny programs. This takes LLVM's passes out; XLA's own
# (dead code, fusion, aliases) stay, so that FLOPs and buffers are the same. By the environment, so
# that the commands that tests start have it too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a download
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin while they wait for a core

# What was compiled is kept, however little it is.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

from collections import defaultdict
from collections.abc import Iterator

import jax
import pytest
from jaxtyping import install_import_hook

# Tracing makes millions of small objects, among which the collector finds nothing: with Python's
# own thresholds it takes 8 % of the time. What tests start has the same by `without_torch`.
gc.set_threshold(50_000, 20, 50)

# Many programs are compiled again: by the next file, by the other worker, by a command in a process
# of its own. They share what was compiled in a folder that the session's first process makes and
# removes; workers and commands find it by the environment. Nothing is kept for the next session: a
# fresh clone is what has to be quick.
COMPILED = "JAX_COMPILATION_CACHE_DIR"
if COMPILED not in os.environ:
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="catp-jax-compiled-")
    atexit.register(shutil.rmtree, os.environ[COMPILED], ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
jax.config.update("jax_compilation_cache_dir", os.environ[COMPILED])

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Parity is measured in float32; some backends multiply matrices in less.
jax.config.update("jax_default_matmul_precision", "float32")

# Checks the shapes in our signatures at each call. It has to be in place before they are imported.
# Modules without shapes go without: pyright knows their types, and each check costs 20 µs.
ROOT = Path(__file__).parents[1]
SHAPED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for room in ("catp_jax", "convert")
    for path in sorted((ROOT / room).rglob("*.py"))
    if "jaxtyping" in path.read_text()
]
install_import_hook(SHAPED, "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def _commands_without_torch() -> Iterator[None]:
    """Commands that tests start find no torch, which only the tests themselves need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "without_torch"), prepend=os.pathsep)
        yield


@pytest.fixture
def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a command that has to do without torch, or with it, by itself."""
    _hidden, *rest = os.environ["PYTHONPATH"].split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(rest))


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs() -> Iterator[None]:
    """Each file compiles its own: thousands of programs in one process take gigabytes, and run into
    the kernel's limit of memory maps, where the next compilation crashes.
    """
    yield
    jax.clear_caches()


# Files go to the workers in this order, then the others by name: what takes minutes must not be
# what one worker is left with while the other is done. The summary says when this is out of date.
FIRST = (
    *("sharding/test_processes", "test_benchmarks", "targets/test_gpu_programs", "test_readme"),
    *("sharding/test_meshes", "generation/test_cache_sites", "generation/test_asked"),
    *("test_blip2_properties", "test_blip2_programs", "test_begun", "test_stream", "test_plan"),
    *("sharding/test_load", "convert/test_blip2", "test_api", "test_api_blip2"),
    *("training/test_mini_llama_vision", "test_properties", "parity/test_blip2"),
    *("training/test_mini_blip2", "convert/test_converted", "test_programs", "test_cli"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first; and what was imported up to now stays, unseen by the collector."""
    gc.freeze()
    place = {Path(__file__).parent / f"{name}.py": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(FIRST)))


def _cpu() -> float:
    """Seconds that this process and the ones it has waited for have computed."""
    return sum(os.times()[:4])


_since = _cpu()
_by_file: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # seconds, and of CPU


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """What was computed since the last report: a load of the machine does not show in it."""
    global _since
    report = yield
    now = _cpu()
    report.cpu, _since = now - _since, now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    spent = _by_file[report.nodeid.partition("::")[0]]
    spent[0] += report.duration
    spent[1] += getattr(report, "cpu", 0.0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The files that take longest, so that a relapse shows."""
    if not _by_file:
        return
    terminalreporter.section("slowest files: seconds, and seconds of CPU")
    by_cpu = sorted(_by_file.items(), key=lambda item: -item[1][1])
    for name, (wall, cpu) in by_cpu[:20]:
        terminalreporter.write_line(f"{wall:8.1f} {cpu:8.1f}  {name}")
    wall, cpu = (sum(spent[n] for spent in _by_file.values()) for n in (0, 1))
    terminalreporter.write_line(f"{wall:8.1f} {cpu:8.1f}  all {len(_by_file)} files")
