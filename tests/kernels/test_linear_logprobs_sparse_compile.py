"""The kernels of the sparse gradient compiled for a Hopper GPU, on a machine without one."""

import importlib
import re

import pytest

from tests.kernels.interpreter import on_cpu

MAX_SHARED_BYTES = 227 * 1024  # of one program
E, SUMS, COUNTS = "*bf16", "*fp32", "*i32"
SIZES = {name: "i32" for name in ("block_rows", "stride", "kept_stride", "limit", "width")}
POINTERS = {
    "_move_references": {"values": E, "corrections": SUMS},
    "_split_columns": {
        "values": E, "thresholds": SUMS, "inverse_totals": SUMS, "shares": SUMS, "marks": "*u8",
        "sums": COUNTS, "q": E, "tails": SUMS,
    },
    "_list_columns": {"marks": "*u8", "ends": COUNTS, "counts": COUNTS, "columns": COUNTS},
    "_copy_kept": {"values": E, "columns": COUNTS, "counts": COUNTS, "inverse_totals": SUMS, "kept": E},
    "_multiply_gathered": {"kept": E, "columns": COUNTS, "weight": E, "counts": COUNTS, "accumulator": SUMS},
    "_combine": {
        "out": E, "accumulator": SUMS, "vectors": SUMS, "weight": E, "targets": "*i64", "terms": SUMS, "owners": "*i64",
    },
}  # fmt: skip


def compiled(name, launch, **constants):
    """As `launch` compiles it for the head of Llama-3.1-8B: all but the number of rows divisible by 16."""
    compiler = importlib.import_module("triton.compiler")
    backends = importlib.import_module("triton.backends.compiler")
    module = importlib.import_module("rlbench_kernels.linear_logprobs_sparse_triton")
    kernel = getattr(module, name)
    names = kernel.arg_names
    types = {"rows": "i32", **SIZES, **POINTERS[name], **dict.fromkeys(constants, "constexpr")}
    divisible = [n for n in names if n not in constants and n not in ("rows", "limit")]
    source = compiler.ASTSource(
        kernel,
        {n: types[n] for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    found = importlib.import_module("triton").compile(source, target=backends.GPUTarget("cuda", 90, 32), options=launch)
    assert found.metadata.shared <= MAX_SHARED_BYTES
    return found.asm["ptx"]


@pytest.fixture
def module():
    return importlib.import_module("rlbench_kernels.linear_logprobs_sparse_triton")


@on_cpu
def test_the_gathered_matmul_has_16_byte_copies_in_flight_beside_the_matrix_units(module):
    ptx = compiled(
        "_multiply_gathered", module._LAUNCH, row_tiles=1, D=4096, BLOCK_M=module._BLOCK_M, BLOCK_N=module._BLOCK_N,
        BLOCK_K=module._BLOCK_K,
    )  # fmt: skip
    loop = ptx[ptx.index("wgmma.mma_async") :]
    assert "cp.async.cg.shared.global" in loop and "0x10" in loop and "ld.global" not in loop


@on_cpu
def test_the_pass_over_e_reads_16_bytes_at_a_time_and_adds_in_one_order(module):
    ptx = compiled("_split_columns", module._PASS, ROWS=module._ROWS, COLUMNS=module._COLUMNS)
    assert "ld.global.v4.b32" in ptx and not re.search(r"\b(atom|red)\.global", ptx)


@on_cpu
def test_the_smaller_passes_compile(module):
    pass_over_e = {"ROWS": module._ROWS, "COLUMNS": module._COLUMNS}
    assert "st.global" in compiled("_move_references", module._PASS, **pass_over_e)
    assert "st.global" in compiled("_list_columns", {"num_warps": 1}, COLUMNS=module._COLUMNS)
    sizes = {"ROWS": module._ROWS, "BLOCK_K": module._BLOCK_K, "row_tiles": 4}
    assert "st.global" in compiled("_copy_kept", {"num_warps": 4}, **sizes)


@on_cpu
@pytest.mark.parametrize("has_tail", [False, True])
def test_the_last_pass_compiles(has_tail, module):
    constants = {"D": 4096, "BLOCK_D": module._BLOCK_D, "HAS_TAIL": has_tail}
    if not has_tail:
        constants |= {"vectors": None, "owners": None}
    assert "st.global" in compiled("_combine", {}, **constants)
