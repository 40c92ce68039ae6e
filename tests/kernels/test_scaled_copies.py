"""Many matrices copied in one launch: the bits of one product each, nothing beside the targets, no old places."""

import pytest
import torch

from rlbench_kernels import ScaledCopies
from tests.kernels.interpreter import IS_INTERPRETED, on_cpu, rounded, run_interpreted

DEVICES = [
    pytest.param("cpu", id="reference" if not IS_INTERPRETED else "interpreted"),
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]),
]  # fmt: skip
SHAPES = [(16, 300), (8, 1), (5000, 16), (1, 1), (3, 2049)]
FACTORS = [1.0, 0.7, 2.0, -3.3, 1.0]


@on_cpu
def test_kernel_under_the_interpreter():
    run_interpreted(__file__)


def matrices(device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in SHAPES]


def wide_buffers(device, dtype):
    """Buffers with room around every target: rows of more columns, more rows."""
    return [torch.full((rows + 2, columns + 3), 7.0, dtype=dtype, device=device) for rows, columns in SHAPES]


def inner(buffers):
    return [buffer[:rows, :columns] for buffer, (rows, columns) in zip(buffers, SHAPES, strict=True)]


def expected(sources, dtype):
    return [rounded((source.float() * factor).cpu(), dtype) for source, factor in zip(sources, FACTORS, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_of_products_one_by_one_and_nothing_beside_them(device, source, target):
    buffers = wide_buffers(device, target)
    copies = ScaledCopies(inner(buffers), FACTORS)
    for seed in (0, 1):  # the same places again, and others
        sources = matrices(device, source, seed)
        copies(sources)

        for found, values, buffer in zip(inner(buffers), expected(sources, target), buffers, strict=True):
            rows, columns = values.shape
            assert torch.equal(found.cpu(), values)
            assert (buffer[rows:] == 7.0).all() and (buffer[:, columns:] == 7.0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_new_values_at_the_same_places_and_new_places(device):
    targets = [torch.empty(shape, device=device) for shape in SHAPES]
    copies = ScaledCopies(targets, FACTORS)
    sources = matrices(device)
    copies(sources)
    for tensor in sources:
        tensor.mul_(2)
    copies(sources)
    assert all(map(torch.equal, [t.cpu() for t in targets], expected(sources, torch.float32)))

    sources[2] = torch.ones_like(sources[2])  # one of them lies elsewhere now
    copies(sources)
    assert all(map(torch.equal, [t.cpu() for t in targets], expected(sources, torch.float32)))


@pytest.mark.parametrize("device", DEVICES)
def test_another_room_each_time(device):
    sources = matrices(device)
    size = sum(source.numel() for source in sources) + 10
    rooms = [torch.full((size,), 7.0, dtype=torch.bfloat16, device=device) for _ in range(2)]

    def targets(room):
        starts = [5, *(5 + torch.tensor([s.numel() for s in sources]).cumsum(0)).tolist()]
        return [room[start : start + s.numel()].view(s.shape) for start, s in zip(starts, sources, strict=False)]

    copies = ScaledCopies(targets(rooms[0]), FACTORS, rooms[0])
    for room in (rooms[1], rooms[0]):
        copies(sources, room)
        for found, again, values in zip(
            targets(room), copies.targets(room), expected(sources, torch.bfloat16), strict=True
        ):
            assert torch.equal(found.cpu(), values) and found.data_ptr() == again.data_ptr()
        assert (room[:5] == 7.0).all() and (room[-5:] == 7.0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_one_launch_does_not_take_is_copied_too(device):
    """Sources of two dtypes, with gaps, or on another device."""
    targets = [torch.empty(shape, dtype=torch.float32, device=device) for shape in SHAPES]
    copies = ScaledCopies(targets, FACTORS)
    mixed = matrices(device)
    mixed[0] = mixed[0].bfloat16()
    mixed[2] = mixed[2].T.contiguous().T
    for sources in (mixed, matrices("cpu")):
        copies(sources)
        assert all(map(torch.equal, [t.cpu() for t in targets], expected(sources, torch.float32)))


def test_nothing_to_copy():
    ScaledCopies([], [])([])
    ScaledCopies([torch.empty(0, 3)], [1.0])([torch.empty(0, 3)])


def test_refusals():
    with pytest.raises(ValueError, match=r"target 1: a matrix with unit stride .* got \[3, 2\]"):
        ScaledCopies([torch.empty(2, 2), torch.empty(2, 3).T], [1.0, 1.0])
    with pytest.raises(ValueError, match="factors: one for each of 1 targets expected, got 2"):
        ScaledCopies([torch.empty(2, 2)], [1.0, 1.0])
    copies = ScaledCopies([torch.empty(2, 2)], [1.0])
    with pytest.raises(ValueError, match=r"sources: shape \(2, 2\) expected, got \(4, 1\)"):
        copies([torch.empty(4, 1)])
    with pytest.raises(ValueError, match="sources: 1 matrices expected, got 2"):
        copies([torch.empty(2, 2), torch.empty(2, 2)])
    with pytest.raises(ValueError, match=r"room: None .* expected"):
        copies([torch.empty(2, 2)], torch.empty(4))
    room = torch.empty(4)
    copies = ScaledCopies([room.view(2, 2)], [1.0], room)
    with pytest.raises(ValueError, match=r"room: .* got None"):
        copies([torch.empty(2, 2)])
    with pytest.raises(ValueError, match="room: .* expected; got"):
        copies([torch.empty(2, 2)], torch.empty(5))
