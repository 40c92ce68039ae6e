"""Where one update's time and memory went: torch's profiler, its trace, and a table by component.

A component is what autograd sees: a fused function of `rlbench_kernels` or an operator, in the forward or the backward
pass, and the optimizer. What is computed again in the backward pass belongs to the function that does it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BACKWARD = "autograd::engine::evaluate_function: "
_OPTIMIZER = "Optimizer.step#"
_PASSES = ("forward", "backward", "optimizer")
_MOST_ROWS = 40
MIB = 2**20


@dataclass(slots=True)
class Component:
    """Sums over the calls of one component, everything that it calls included."""

    part: str  # forward | backward | optimizer
    name: str
    num_calls: int = 0
    device_s: float = 0.0  # on a GPU; 0 on a CPU
    host_s: float = 0.0
    kept_mib: float = 0.0  # allocated less freed: what the component left behind, or (below 0) gave back

    def seconds(self, *, is_on_gpu: bool) -> float:
        return self.device_s if is_on_gpu else self.host_s


@contextmanager
def profiled(folder: Path, name: str, profile: str, announce: Callable[[str], None]) -> Iterator[None]:
    """Profile the block and leave `<name>.trace.json.gz` (for chrome://tracing or Perfetto) and `<name>.txt`.

    Args:
        folder: made if absent.
        name: of the files.
        profile: hardware.profile, cpu or gpu.
        announce: says where the files are.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    is_on_gpu = profile == "gpu"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_on_gpu else [])
    with profiler(activities=activities, profile_memory=True) as found:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(folder / f"{name}.trace.json.gz"))
    table = component_table(components(found.events() or []), is_on_gpu=is_on_gpu)
    order = "self_device_time_total" if is_on_gpu else "self_cpu_time_total"
    operators = found.key_averages().table(sort_by=order, row_limit=_MOST_ROWS, max_name_column_width=80)
    (folder / f"{name}.txt").write_text(f"{table}\n\n{operators}\n")
    announce(f"profile of {name}: {folder / f'{name}.txt'}, trace beside it; the step was slower for it")


def components(events: Iterable[Any]) -> list[Component]:
    """Sums by component, in the order of the passes.

    Args:
        events: torch.autograd.profiler_util.FunctionEvent; those inside of another on their thread belong to it.
    """
    found: dict[tuple[str, str], Component] = {}
    for event in events:
        if event.cpu_parent is not None or event.is_async or "CPU" not in str(event.device_type):
            continue
        part, name = _place(event.name)
        component = found.setdefault((part, name), Component(part, name))
        component.num_calls += 1
        component.device_s += event.device_time_total / 1e6
        component.host_s += event.cpu_time_total / 1e6
        component.kept_mib += (event.device_memory_usage or event.cpu_memory_usage) / MIB
    return sorted(found.values(), key=lambda c: (_PASSES.index(c.part), c.name))


def _place(name: str) -> tuple[str, str]:
    if name.startswith(_BACKWARD):
        return "backward", name.removeprefix(_BACKWARD)
    if name.startswith(_OPTIMIZER):
        return "optimizer", name.removeprefix(_OPTIMIZER)
    return "forward", name


def component_table(found: Iterable[Component], *, is_on_gpu: bool) -> str:
    """Passes with their sums, under each its components that take at least 0.5% of the time."""
    found = list(found)
    by_pass: dict[str, list[Component]] = defaultdict(list)
    for component in found:
        by_pass[component.part].append(component)
    total = sum(c.seconds(is_on_gpu=is_on_gpu) for c in found) or 1.0
    lines = [f"{'component':44} {'time':>10} {'share':>7} {'calls':>7} {'host':>10} {'kept MiB':>10}"]

    def line(name: str, parts: list[Component]) -> str:
        seconds = sum(c.seconds(is_on_gpu=is_on_gpu) for c in parts)
        calls, host, kept = (
            sum(c.num_calls for c in parts),
            sum(c.host_s for c in parts),
            sum(c.kept_mib for c in parts),
        )
        return (
            f"{name:44.44} {1e3 * seconds:7.1f} ms {seconds / total:7.1%} {calls:7} {1e3 * host:7.1f} ms {kept:10.1f}"
        )

    for part in (name for name in _PASSES if by_pass[name]):
        lines.append(line(part, by_pass[part]))
        ordered = sorted(by_pass[part], key=lambda c: -c.seconds(is_on_gpu=is_on_gpu))
        shown = [c for c in ordered if c.seconds(is_on_gpu=is_on_gpu) >= 0.005 * total]
        lines += [line(f"  {c.name}", [c]) for c in shown]
        if rest := [c for c in ordered if c not in shown]:
            lines.append(line(f"  {len(rest)} others", rest))
    return "\n".join(lines)
