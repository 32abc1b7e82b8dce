"""The counter of moved bytes, on programs small enough to count by hand."""

import pytest

from catp_jax.targets.counting import count, groups_in
from catp_jax.targets.gpus import find_gpu
from catp_jax.targets.hlo import bits
from catp_jax.targets.program import Kernel, Program


def module(entry: str, *computations: str, head: str = "HloModule m") -> str:
    """The text of a module, laid out as XLA prints it."""
    body = "\n".join(f"  {line}" for line in entry.strip().splitlines())
    return "\n\n".join([head, *computations, f"ENTRY %main (a: s32[]) -> s32[] {{\n{body}\n}}\n"])


def one(text: str) -> Kernel:
    (kernel,), _, _ = count(text)
    return kernel


def test_a_kernel_reads_its_operands_and_writes_its_result():
    kernel = one(
        module("""
%a = bf16[8,256]{1,0} parameter(0)
%b = f32[256]{0} parameter(1)
%c = bf16[256,8]{0,1} bitcast(%a)
ROOT %d = f32[256,8]{1,0} some-op(%c, %b)
""")
    )
    assert (kernel.read, kernel.written) == (8 * 256 * 2 + 256 * 4, 256 * 8 * 4)


def test_tuples_bitcasts_and_constants_move_nothing():
    kernels, collectives, loops = count(
        module("""
%a = (bf16[8]{0}, (s32[], /*index=1*/f32[4]{0})) parameter(0)
%b = bf16[8]{0} get-tuple-element(%a), index=0
%c = s32[4]{0} constant({1, 2, 3, 4})
ROOT %d = (bf16[8]{0}, s32[4]{0}) tuple(%b, %c)
""")
    )
    assert (kernels, collectives, loops) == ((), (), ())


def test_a_slice_counts_what_it_takes_and_an_update_what_it_puts():
    kernels, _, _ = count(
        module("""
%a = bf16[100,64]{1,0} parameter(0)
%i = s32[] parameter(1)
%s = bf16[2,64]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={2,64}
ROOT %u = bf16[100,64]{1,0} dynamic-update-slice(%a, %s, %i, %i)
""")
    )
    # the index is one array, whatever the number of axes that it is given for
    assert [(k.read, k.written) for k in kernels] == [(256 + 4, 256), (256 + 4, 256)]


GATHER = """%gathers (t: bf16[1000,64], i: s32[8]) -> f32[8,64] {
  %t = bf16[1000,64]{1,0} parameter(0)
  %i = s32[8]{0} parameter(1)
  %w = f32[1000,64]{1,0} convert(%t)
  ROOT %g = f32[8,64]{1,0} gather(%w, %i), offset_dims={1}, slice_sizes={1,64}
}"""


def test_a_fusion_reads_of_a_table_only_the_rows_that_it_gathers():
    kernel = one(
        module(
            """
%table = bf16[1000,64]{1,0} parameter(0)
%ids = s32[8]{0} parameter(1)
ROOT %f = f32[8,64]{1,0} fusion(%table, %ids), kind=kLoop, calls=%gathers
""",
            GATHER,
        )
    )
    assert (kernel.read, kernel.written) == (8 * 64 * 2 + 8 * 4, 8 * 64 * 4)
    assert kernel.kind == "gather"


HALVES = """%halves (x: bf16[8,64]) -> bf16[8,32] {
  %x = bf16[8,64]{1,0} parameter(0)
  %l = bf16[8,32]{1,0} slice(%x), slice={[0:8], [0:32]}
  %r = bf16[8,32]{1,0} slice(%x), slice={[0:8], [32:64]}
  ROOT %s = bf16[8,32]{1,0} add(%l, %r)
}"""


def test_two_halves_are_a_whole_and_one_is_half():
    entry = """
%x = bf16[8,64]{1,0} parameter(0)
ROOT %f = bf16[8,32]{1,0} fusion(%x), kind=kLoop, calls=%halves
"""
    assert one(module(entry, HALVES)).read == 8 * 64 * 2
    left = HALVES.replace("add(%l, %r)", "multiply(%l, %l)")
    assert one(module(entry, left)).read == 8 * 32 * 2


PUT = """%put (cache: bf16[8,128,64], new: bf16[8,64], i: s32[]) -> bf16[8,128,64] {
  %cache = bf16[8,128,64]{2,1,0} parameter(0)
  %new = bf16[8,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = bf16[8,1,64]{2,1,0} bitcast(%new)
  ROOT %u = bf16[8,128,64]{2,1,0} dynamic-update-slice(%cache, %row, %zero, %i, %zero)
}"""
PUTS = """
%cache = bf16[8,128,64]{2,1,0} parameter(0)
%new = bf16[8,64]{1,0} parameter(1)
%i = s32[] parameter(2)
ROOT %f = bf16[8,128,64]{2,1,0} fusion(%cache, %new, %i), kind=kLoop, calls=%put
"""


def test_an_update_in_place_neither_reads_nor_writes_the_rest():
    kernel = one(module(PUTS, PUT))
    assert (kernel.read, kernel.written) == (8 * 64 * 2 + 4, 8 * 64 * 2)
    assert kernel.kind == "update"


def test_an_update_whose_result_is_used_further_counts_whole():
    used = PUT.replace("  ROOT %u", "  %u").replace(
        "%zero)\n}", "%zero)\n  ROOT %n = bf16[8,128,64]{2,1,0} negate(%u)\n}"
    )
    kernel = one(module(PUTS, used))
    whole = 8 * 128 * 64 * 2
    assert (kernel.read, kernel.written) == (whole + 8 * 64 * 2 + 4, whole)


BODY = """%body (s: (s32[], f32[16])) -> (s32[], f32[16]) {
  %s = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[16]{0} get-tuple-element(%s), index=1
  %y = f32[16]{0} negate(%x)
  ROOT %t = (s32[], f32[16]{0}) tuple(%i, %y)
}"""
CONDITION = """%condition (s: (s32[], f32[16])) -> pred[] {
  %s = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(5)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}"""
LOOP = """
%s = (s32[], f32[16]{0}) parameter(0)
ROOT %w = (s32[], f32[16]{0}) while(%s), condition=%condition, body=%body, backend_config={TRIPS}
"""


def test_a_loop_counts_as_often_as_it_runs():
    text = module(LOOP.replace("TRIPS", '"known_trip_count":{"n":"5"}'), BODY, CONDITION)
    kernels, _, loops = count(text)
    assert [(k.name, k.times, k.moved) for k in kernels] == [("y", 5, 5 * 128), ("l", 5, 5 * 9)]
    assert loops == ()


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    kernels, _, loops = count(module(LOOP.replace("TRIPS", ""), BODY, CONDITION))
    assert {k.times for k in kernels} == {1}
    assert loops == ("w",)


def test_of_branches_the_one_that_moves_most_counts():
    small = "%small (a: f32[4]) -> f32[4] {\n  %a = f32[4]{0} parameter(0)\n"
    small += "  ROOT %n = f32[4]{0} negate(%a)\n}"
    large = small.replace("%small", "%large").replace("%n", "%p")
    large = large.replace("negate(%a)", "add(%a, %b)").replace(
        "  ROOT", "  %b = f32[4]{0} copy(%a)\n  ROOT"
    )
    entry = """
%p = pred[] parameter(0)
%a = f32[4]{0} parameter(1)
ROOT %c = f32[4]{0} conditional(%p, %a, %a), true_computation=%small, false_computation=%large
"""
    kernels, _, _ = count(module(entry, small, large))
    assert [k.name for k in kernels] == ["b", "p"]


def test_a_library_call_counts_its_operands_and_results_without_its_workspace():
    kernel = one(
        module(
            """
%a = bf16[64,128]{1,0} parameter(0)
%b = bf16[128,32]{1,0} parameter(1)
ROOT %c = (bf16[64,32]{1,0}, s8[4194304]{0}) custom-call(%a, %b), """
            'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
            '"rhs_contracting_dimensions":["0"]}}}'
        )
    )
    assert (kernel.read, kernel.written) == (2 * (64 * 128 + 128 * 32), 2 * 64 * 32)
    assert kernel.flops == 2 * 64 * 32 * 128
    assert kernel.kind == "matrix product"


def test_flops_of_a_convolution_are_those_of_its_window():
    kernel = one(
        module(
            """
%a = bf16[2,8,8,3]{3,2,1,0} parameter(0)
%k = bf16[2,2,3,16]{3,2,1,0} parameter(1)
ROOT %c = bf16[2,4,4,16]{3,2,1,0} convolution(%a, %k), window={size=2x2 stride=2x2}, """
            "dim_labels=b01f_01io->b01f"
        )
    )
    assert kernel.flops == 2 * (2 * 4 * 4 * 16) * (2 * 2 * 3)


def test_an_asynchronous_pair_is_one_exchange():
    text = module(
        """
%a = bf16[4,16]{1,0} parameter(0)
%s = (bf16[4,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%a), channel_id=1, """
        """replica_groups=[1,8]<=[8], dimensions={0}
ROOT %d = bf16[32,16]{1,0} all-gather-done(%s)
""",
        head="HloModule m, num_partitions=8",
    )
    (kernel,), (exchange,), _ = count(text)
    assert (kernel.read, kernel.written) == (4 * 16 * 2, 32 * 16 * 2)
    assert (exchange.kind, exchange.group) == ("all-gather", 8)
    # seven of eight shards come from others, and its own goes to as many
    assert (exchange.nbytes, exchange.sent) == (32 * 16 * 2, 7 * 4 * 16 * 2)


def test_a_sum_over_devices_goes_round_twice():
    text = module("""
%a = f32[8,16]{1,0} parameter(0)
ROOT %s = f32[8,16]{1,0} all-reduce(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
""")
    _, (exchange,), _ = count(text)
    assert (exchange.group, exchange.sent) == (4, 2 * 3 * 8 * 16 * 4 // 4)


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[3,2]<=[2,3]T(1,0)", [[0, 3], [1, 4], [2, 5]]),
        ("mesh['a'=2,'b'=3] {'b'}", [[0, 1, 2], [3, 4, 5]]),
        ("mesh['a'=2,'b'=3] {'a'}", [[0, 3], [1, 4], [2, 5]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("{}", []),
    ],
)
def test_groups_are_read_in_all_their_spellings(groups: str, devices: list[list[int]]):
    attributes = f", channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    assert groups_in(attributes) == devices


@pytest.mark.parametrize(
    ("line", "sent", "between"),
    [
        # two hosts of two: each adds up for itself, half of a host's sum goes each way, by two
        ("all-reduce(%a), replica_groups={{0,1,2,3}}", 2 * 3 * 512 // 4, 512 // 2),
        ("all-reduce(%a), replica_groups={{0,2},{1,3}}", 512, 512),
        ("all-reduce(%a), replica_groups={{0,1},{2,3}}", 512, 0),
        ("all-to-all(%a), replica_groups={{0,1,2,3}}", 3 * 512 // 4, 512 // 2),
        ("collective-permute(%a), source_target_pairs={{0,2},{1,3}}", 512, 512),
        ("collective-permute(%a), source_target_pairs={{0,1},{2,3}}", 512, 0),
    ],
)
def test_what_has_to_leave_a_host(line: str, sent: int, between: int):
    text = module(
        f"""
%a = f32[8,16]{{1,0}} parameter(0)
ROOT %s = f32[8,16]{{1,0}} {line}
""",
        head="HloModule m, num_partitions=4",
    )
    _, (exchange,), _ = count(text, hosts=2)
    assert (exchange.sent, exchange.between_hosts) == (sent, between)


@pytest.mark.parametrize(("mask", "flops"), [("NO_MASK", 4 * 8 * 2 * 3 * 5 * 7), ("PADDING", 0)])
def test_attention_has_the_flops_that_are_sure(mask: str, flops: int):
    kernel = one(
        module(
            """
%q = bf16[2,5,3,8]{3,2,1,0} parameter(0)
%k = bf16[2,7,3,8]{3,2,1,0} parameter(1)
ROOT %c = (bf16[2,3,5,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), """
            'custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":'
            ' {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "5", '
            f'"7"]}}, "mask_type": "{mask}"}}}}'
        )
    )
    assert (kernel.kind, kernel.flops) == ("attention", flops)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("bf16", 16), ("f32", 32), ("pred", 8), ("s4", 4), ("f8e4m3fn", 8), ("c64", 64), ("u8", 8)],
)
def test_bits_of_an_element(dtype: str, wanted: int):
    assert bits(dtype) == wanted


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="has no ENTRY"):
        count("module @jit_f { }")


def test_the_floor_is_what_takes_longest():
    gpu = find_gpu("h100")
    work = Kernel(name="k", kind="", times=2, read=gpu.bandwidth, written=0, flops=gpu.bf16_flops)
    nothing = {"collectives": (), "open_loops": (), "graphs": None}
    program = Program(kernels=(work,), arguments=0, outputs=0, temporaries=0, **nothing)
    floor = program.floor(gpu)
    assert (floor.memory, floor.arithmetic, floor.links, floor.network) == (2, 2, 0, 0)
    assert floor.seconds == 2
    assert program.moved_by_kind == {"": 2 * gpu.bandwidth}
    assert program.launches == 2
