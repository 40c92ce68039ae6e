"""What the host does for one decoder layer's forward and backward pass: launches and torch operations, by number."""

import pytest
import torch

from rlbench_kernels.launch import cdiv, next_power_of_2, use_triton
from tests.kernels.interpreter import IS_INTERPRETED

triton = pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter launches by another class")
def test_launches_and_operations_of_a_layer_pass():
    """Fewer is better: lower the numbers with the code."""
    from benchmarks.bench_host import SMALL, count

    counts = count(16, SMALL, "cpu")

    assert counts["launches"] == {
        "_dequantize": 8, "_norm": 2, "_norm_gradients": 2, "_rotate": 2, "_gate": 1, "_gate_gradients": 1,
        "_write": 4,
    }  # fmt: skip
    operations = counts["operations"]
    assert sum(number for name, number in operations.items() if "mm" in name) == 40  # library matmuls
    writes = {name: operations[f"aten.{name}"] for name in ("copy_.default", "zero_.default", "clone.default")}
    assert writes == {"copy_.default": 4, "zero_.default": 1, "clone.default": 0}
    assert operations["aten.select_backward.default"] == 0  # a fill and a copy each
    of_torch = operations["aten.detach.default"] + operations["aten.alias.default"]  # saved tensors, under a mode
    assert operations.total() - of_torch <= 189


def test_the_backend_is_the_one_that_the_environment_names_now(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for backend, expected in (("triton", True), ("reference", False), ("triton", True), ("auto", False)):
        monkeypatch.setenv("RLBENCH_KERNELS", backend)
        assert use_triton(CPU) == expected
    monkeypatch.setenv("RLBENCH_KERNELS", "fast")
    with pytest.raises(ValueError, match="RLBENCH_KERNELS='fast': expected one of auto, reference, triton"):
        use_triton(CPU)
    monkeypatch.setenv("RLBENCH_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="RLBENCH_KERNELS=triton on cpu: needs the package triton"):
        use_triton(CPU)


def test_host_arithmetic_is_tritons():
    for number in range(1, 300):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        assert [cdiv(number, d) for d in (1, 7, 64)] == [triton.cdiv(number, d) for d in (1, 7, 64)]
    assert cdiv(0, 7) == 0
