"""Plans: bytes counted by hand, FLOPs and collectives of programs whose numbers are known."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import convert
from catp_jax.models.mllama import MllamaConfig
from catp_jax.plan import PRESETS, make_plan, matrix_flops, traffic
from catp_jax.sharding.mesh import make_mesh
from catp_jax.sharding.place import place


def plan(*words: str) -> dict:
    """What the command prints as JSON."""
    run = subprocess.run(
        [sys.executable, "-m", "catp_jax", "plan", *words, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def whole() -> dict:
    return plan("Llama-3.2-11B-Vision", "--mesh", "tensor=8", "--batch", "16", "--tiles", "4")


@pytest.fixture(scope="module")
def pruned() -> dict:
    words = ("Llama-3.2-11B-Vision", "--mesh", "tensor=8", "--batch", "16", "--tiles", "4")
    return plan(*words, "--keep", "50%")


def test_11b_in_bfloat16_on_eight_devices(whole):
    text = MllamaConfig.llama_3_2_11b().text
    heads, head = text.num_key_value_heads // 8, text.head_dim
    layers, cross = text.num_hidden_layers, len(text.cross_attention_layers)
    assert whole["visual_tokens"] == whole["kept"] == 4 * 1601
    slots = 4 * 1602  # of 4 × 1601 tokens: a block of many is a multiple of 8 slots
    assert whole["cross_kv"] == 2 * 2 * cross * 16 * slots * heads * head
    assert whole["self_kv"] == 2 * 2 * (layers - cross) * 16 * (128 + 128) * heads * head
    # 10.67 billion parameters of 2 bytes, an eighth each; what is not split is small
    assert 10.67e9 * 2 / 8 < whole["weights"] < 1.1 * 10.67e9 * 2 / 8
    assert whole["fits"]
    assert whole["total"] > whole["weights"] + whole["cross_kv"]


def test_half_the_visual_tokens_take_half_of_the_cross_attention_cache(whole, pruned):
    assert pruned["kept"] == 2 * 1601
    assert pruned["cross_kv"] * (4 * 1602) == whole["cross_kv"] * (2 * 1604)  # multiples of 8 slots
    assert (pruned["self_kv"], pruned["weights"]) == (whole["self_kv"], whole["weights"])
    assert pruned["largest_batch"] > whole["largest_batch"]
    assert pruned["prefill_flops"] < whole["prefill_flops"]
    assert pruned["token_flops"] < whole["token_flops"]


def test_a_layer_reduces_twice_and_the_embedding_once(whole):
    layers = MllamaConfig.llama_3_2_11b().text.num_hidden_layers
    (one,) = whole["token_traffic"]
    assert (one["kind"], one["number"]) == ("all-reduce", 2 * layers + 1)
    assert one["nbytes"] == (2 * layers + 1) * 16 * 4096 * 2


def test_flops_of_matrix_products_with_loops_counted_out():
    def program(x, y):
        def twice(carry, _):
            return carry @ y, None

        return jax.lax.scan(twice, x @ y, None, length=3)[0]

    traced = jax.jit(program).trace(jnp.zeros((2, 5)), jnp.zeros((5, 5)))
    assert matrix_flops(traced.jaxpr.jaxpr) == 4 * 2 * 2 * 5 * 5


def test_traffic_of_a_product_that_is_summed_over_devices():
    mesh = make_mesh("tensor=8", 8)

    def on(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    product = jax.jit(lambda x, y: x @ y, out_shardings=on())
    left = jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=on(None, "kv"))
    right = jax.ShapeDtypeStruct((16, 6), jnp.float32, sharding=on("kv", None))
    (one,) = traffic(product.lower(left, right).compile().as_text() or "", itemsize=2)
    assert (one.kind, one.number, one.nbytes) == ("all-reduce", 1, 4 * 6 * 2)


def test_fsdp_divides_the_weights_and_gathers_them():
    words = ("blip2-opt-2.7b", "--batch", "8", "--keep", "8", "--mesh")
    one, eight = plan(*words, "tensor=1"), plan(*words, "fsdp=8")
    assert (one["visual_tokens"], one["kept"]) == (32, 8)
    assert one["weights"] / eight["weights"] == pytest.approx(8, rel=0.02)
    assert one["prefill_traffic"] == one["token_traffic"] == []
    assert {row["kind"] for row in eight["token_traffic"]} >= {"all-gather"}
    assert one["prefill_flops"] == eight["prefill_flops"]


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("gpt-2", {}, "is no folder and none of Llama-3.2-11B-Vision"),
        ("blip2-opt-2.7b", {"tiles": 2}, "only images of Llama Vision have tiles"),
        ("Llama-3.2-11B-Vision", {"tiles": 5}, "an image has 1 to 4 tiles, got 5"),
        ("blip2-opt-2.7b", {"prompt": 3000}, "3000 prompt tokens and 128 new ones do not fit"),
        ("blip2-opt-2.7b", {"mesh": "data=8", "batch": 6}, "plan a multiple of 8"),
        ("blip2-opt-2.7b", {"mesh": f"data={10**20}"}, "a mesh is sizes of"),
        ("Llama-3.2-11B-Vision", {"dtype": "int8"}, "dtype is int8; wanted"),
        ("Llama-3.2-11B-Vision", {"batch": 0}, "batch is at least 1, got 0"),
        ("Llama-3.2-11B-Vision", {"mesh": "tensor=4"}, "4 places, and JAX sees 8 devices"),
    ],
)
def test_what_makes_no_sense_is_refused(model, options, says):
    with pytest.raises(ValueError, match=says):
        make_plan(model, **{"mesh": "tensor=8", **options})


def test_heads_that_do_not_divide_are_named():
    mesh = make_mesh("tensor=3", 1, jax.devices()[:3])
    with pytest.raises(ValueError, match=r"axis vision_heads has 16 heads[^\n]* 1, 2, 4, 8, 16 "):
        place(convert.abstract(PRESETS["blip2-opt-2.7b"]()), mesh)
