"""Accounts of compiled programs, on small scheduled HLO texts in the form that XLA's TPU and GPU compilers print."""

import pytest
from jllm_runtime.planner.hlo_account import account, step_account
from jllm_runtime.planner.hlo_text import parse_arrays, parse_hlo

KB = 1024
MATRIX = "bf16[256,512]{1,0:T(8,128)(2,1)}"
MATRIX_BYTES = 256 * KB


def program(*lines: str, before: str = "") -> str:
    return (
        f"HloModule jit_f, is_scheduled=true\n{before}\nENTRY %main (x: f32[]) -> f32[] {{\n"
        + "".join(f"  {line}\n" for line in (*lines, "ROOT %end = () tuple()"))
        + "}\n"
    )


@pytest.mark.parametrize(
    ("shape", "nbytes", "memory"),
    [
        ("bf16[256,512]{1,0:T(8,128)(2,1)}", 256 * 512 * 2, 0),
        ("bf16[256,512]{1,0:T(8,128)(2,1)S(1)}", 256 * 512 * 2, 1),
        ("f32[8]", 32, 0),
        ("f32[8]{0:T(256)}", 1024, 0),
        ("s32[]{:T(128)}", 512, 0),
        # 64 lanes are filled up to 128.
        ("bf16[2,8,64]{2,1,0:T(8,128)(2,1)}", 2 * 8 * 128 * 2, 0),
        # The axis that varies fastest is the first of the layout, not the last of the shape.
        ("f32[128,3,16]{0,2,1:T(8,128)}", 128 * 3 * 16 * 4, 0),
        ("f32[3,16]{0,1:T(8,128)}", 128 * 16 * 4, 0),
        ("s4[64,128]{1,0:T(64,128)(8,1)E(4)}", 64 * 64, 0),
        ("s4[64,128]{1,0:T(8,128)(4,1)}", 64 * 128, 0),
        ("pred[4,4]{1,0}", 16, 0),
        ("f8e4m3fn[4,4]{1,0}", 16, 0),
        ("token[]", 0, 0),
    ],
)
def test_an_array_takes_the_bytes_of_its_tiles(shape: str, nbytes: int, memory: int) -> None:
    (array,) = parse_arrays(shape)
    assert (array.nbytes, array.memory) == (nbytes, memory)


def test_a_text_without_a_program_is_an_error() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        parse_hlo("HloModule jit_f\n")


def test_a_kernel_whose_settings_take_several_lines_is_one_instruction() -> None:
    text = program(
        "%x = f32[8]{0} parameter(0)",
        '%k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"body":"a',
        '}}, metadata={op_name="jit(f)/layer_0/attention/pallas_call"}',
    )
    kernel = parse_hlo(text).computations["%main"].by_name["%k"]
    assert kernel.scope == "jit(f)/layer_0/attention/pallas_call"
    assert account(text).kernels == 1


PRODUCT = """
%fused (p0: bf16[8,256], p1: bf16[256,512]) -> bf16[8,512] {
  %p0 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %dot = bf16[8,512]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}
"""


def test_what_is_fetched_ahead_is_read_once() -> None:
    text = program(
        "%x = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)",
        f"%w = {MATRIX} parameter(1)",
        f"%start = (bf16[256,512]{{1,0:T(8,128)(2,1)S(1)}}, {MATRIX}, u32[]{{:S(2)}}) copy-start(%w)",
        "%done = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)",
        "%y = bf16[8,512]{1,0:T(8,128)(2,1)} fusion(%x, %done), kind=kOutput, calls=%fused, "
        'metadata={op_name="jit(f)/mlp/dot"}, backend_config={"window_config":{"estimated_cycles":"1234"}}',
        before=PRODUCT,
    )
    made = account(text)
    assert (made.read, made.written, made.cycles) == (MATRIX_BYTES + 4 * KB, 8 * KB, 1234)
    assert made.makes(256 * 512) == ()
    assert [each.name for each in made.makes(8 * 512)] == ["%y"]
    assert made.under("mlp").read == 4 * KB


def test_a_slice_that_is_fetched_counts_what_it_takes() -> None:
    text = program(
        f"%w = {MATRIX} parameter(0)",
        f"%start = (({MATRIX}), bf16[64,512]{{1,0:T(8,128)(2,1)S(1)}}, s32[]{{:S(2)}}) slice-start(%w)",
        "%done = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} slice-done(%start)",
    )
    assert (account(text).read, account(text).written) == (64 * KB, 0)


@pytest.mark.parametrize(
    "line",
    [
        f"%c = {MATRIX} copy(%w)",
        f"%c = ({MATRIX}, bf16[256,512]{{1,0:T(8,128)(2,1)S(1)}}, u32[]{{:S(2)}}) copy-start(%v)",
        f"%c = {MATRIX} fusion(%w), kind=kLoop, calls=%copied",
    ],
)
def test_a_copy_of_a_matrix_is_found(line: str) -> None:
    copied = f"""
%copied (p: bf16[256,512]) -> bf16[256,512] {{
  %p = {MATRIX} parameter(0)
  ROOT %copy = {MATRIX} copy(%p)
}}
"""
    text = program(
        f"%w = {MATRIX} parameter(0)",
        "%v = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)",
        line,
        before=copied,
    )
    assert [each.name for each in account(text).makes(256 * 512)] == ["%c"]
    assert account(text).largest_made == 256 * 512
    assert account(text).written == MATRIX_BYTES


POOL = "bf16[64,8,16,128]{3,2,1,0:T(8,128)(2,1)}"
POOL_BYTES = 64 * 8 * 16 * 128 * 2
IN_PLACE = f"""
%written (p0: bf16[64,8,16,128], p1: bf16[8,8,128]) -> bf16[64,8,16,128] {{
  %p0 = {POOL} parameter(0)
  %p1 = bf16[8,8,128]{{2,1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %scatter = {POOL} scatter(%p0, %p1, %p1), to_apply=%add
}}

%gathered (p0: bf16[64,8,16,128], p1: s32[8]) -> bf16[4,8,16,128] {{
  %p0 = {POOL} parameter(0)
  %p1 = s32[8]{{0}} parameter(1)
  %again = {POOL} bitcast(%p0)
  %taken = bf16[4,8,16,128]{{3,2,1,0:T(8,128)(2,1)}} gather(%again, %p1)
  ROOT %turned = bf16[4,8,16,128]{{3,1,2,0:T(8,128)(2,1)}} copy(%taken)
}}
"""


def test_a_pool_is_written_in_place_and_read_where_it_is_gathered() -> None:
    text = program(
        f"%pool = {POOL} parameter(0)",
        "%new = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)",
        "%table = s32[8]{0} parameter(2)",
        f"%after = {POOL} fusion(%pool, %new), kind=kLoop, calls=%written",
        "%rows = bf16[4,8,16,128]{3,1,2,0:T(8,128)(2,1)} fusion(%after, %table), kind=kLoop, calls=%gathered",
        before=IN_PLACE,
    )
    made = account(text)
    page, token = POOL_BYTES // 64, 8 * 8 * 128 * 2
    assert made.read == token + 4 * page + 32
    assert made.written == token + 4 * page * 1
    assert made.makes(64 * 8 * 16 * 128) == ()


def test_a_kernel_over_the_pool_leaves_its_reading_to_a_formula() -> None:
    text = program(
        f"%pool = {POOL} parameter(0)",
        "%new = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)",
        "%q = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} negate(%new)",
        f"%after = {POOL} fusion(%pool, %new), kind=kLoop, calls=%written",
        "%seen = bf16[1,512,16,128]{3,2,1,0:T(8,128)(2,1)} bitcast(%after)",
        "%y = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} custom-call(%q, %seen), "
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/while/body/attention/pallas_call"}',
        before=IN_PLACE,
    )
    made, token = account(text), 8 * 8 * 128 * 2
    assert made.kernels == 1
    assert made.left_out == POOL_BYTES
    # negate, the update of the pool, and the kernel's queries; each is written again.
    assert (made.read, made.written) == (3 * token, 3 * token)


CONTROL = f"""
%cheap (a: ()) -> f32[] {{
  %a = () parameter(0)
  ROOT %c = f32[] constant(0)
}}

%dear (a: bf16[256,512]) -> f32[] {{
  %a = {MATRIX} parameter(0)
  ROOT %r = f32[] reduce(%a), to_apply=%add
}}

%condition (s: (bf16[256,512])) -> pred[] {{
  %s = ({MATRIX}) parameter(0)
  ROOT %t = pred[] constant(true)
}}

%body (s: (bf16[256,512])) -> (bf16[256,512]) {{
  %s = ({MATRIX}) parameter(0)
  %w = {MATRIX} get-tuple-element(%s), index=0
  %r = f32[8]{{0}} reduce(%w), to_apply=%add
  ROOT %t = ({MATRIX}) tuple(%w)
}}
"""


def test_a_loop_counts_as_often_as_it_goes_round() -> None:
    loop = "%l = (bf16[256,512]{1,0}) while(%s), condition=%condition, body=%body"
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    first = f"%s = ({MATRIX}) parameter(0)"
    assert account(program(first, loop, before=CONTROL)).read == MATRIX_BYTES
    five = account(program(first, loop + known, before=CONTROL))
    assert five.read == 5 * MATRIX_BYTES
    assert [each.times for each in five.operations] == [5]
    named = ', metadata={op_name="jit(f)/attention/while"}'
    three = account(program(first, loop + named, before=CONTROL), trips={"attention": 3, "mlp": 7})
    assert three.read == 3 * MATRIX_BYTES
    assert account(program(first, loop + named + known, before=CONTROL), trips={"attention": 3}).read == five.read
    # A prefill that attends in blocks has no other loop: its step is all of it, and not one block.
    text = program(first, loop + named, before=CONTROL)
    assert step_account(text, trips={"attention": 3}).read == three.read
    assert step_account(text, trips={"mlp": 3}).read == MATRIX_BYTES


def test_the_step_of_a_decode_program_is_one_round_of_its_loop() -> None:
    text = program(
        f"%s = ({MATRIX}) parameter(0)",
        f"%w = {MATRIX} parameter(1)",
        f"%before = {MATRIX} copy(%w)",
        '%l = (bf16[256,512]{1,0}) while(%s), condition=%condition, body=%body, metadata={op_name="jit(decode)/while"}',
        before=CONTROL,
    )
    assert (step_account(text).read, step_account(text).written) == (MATRIX_BYTES, 32)
    assert account(text).read == 2 * MATRIX_BYTES
    assert step_account(program(f"%w = {MATRIX} parameter(0)", f"%c = {MATRIX} copy(%w)")).read == MATRIX_BYTES


@pytest.mark.parametrize(("branches", "read"), [(None, 0), ({"sampling": 1}, MATRIX_BYTES), ({"other": 1}, 0)])
def test_a_conditional_takes_the_cheapest_branch_unless_one_is_named(
    branches: dict[str, int] | None, read: int
) -> None:
    text = program(
        "%i = s32[] parameter(0)",
        f"%w = {MATRIX} parameter(1)",
        "%e = () parameter(2)",
        "%c = f32[] conditional(%i, %e, %w), branch_computations={%cheap, %dear}, "
        'metadata={op_name="jit(f)/sampling/cond"}',
        before=CONTROL,
    )
    assert account(text, branches).read == read


def test_communication_is_listed_with_the_bytes_that_it_moves() -> None:
    text = program(
        "%x = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "%r = f32[8,128]{1,0:T(8,128)} all-reduce(%x), channel_id=1, to_apply=%add",
        "%g = (f32[8,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) all-gather-start(%x), dimensions={0}",
        "%d = f32[64,128]{1,0:T(8,128)} all-gather-done(%g)",
    )
    made = account(text)
    assert [each.collective for each in made.collectives] == ["all-reduce", "all-gather"]
    assert (made.read, made.written) == (8 * KB, 4 * KB + 32 * KB)


def test_a_gpus_matrix_product_reads_its_operands_and_writes_its_result() -> None:
    text = program(
        "%x = bf16[8,256]{1,0} parameter(0)",
        "%w = bf16[256,512]{1,0} parameter(1)",
        '%y = (bf16[8,512]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm"',
    )
    made = account(text)
    # The workspace is no result.
    assert (made.read, made.written) == (4 * KB + MATRIX_BYTES, 8 * KB)
    assert made.kernels == 0
