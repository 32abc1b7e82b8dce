"""Plans: bytes counted by hand, FLOPs and collectives of programs whose numbers are known.

Models are planned in processes of their own: shapes that are checked at each call take no abstract
parameters, and JAX counts its devices once. They have the real widths and few layers.
"""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from catp_jax import targets
from catp_jax.families import PRESETS, find_config
from catp_jax.models.mllama import MllamaConfig
from catp_jax.plan import (
    Plan,
    Work,
    abstract_model,
    make_plan,
    shard_bytes,
    table,
)
from catp_jax.plan.compiled import for_cpu, uses
from catp_jax.plan.making import largest
from catp_jax.readers.hub import FULL_NAMES
from catp_jax.sharding.mesh import make_mesh
from catp_jax.sharding.place import kv_heads, place
from catp_jax.targets import Floor, compiling
from tests.command import catp_jax

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "catp_jax" / "assets" / "mini-llama-vision"
LAYERS, CROSS = 3, 2
compiler = pytest.mark.skipif(
    not targets.is_available(),
    reason="JAX's CUDA compiler (jax-cuda13-pjrt, jax-cuda13-plugin) is not installed",
)

SHALLOW = f"""
import json, sys
from dataclasses import replace
from catp_jax.families import PRESETS
from catp_jax.plan import force_devices, make_plan

llama, opt = (PRESETS[name]() for name in ("Llama-3.2-11B-Vision", "blip2-opt-2.7b"))
vision = replace(
    llama.vision, num_hidden_layers=1, num_global_layers=1, intermediate_layers_indices=(0,) * 5
)
text = replace(llama.text, num_hidden_layers={LAYERS}, cross_attention_layers=(1, 2))
PRESETS["llama"] = lambda: replace(llama, vision=vision, text=text)
PRESETS["opt"] = lambda: replace(
    opt,
    vision=replace(opt.vision, num_hidden_layers=1),
    qformer=replace(opt.qformer, num_hidden_layers=1),
    text=replace(opt.text, num_hidden_layers=1),
)
"""


def run(code: str) -> list[dict]:
    """What a process prints as JSON lines."""
    done = subprocess.run(
        [sys.executable, "-c", SHALLOW + code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def on_eight() -> list[dict]:
    return run("""
force_devices(8)
for made in (
    make_plan("llama", "tensor=8", batch=16, tiles=4),
    make_plan("llama", "tensor=8", batch=16, tiles=4, methods=[("trimmed_llama", "50%")]),
    make_plan("opt", "fsdp=8", methods=[("catp", "50%")]),
):
    print(json.dumps(made.as_json()))
""")


@pytest.fixture(scope="module")
def command_on_one() -> dict:
    words = ["opt", "--batch-size", "8", "--prune", "l2, catp", "--keep", "75%,16", "--json"]
    (plan,) = run(f"from catp_jax.cli import app; app(['plan', *{words}], standalone_mode=False)")
    return plan


def test_llama_in_bfloat16_on_eight_devices(on_eight):
    whole = on_eight[0]
    text = MllamaConfig.llama_3_2_11b().text
    heads, head = text.num_key_value_heads // 8, text.head_dim
    assert whole["visual_tokens"] == whole["kept"] == 4 * 1601
    slots = 201 * 32  # of 4 × 1601 tokens: a block of many is a multiple of 32 slots
    assert whole["cross_kv"] == 2 * 2 * CROSS * 16 * slots * heads * head
    assert whole["self_kv"] == 2 * 2 * (LAYERS - CROSS) * 16 * (128 + 128) * heads * head
    assert whole["fits"]
    assert whole["total"] > whole["weights"] + whole["cross_kv"]


def test_half_the_visual_tokens_take_half_of_the_cross_attention_cache(on_eight):
    whole, pruned, _ = on_eight
    assert pruned["kept"] == 2 * 1601
    assert pruned["cross_kv"] * 201 == whole["cross_kv"] * 101  # 32 slots each
    assert (pruned["self_kv"], pruned["weights"]) == (whole["self_kv"], whole["weights"])
    assert pruned["prefill_flops"] < whole["prefill_flops"]
    assert pruned["token_flops"] < whole["token_flops"]


def test_a_method_that_keeps_all_leaves_all_visual_tokens():
    folder = Path(__file__).resolve().parents[1] / "catp_jax" / "assets" / "scenes-llama-vision"
    words = ["--prune", "k_norm,think", "--keep", "50%,50%", "--json"]
    command = ["plan", str(folder), *words]
    (plan,) = run(f"from catp_jax.cli import app; app({command}, standalone_mode=False)")
    assert (plan["visual_tokens"], plan["kept"]) == (260, 130)


def test_a_layer_reduces_twice_and_the_embedding_once(on_eight):
    (one,) = on_eight[0]["token_traffic"]
    assert (one["kind"], one["number"]) == ("all-reduce", 2 * LAYERS + 1)
    assert one["nbytes"] == (2 * LAYERS + 1) * 16 * 4096 * 2


def test_fsdp_divides_the_weights_and_gathers_them(on_eight, command_on_one):
    one, eight = command_on_one, on_eight[2]
    assert (one["visual_tokens"], one["kept"]) == (32, 16)
    assert 7 < one["weights"] / eight["weights"] < 8  # 2,050 positions are not divided by 8
    assert one["prefill_traffic"] == one["token_traffic"] == []
    assert {row["kind"] for row in eight["token_traffic"]} >= {"all-gather"}
    assert one["prefill_flops"] == eight["prefill_flops"]


def test_a_published_checkpoint_needs_no_download_by_either_name():
    for name, full in FULL_NAMES.items():
        if "itm" not in name:  # which write no text
            assert find_config(name) == find_config(full) == PRESETS[name]()


def test_a_downloaded_checkpoint_comes_before_what_is_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blip2-opt-2.7b").symlink_to(MINI)
    assert find_config("blip2-opt-2.7b") == find_config(MINI)


@functools.cache
def abstract_bf16(name: str) -> Any:
    return abstract_model(PRESETS[name](), jnp.bfloat16)


@pytest.mark.parametrize(
    ("name", "mesh", "parameters"),
    [("Llama-3.2-11B-Vision", "tensor=8", 10.67e9), ("blip2-opt-2.7b", "fsdp=8", 3.74e9)],
)
def test_weights_are_split_over_eight_devices(name, mesh, parameters):
    model = abstract_bf16(name)
    split = shard_bytes(place(model, make_mesh(mesh, kv_heads(model))))
    # an eighth each, in two bytes; what is not split is small, as is the Q-Former's float32
    assert parameters * 2 / 8 < split < 1.1 * parameters * 2 / 8


def made_up(**given) -> Plan:
    """A plan of 10 prompts."""
    sizes = {"weights": 1000, "self_kv": 300, "cross_kv": 500, "temporaries": 200, "memory": 4000}
    others: dict = {field.name: None for field in dataclasses.fields(Plan)}
    numbers = dict.fromkeys(("visual_tokens", "kept", "inputs", "prefill_flops", "token_flops"), 0)
    nothing = {"model": "", "mesh": {}, "dtype": "", "prefill_traffic": (), "token_traffic": ()}
    return Plan(**others | numbers | nothing | sizes | {"batch": 10, "hosts": 1} | given)


def test_the_batch_that_fits_is_told_by_a_line_until_one_is_found():
    plan = made_up()
    assert (plan.total, plan.largest_batch) == (2000, 30)
    assert made_up(cross_kv=250).largest_batch == 40
    assert made_up(memory=999).largest_batch == 0
    found = made_up(found_batch=25)
    assert (found.largest_batch, found.as_json()["largest_batch_is_compiled"]) == (25, True)


def shown(plan: Plan) -> str:
    """A plan's table, in one line."""
    console = Console(width=200, file=io.StringIO())
    console.print(table(plan))
    return " ".join(console.file.getvalue().split())


def test_a_table_says_what_a_target_tells_and_what_is_not_told():
    plain = shown(made_up())
    assert "temporaries, at most, a device 200 B" in plain
    assert (
        "Not shown: temporaries in the weights' number type, bytes moved, the least time" in plain
    )
    assert "--target names a GPU to compile for (h100, h200, a100, b200)" in plain
    assert "floor" not in plain

    floor = Floor(memory=0.004, arithmetic=0.001, links=0.0, network=0.005)
    numbers = {"flops": 0, "sent": 0, "sent_between_hosts": 0, "temporaries": 0, "launches": 0}
    bytes_moved: dict = {"moved": 9000, "moved_at_least": 8000, "moved_by_kind": {"copy": 9000}}
    kernels = {"has_cudnn": False, "has_triton": True}
    step = Work(**numbers, **bytes_moved, **kernels, floor=floor, seconds=0.005)
    prompt = dataclasses.replace(step, has_cudnn=True)
    given = {"target": "h100", "hosts": 2, "prefill_work": prompt, "token_work": step}
    told = shown(made_up(**given, found_batch=25))
    assert "h100 on 2 hosts" in told
    assert "token, bytes moved, a device; at least 8 KB 9 KB" in told
    assert "token, time of network alone 5 ms" in told
    assert "links" not in told
    assert "token, floor: it takes at least 5 ms" in told
    assert "tokens a second at that floor, all prompts 2,000" in told
    assert "largest batch, compiled for 25" in told
    assert "Not shown" not in told
    assert "cuDNN" not in told

    given["prefill_work"] = dataclasses.replace(step, has_triton=False)
    lacking = shown(made_up(**given))
    assert "cuDNN is not found, or refuses" in lacking
    assert "XLA has no Triton kernel for these shapes" in lacking


def test_without_a_target_nothing_is_told_of_one(command_on_one):
    names = ("target", "prefill_work", "token_work", "tokens_per_second")
    assert [command_on_one[name] for name in names] == [None] * 4
    assert command_on_one["memory"] == 80e9
    assert not command_on_one["largest_batch_is_compiled"]


@pytest.fixture(scope="module")
def on_gpus() -> list[dict]:
    return run("""
force_devices(1)
told = {}
def show(model, mesh, **given):
    given = {"target": "h100", "prompt": 32, "new_tokens": 32, "report": told.__setitem__} | given
    print(json.dumps(make_plan(model, mesh, **given).as_json()))
show("opt", "tensor=1", batch=2, memory=545_000_000, find_largest_batch=True)
show("llama", "data=2,tensor=4", hosts=2)
print(json.dumps(told))
""")


@compiler
def test_a_step_on_a_gpu_reads_its_weights_and_its_cache_at_least(on_gpus):
    one, work = on_gpus[0], on_gpus[0]["token_work"]
    text = PRESETS["blip2-opt-2.7b"]().text
    # the embedding is the head too, and read whole; positions are looked up
    square, table = text.hidden_size**2, text.vocab_size * text.hidden_size
    least = 2 * (4 * square + 2 * 4 * square + table) + one["self_kv"]
    assert least < work["moved_at_least"] < 1.001 * least
    assert work["moved_at_least"] < work["moved"] == sum(work["moved_by_kind"].values())
    gpu = targets.find_gpu("h100")
    assert work["floor"]["memory"] == work["seconds"] == work["moved"] / gpu.bandwidth
    assert one["tokens_per_second"] == 2 / work["seconds"]


@compiler
def test_a_prefill_on_a_gpu_has_its_products_and_writes_the_cache(on_gpus):
    one, work = on_gpus[0], on_gpus[0]["prefill_work"]
    gpu = targets.find_gpu("h100")
    assert work["flops"] == one["prefill_flops"]
    assert work["floor"]["arithmetic"] == work["flops"] / gpu.bf16_flops
    assert work["moved_at_least"] > one["token_work"]["moved_at_least"]  # vision and Q-Former too
    assert one["temporaries"] == max(work["temporaries"], one["token_work"]["temporaries"])
    assert work["sent"] == work["floor"]["links"] == 0


@compiler
def test_the_largest_batch_fits_and_one_more_does_not(on_gpus):
    planned, _, told = on_gpus
    assert planned["largest_batch_is_compiled"]
    totals = told | {str(planned["batch"]): planned["total"]}
    largest, memory = planned["largest_batch"], planned["memory"]
    assert totals[str(largest)] <= memory < totals[str(largest + 1)]
    assert planned["fits"] == (planned["batch"] <= largest)
    assert 0 < len(told) < 4


@compiler
def test_on_two_hosts_the_network_carries_only_what_data_sends(on_gpus):
    mesh = on_gpus[1]
    prefill, token = mesh["prefill_work"], mesh["token_work"]
    assert (mesh["target"], mesh["hosts"]) == ("h100", 2)
    (sums,) = mesh["token_traffic"]
    assert (sums["kind"], sums["number"]) == ("all-reduce", 2 * LAYERS + 1)
    each = 4096 * 2  # bytes of a device's one prompt, in bfloat16
    assert sums["nbytes"] == (2 * LAYERS + 1) * each
    # among the four of a host; XLA has all eight sum up the embedding
    assert token["sent"] == 2 * LAYERS * (2 * 3 * each // 4) + 2 * 7 * each // 8
    assert token["sent_between_hosts"] <= 2 * each // 8
    # any prompt may have any image, so that their features go to both
    features = 4 * 1601 * 7680 * 2
    assert features <= prefill["sent_between_hosts"] < 1.1 * features
    assert prefill["floor"]["network"] == prefill["sent_between_hosts"] / 50e9
    assert prefill["seconds"] == max(prefill["floor"].values())


def test_the_search_is_not_led_astray_by_totals_that_fall():
    sizes = {0: 500, 1: 560, 2: 550, 3: 600, 4: 610, 5: 640}
    asked: list[int] = []

    def total(batch: int) -> int:
        asked.append(batch)
        return sizes.get(batch, 640 + 10 * batch)

    assert largest(total, 605, {0: 500, 1: 560}, unit=1) == 3
    assert max(asked) < 100


def test_the_search_asks_for_few_totals():
    asked: list[int] = []

    def total(batch: int) -> int:
        asked.append(batch)
        return 1000 + 17 * batch + batch // 50 * 200

    most = max(n for n in range(2, 3000, 2) if total(n) <= 20_000)
    asked.clear()
    assert largest(total, 20_000, {0: 1000, 2: total(2)}, unit=2) == most
    assert len(asked) < 10
    assert largest(total, 999, {0: 1000, 2: total(2)}, unit=2) == 0
    assert largest(total, 1001, {0: 1000, 2: total(2)}, unit=2) == 0


def test_arguments_that_rows_are_taken_from_are_told_apart():
    def program(table, weights, both, idle, ids):
        del idle
        return jnp.take(table, ids, axis=0) @ weights + both[ids] @ both.T

    x = jnp.zeros((3, 3))
    traced = jax.jit(program).trace(x, x, x, x, jnp.zeros(2, jnp.int32))
    assert uses(traced.jaxpr.jaxpr) == [False, True, True, False, True]


def test_traffic_of_a_product_that_is_summed_over_devices():
    mesh = make_mesh("tensor=8", 8)

    def on(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    product = jax.jit(lambda x, y: x @ y, out_shardings=on())
    left = jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=on(None, "kv"))
    right = jax.ShapeDtypeStruct((16, 6), jnp.float32, sharding=on("kv", None))
    (one,) = for_cpu(product.trace(left, right), scale=0.5).traffic
    assert (one.kind, one.number, one.nbytes) == ("all-reduce", 1, 4 * 6 * 2)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("gpt-2", {}, "not a folder; .* known as Llama-3.2-11B-Vision"),
        ("blip2-opt-2.7b", {"tiles": 2}, "images of this model have no tiles"),
        ("Llama-3.2-11B-Vision", {"tiles": 5}, "an image has 1 to 4 tiles, got 5"),
        ("blip2-opt-2.7b", {"prompt": 3000}, "3000 prompt tokens and 128 new ones do not fit"),
        ("blip2-opt-2.7b", {"mesh": "data=8", "batch": 6}, "plan a multiple of 8"),
        ("blip2-opt-2.7b", {"mesh": f"data={10**20}"}, "a mesh is sizes of"),
        ("Llama-3.2-11B-Vision", {"dtype": "int8"}, "dtype is int8; wanted"),
        ("Llama-3.2-11B-Vision", {"batch": 0}, "batch is at least 1, got 0"),
        ("Llama-3.2-11B-Vision", {"mesh": "tensor=4"}, "4 places, and JAX sees 8 devices"),
        ("blip2-opt-2.7b", {"target": "h1000"}, "a target is one of h100, h200, a100, b200, got"),
        ("blip2-opt-2.7b", {"target": "h100", "hosts": 3}, "same number on each of 3 hosts"),
        ("blip2-opt-2.7b", {"find_largest_batch": True}, "require a target"),
    ],
)
def test_what_makes_no_sense_is_refused(model, options, says):
    with pytest.raises(ValueError, match=says):
        make_plan(model, **{"mesh": "tensor=8", **options})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--target", "h1000"], "a target is one of h100, h200, a100, b200, got 'h1000'"),
        (["--mesh", "rows=2"], "a mesh is sizes of data, fsdp, tensor"),
        (["--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--mesh", "data=8", "--batch-size", "6"], "plan a multiple of 8"),
        (["--keep", "4"], "--prune and --keep go together"),
        (["--prune", "nope", "--keep", "4"], "unknown pruning method 'nope'; there are catp, l2,"),
        (["--prune", "k_norm", "--prune", "random", "--keep", "4"], "--prune k_norm,random"),
        (["--prune", "k_norm,random", "--keep", "4", "--keep", "8"], "--keep 4,8"),
        (
            ["--prune", "trimmed_llama:k_ratio=0.1", "--keep", "auto"],
            "a plan has fixed budgets: --keep auto is for generate",
        ),
        (["--largest-batch"], "--largest-batch and --hosts require --target"),
        (["--memory", "0"], "--memory must be a size above 0, got 0"),
    ],
)
def test_a_wrong_call_ends_with_its_reason_and_code_2(words, says, monkeypatch):
    monkeypatch.setattr("catp_jax.plan.force_devices", lambda _: None)  # there are eight here
    done = catp_jax("plan", MINI, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in " ".join(done.stderr.replace("│", " ").split())


def test_without_the_compiler_a_target_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("catp_jax.plan.force_devices", lambda _: None)
    monkeypatch.setattr(compiling, "is_available", lambda: False)
    done = catp_jax("plan", MINI, "--target", "h100")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"pip install --no-deps --target gpu-compiler jax-cuda13-pjrt=={jax.__version__}" in (
        done.stderr
    )


def test_heads_that_do_not_divide_are_named():
    mesh = make_mesh("tensor=3", 1, jax.devices()[:3])
    with pytest.raises(ValueError, match=r"axis vision_heads has 16 heads[^\n]* 1, 2, 4, 8, 16 "):
        place(abstract_bf16("blip2-opt-2.7b"), mesh)
