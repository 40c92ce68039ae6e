"""Every number of a table of measurements is that of the committed JSON."""

import json
import re
from typing import Any

import pytest

from tests.architecture.test_layout import ROOT

BASE = "shared_base_h200.json"
FRONT = (ROOT / "README.md").read_text()
MEASURED = (ROOT / "scripts" / "README.md").read_text()
KERNELS = (ROOT / "kernels" / "README.md").read_text()
STAGES = (ROOT / "rlbench" / "training" / "README.md").read_text()
COMMANDS = (ROOT / "rlbench" / "commands" / "README.md").read_text()
MOST_DIGITS = 3  # that a number is rounded to where it ends in zeros


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows of a file of results; those of several runs carry their `commit`."""
    (file,) = [folder / name for folder in RESULTS if (folder / name).exists()]
    found = json.loads(file.read_text())
    runs = found.get("runs", [found])
    return [{"commit": run.get("commit", found.get("commit")), **row} for run in runs for row in run["rows"]]


RESULTS = [ROOT / "scripts" / "results", ROOT / "kernels" / "benchmarks" / "results"]


def value(name: str, **wanted: str) -> float:
    (found,) = {r["value"] for r in rows_of(name) if all(r.get(key) == value for key, value in wanted.items())}
    return found


def table(page: str, head: str) -> dict[str, list[str]]:
    """Cells of the table that begins with `head`, by the first cell of each row that is not empty above it."""
    assert page.count(f"\n{head}") == 1, head
    lines = page.split(f"\n{head}")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def agrees(shown: str, measured: float) -> bool:
    """The number is the measured one, rounded as it is shown."""
    digits = shown.replace(",", "")
    zeros = len(digits) - len(digits.rstrip("0")) if "." not in digits else 0
    decimals = len(digits.partition(".")[2])
    unit = 10.0 ** (min(zeros, max(0, len(digits) - MOST_DIGITS)) - decimals)
    return abs(float(digits) - measured) <= unit / 2 * (1 + 1e-9)


def check(cells: list[str], measured: list[float | None]) -> None:
    """Each number in the cells is the measured one at its place; None stands for an empty cell."""
    shown = [number for cell in cells for number in re.findall(r"\d[\d,.]*", cell) or [None]]
    assert len(shown) == len(measured), (shown, measured)
    wrong = [
        (text, number)
        for text, number in zip(shown, measured, strict=True)
        if (text is None) != (number is None) or (text and number is not None and not agrees(text, number))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("shown", "measured", "is_so"),
    [("21,650", 21652, True), ("21,650", 21656, False), ("4,000", 4001.8, True), ("4,000", 4010, False)]
    + [
        ("5.3", 5.26, True),
        ("5.3", 5.24, False),
        ("45.0", 44.99, True),
        ("0.95", 0.9449, False),
        ("512", 512.13, True),
    ],
)
def test_a_number_agrees_as_far_as_it_is_written(shown, measured, is_so):
    assert agrees(shown, measured) == is_so


@pytest.mark.parametrize(
    ("label", "impl"),
    [
        ("rlbench, NF4 base, dense copies of it", "rlbench"),
        ("unsloth 2026.10.9, `fast_inference`, NF4 base", "unsloth"),
        ("TRL 1.15 with vLLM colocated, PEFT and Liger, bf16 base", "trl"),
    ],
)
def test_whole_steps_of_the_8b_shape(label, impl):
    case = {"case": "llama-3.1-8b, nf4", "impl": impl}
    found = [value("grpo_h200.json", metric=metric, **case) for metric in ("step", "generation", "device")]

    check(
        table(MEASURED, "| a whole step | s | of it generation | GiB of the device |")[label],
        [*found[:2], found[2] / 1024],
    )


@pytest.mark.parametrize(
    ("label", "impl", "file", "base"),
    [
        ("rlbench, NF4 base", "rlbench", "grpo_qwen_h200.json", "nf4"),
        ("unsloth, NF4 base", "unsloth", "grpo_qwen_h200.json", "nf4"),
        ("TRL with vLLM colocated, bf16 base", "trl", "grpo_qwen_h200.json", "nf4"),
        ("rlbench, bf16 base", "rlbench", "grpo_qwen_bf16_h200.json", "none"),
        ("unsloth, bf16 base", "unsloth", "grpo_qwen_bf16_h200.json", "none"),
        ("TRL with vLLM colocated, bf16 base, another day", "trl", "grpo_qwen_bf16_h200.json", "none"),
    ],
)
def test_whole_steps_of_the_qwen_shape(label, impl, file, base):
    def measured(metric: str) -> float | None:
        case = {"case": f"qwen2.5-1.5b, {base}", "impl": impl, "metric": metric}
        has_it = any(all(r.get(key) == v for key, v in case.items()) for r in rows_of(file))
        return value(file, **case) if has_it else None

    gap = "logprob gap of sampled tokens, engine to trainer, mean"
    device = measured("device")
    assert device is not None

    check(
        table(MEASURED, "| a whole step | s | of it generation | update |")[label],
        [
            measured("step"),
            measured("generation"),
            measured("update"),
            device / 1024,
            measured(gap) or measured(f"step 2, {gap}"),
        ],
    )


@pytest.mark.parametrize(
    ("label", "file", "case", "impls"),
    [
        ("Llama-3.1-8B shape, NF4 base", "grpo_h200.json", "llama-3.1-8b, nf4", ["rlbench", "unsloth", "trl"]),
        ("Qwen2.5-1.5B shape, NF4 base", "grpo_qwen_h200.json", "qwen2.5-1.5b, nf4", ["rlbench", "unsloth", "trl"]),
        (
            "Qwen2.5-1.5B shape, bf16 base",
            "grpo_qwen_bf16_h200.json",
            "qwen2.5-1.5b, none",
            ["rlbench", "unsloth", "trl"],
        ),
    ],
)
def test_whole_steps_on_the_front_page(label, file, case, impls):
    cells = table(FRONT, "| seconds (GiB of the device) |")[label]
    for cell, impl in zip(cells, impls, strict=True):
        row = {"case": case, "impl": impl}
        measured = (value(file, metric="step", **row), value(file, metric="device", **row) / 1024) if impl else (None,)
        check([cell.removesuffix(", bf16 base")], list(measured))


@pytest.mark.parametrize(
    ("label", "case", "impl", "metrics"),
    [
        ("rlbench, NF4 base", "nf4", "rlbench", ["vLLM alone", "engine and trainer"]),
        ("rlbench, FP8 base", "fp8", "rlbench", ["vLLM alone", "engine and trainer"]),
        ("rlbench, bf16 base", "none", "rlbench", ["vLLM alone", "engine and trainer"]),
        ("vLLM 0.26 alone with a LoRA of the same size, NF4 base", "nf4", "vllm", ["engine alone", None]),
        ("unsloth 2026.10.9, `fast_inference`, NF4 base", "nf4", "unsloth", [None, "engine and trainer"]),
        ("TRL 1.15 with vLLM colocated, bf16 base", "none", "trl", [None, "engine and trainer"]),
    ],
)
def test_memory_of_engine_and_trainer(label, case, impl, metrics):
    row = {"case": f"llama-3.1-8b, {case}", "impl": impl}
    found = [value(BASE, metric=f"{metric}, less KV", **row) if metric else None for metric in metrics]

    check(table(MEASURED, "| MiB of the device | engine | engine and trainer |")[label], found)


AUTO, MLP, FULL = "rlbench:auto@8192", "rlbench:mlp+offload@8192", "rlbench:full+offload@8192"
LONG, LONG_FULL = "rlbench:auto@16384", "rlbench:full+offload@16384"
STEPS = [
    ("| | completion tokens/s |", "rlbench, nothing recomputed (`auto`)", "grpo", AUTO, "a5a6e04"),
    ("| | completion tokens/s |", "rlbench, `mlp`, offload", "grpo", MLP, "a5a6e04"),
    ("| | completion tokens/s |", "unsloth 2026.10.9, its checkpointing", "grpo", "unsloth:unsloth", "a5a6e04"),
    ("| | completion tokens/s |", "TRL 1.15 with PEFT, Liger and gradient checkpointing", "grpo", "trl:on", "a5a6e04"),
    ("| | tokens/s |", "rlbench, nothing recomputed (`auto`)", "dense", AUTO, "a5a6e04"),
    ("| | tokens/s |", "rlbench, `mlp`, offload", "dense", MLP, "a5a6e04"),
    ("| | tokens/s |", "rlbench, nothing recomputed, 2b3ece0", "dense", AUTO, "2b3ece0"),
    ("| | tokens/s |", "rlbench, `mlp`, offload, 2b3ece0", "dense", MLP, "2b3ece0"),
    ("| | tokens/s |", "rlbench, `full`, offload, 2b3ece0", "dense", FULL, "2b3ece0"),
    ("| | tokens/s |", "unsloth 2026.10.9, its checkpointing", "dense", "unsloth:unsloth", "2b3ece0"),
]


@pytest.mark.parametrize(("head", "label", "batch", "impl", "commit"), STEPS)
def test_one_step(head, label, batch, impl, commit):
    row = {"case": f"{batch}, llama-3.1-8b, nf4", "impl": impl, "commit": commit}

    check(
        table(MEASURED, head)[label], [value("step_h100.json", metric=metric, **row) for metric in ("tokens", "peak")]
    )


@pytest.mark.parametrize(
    ("label", "impl"),
    [
        ("`auto` (two layers recomputed), FlashAttention 4", LONG),
        ("`auto`, torch's flash attention", f"{LONG}/flash"),
        ("`full`, offload, FlashAttention 4", LONG_FULL),
    ],
)
def test_one_long_sequence(label, impl):
    row = {"case": "long, qwen3-4b, none", "impl": impl, "commit": "04a4f07"}
    found = [value("step_h100.json", metric=metric, **row) for metric in ("step", "peak")]

    check(table(MEASURED, "| | seconds | peak MiB |")[label], [found[0] / 1e3, found[1]])


def test_memory_of_one_step():
    cells = list(table(MEASURED, "| | peak MiB |").values())
    rows = [("grpo", FULL), ("ppo", FULL), ("dpo", FULL), ("dpo", "trl:on")]

    for cell, (batch, impl) in zip(cells, rows, strict=True):
        row = {"case": f"{batch}, llama-3.1-8b, nf4", "impl": impl, "commit": "4a235e1", "metric": "peak"}
        check(cell, [value("step_h100.json", **row)])


def shares(rows: list[dict[str, Any]], stage: str, metric: str) -> str:
    found = {row["metric"]: row["value"] for row in rows if row["stage"] == stage}
    mean, low, high = (100 * found[f"eval/{metric}{end}"] for end in ("", "_low", "_high"))
    return f"{mean:.1f}% ({low:.1f} to {high:.1f})"


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_before_and_after_grpo(seed):
    found = json.loads((RESULTS[0] / "gsm8k_h200.json").read_text())["runs"][seed]["rows"]
    change = shares(found, "after grpo", "sampled_change").replace("%", " points")
    part = MEASURED.split("| | seed | after fine-tuning |")[1].split("\n\n")[0]
    lines = [line for line in part.splitlines() if re.match(rf"\|[^|]*\| {seed} \|", line)]

    for line, metric in zip(lines, ("sampled_accuracy", "pass_at_8", "accuracy"), strict=True):
        assert f"| {shares(found, 'after sft', metric)} | {shares(found, 'after grpo', metric)} |" in line
    assert f"| +{change} |" in lines[0]


def test_speed_on_a_cpu():
    rows = table(MEASURED, "| measured on 2 cores of AMD EPYC")
    generation, step = [cells[0] for cells in rows.values()]
    ratio = {"impl": "rlbench-hf", "metric": "ratio to transformers.generate"}
    times = [value("generation_cpu.json", case=f"{case}, best dtype", **ratio) for case in ("base", "lora")]
    rate = value("generation_cpu.json", case="base, bfloat16", impl="rlbench-hf", metric="generation")
    speed_up = value("step_cpu.json", case="best dtype", metric="speed-up")
    gap = value("step_cpu.json", case="float32 adapter gradient", impl="rlbench")

    check([generation], [times[0], rate, times[1]])
    assert agrees(step.split()[0], speed_up) and f"differ by {gap:.0e}".replace("e-0", "e-") in step


@pytest.mark.parametrize("model", ["Llama-3.1-8B", "Qwen2.5-7B"])
@pytest.mark.parametrize(
    ("label", "impl"),
    [
        ("matmuls alone", "two_matmuls"),
        ("rlbench, `linear_token_loss`", "rlbench"),
        ("rlbench, `linear_logprobs`", "rlbench_logprobs"),
        ('rlbench, `grad="sparse"`', "rlbench_sparse"),
        ("unsloth_zoo 2026.10.9", "unsloth_zoo"),
        ("Liger 0.8.5 (mean loss only)", "liger"),
        ("TRL 1.15", "trl"),
        ("torch.compile, chunks", "compile"),
        ("cut-cross-entropy", "cce"),
    ],
)
def test_fused_logprobs(label, impl, model):
    def measured(size: int, metric: str, of: str = impl) -> float:
        return value("linear_logprobs_h200.json", case=f"{model} N={size} llm", impl=of, metric=metric)

    cells = table(KERNELS, f"| {model} | N=8192 | N=16384 |")[label]
    places = [(8192, "forward_backward"), (16384, "forward_backward"), (8192, "no_grad"), (16384, "no_grad")]
    for cell, place in zip(cells, places, strict=False):
        time, alone = measured(*place), measured(*place, "two_matmuls")
        check([cell], [None] if not cell else [time, time / alone] if "(" in cell else [time])
    check(cells[4:], [measured(16384, "extra_memory") if cells[4] else None])


@pytest.mark.parametrize(
    ("label", "op"),
    [
        ("RMSNorm", "rms_norm"),
        ("addition + RMSNorm", "add_rms_norm"),
        ("SwiGLU", "swiglu"),
        ("RoPE", "rope"),
        ("logprobs of logits", "logprobs"),
    ],
)
def test_elementwise_kernels(label, op):
    cells = table(KERNELS, "| | rlbench | Liger | unsloth | TRL |")[label]
    for cell, impl in zip(cells, ("rlbench", "liger", "unsloth", "trl", "compile"), strict=True):
        row = {"case": f"Llama-3.1-8B {op}", "impl": impl}
        metrics = [f"{direction}/copy_frac" for direction in ("forward", "backward")]
        check([cell], [value("elementwise_h200.json", metric=m, **row) for m in metrics] if cell else [None])


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("NF4", "nf4"),
        ("FP8, a scale a row", "fp8"),
        ("FP8, padded rows", "fp8_padded"),
        ("FP8, a scale a matrix", "fp8_tensor"),
    ],
)
def test_dequantisation(label, kind):
    cells = table(KERNELS, "| | rlbench | bitsandbytes | torch.compile |")[label]
    for cell, impl in zip(cells, ("rlbench", "bitsandbytes", "compile"), strict=True):
        row = {"case": f"Llama-3.1-8B {kind}", "impl": impl, "metric": "layer/copy_frac"}
        check([cell], [value("dequantise_h200.json", **row)] if cell else [None])


def test_packed_attention():
    impls = ["rlbench:flash4", "rlbench:flash", "unshared:flash4", "unshared:flash", "sdpa_padded"]
    for label, cells in table(KERNELS, "| 4 groups | shared, FA 4 |").items():
        case = label.replace("one sequence of 16,384", "prompt 384, 1 completions of 16000 to 16000")
        row = {"case": case, "metric": "forward_backward"}
        check(cells, [value("packed_attention_h100.json", impl=impl, **row) for impl in impls])


def test_lora_layers():
    for label, cells in table(KERNELS, "| | rlbench | unsloth | PEFT |").items():
        case = label.replace(",", "").replace("NF4", "nf4")
        for cell, impl in zip(cells, ("rlbench", "unsloth", "peft", "matmuls"), strict=True):
            parts = [f"{case} N=8192 {part}" for part in ("qkv", "o", "mlp")] if cell else []
            row = {"impl": impl, "metric": "forward_backward"}
            check([cell], [sum(value("lora_nf4_h200.json", case=p, **row) for p in parts)] if cell else [None])


GAP, GAPS, FLOAT32 = "gap_h200.json", "qwen2.5-1.5b, none", "transformers, float32"
CAP, OVERLAP = "grpo_cap22_h200.json", "overlap_h200.json"
ALONE, TOGETHER = "llama-3.1-8b, nf4, copies merged, {} sequences", ", switch interval 5 ms"
COPIES, SCHEDULER, CONTEXT = "dense_copies_h200.json", "scheduler_h200.json", "context_h200.json"
PLAN, STATE = "plan_h200.json", "optimizer_state_cpu.json"
NF4, DPO = "llama-3.1-8b, nf4", "llama-3.1-8b, nf4, DPO, rows of"
DRAWN, TOKEN = "256 completions of drawn lengths", "256 sequences"
RATE = "generation with adapter, 256 x 256 tokens, a seed a sample"
PEAK, LINE = "peak, at most", "longest completion in {} GiB, by the line"
ALL_WEIGHTS = "SmolLM2-135M's shape, all weights"
SHORT = ", completions of 512"


def planned(*cases: str) -> list[tuple[str, str, str, str, float]]:
    """Planned and measured peak of each case."""
    return [(PLAN, case, *place, 1) for case in cases for place in (("plan", PEAK), ("run", "peak"))]


SENTENCES = [  # what the prose says, and where each number in brackets is: file, case, impl, metric, scale
    (
        r"at most, 8B shape on an NF4 base, one H200: ([\d.]+) s, against ([\d.]+) s with copies",
        [(COPIES, NF4, f"rlbench, dense_copies={kind}", DRAWN, 1) for kind in ("merged", "base")],
    ),
    (
        r"a token at 256 sequences takes ([\d.]+) ms, ([\d.]+), and ([\d.]+) without copies",
        [(COPIES, NF4, f"rlbench, dense_copies={kind}", TOKEN, 1) for kind in ("merged", "base", "none")],
    ),
    (
        r"step took ([\d.]+) s, of which generation ([\d.]+) \(32 sequences at a time, no dense copies\) and the "
        r"update ([\d.]+); torch allocated ([\d.]+) GiB at most, and the device showed ([\d.]+) GiB",
        [(CAP, NF4, "rlbench", m, 1) for m in ("step", "generation", "update")]
        + [(CAP, NF4, "rlbench", m, 1024) for m in ("engine and trainer, allocated", "device, sampled every 5 s")],
    ),
    (
        r"vLLM is ([\d.]+) away while it samples and ([\d.]+) when it reads the same tokens as a prompt, transformers "
        r"([\d.]+), rlbench's trainer ([\d.]+)\. vLLM is ([\d.]+) away from itself",
        [
            (GAP, GAPS, impl, f"gap to {FLOAT32}", 1)
            for impl in ("vLLM, sampling", "vLLM, as a prompt", "transformers, bfloat16", "trainer, adapter of zeros")
        ]
        + [(GAP, GAPS, "vLLM, sampling", "gap to vLLM, as a prompt", 1)],
    ),
    (
        r"as near as transformers \(([\d.]+) and ([\d.]+), random tokens\), with one of zeros ([\d.]+):",
        [
            (GAP, f"{GAPS}, 32 sequences of random tokens", impl, f"gap to {FLOAT32}", 1)
            for impl in ("trainer, no adapter", "transformers, bfloat16", "trainer, adapter of zeros")
        ],
    ),
    (
        r"copied between them, in ([\d.]+) ms for the shape of Llama-3.1-8B",
        [(BASE, NF4, "rlbench", "adapter copy into the engine", 1)],
    ),
    (r"as on a card of 24 GiB, it took (\d+) s, at", [(CAP, NF4, "rlbench", "step", 1)]),
    (
        r"makes ([\d.]+) s of generation where it gives ([\d.]+) for 32",
        [("simulate_seqs.json", "mean 800, as bench_grpo.py", f"{n} sequences", "generation", 1) for n in (128, 32)],
    ),
    (
        r"both took ([\d.]+)%, ([\d.]+)% and ([\d.]+)% less time",
        [(OVERLAP, ALONE.format(n) + TOGETHER, "together", "saved", 0.01) for n in (64, 24, 8)],
    ),
    (
        r"a token ([\d.]+), ([\d.]+) and ([\d.]+) ms instead of ([\d.]+), ([\d.]+) and ([\d.]+) \(",
        [(OVERLAP, ALONE.format(n) + TOGETHER, "together", "sampling", 1) for n in (64, 24, 8)]
        + [(OVERLAP, ALONE.format(n), "one after the other", "sampling", 1) for n in (64, 24, 8)],
    ),
    (
        r"copied into the engine in ([\d.]+) ms \(over bf16, before it was one launch, ([\d.]+) ms\), (\d+) ms with "
        r"both fingerprints; keys and values are given back in (\d+) ms and taken again in (\d+) ms",
        [(BASE, case, "rlbench", "adapter copy into the engine", 1) for case in (NF4, "llama-3.1-8b, none")]
        + [(BASE, NF4, "rlbench", m, 1) for m in ("whole sync with fingerprint", "sleep", "wake with canary")],
    ),
    (
        r"come at ([\d,]+) tokens/s, where vLLM with a LoRA from a folder makes ([\d,]+); over FP8 at ([\d,]+)\.",
        [
            (BASE, f"llama-3.1-8b, {q}", i, RATE, 1)
            for q, i in (("nf4", "rlbench"), ("nf4", "vllm"), ("fp8", "rlbench"))
        ],
    ),
    (
        r"take ([\d.]+) ms of the host's time at 256 sequences, ([\d.]+) at 64",
        [(SCHEDULER, f"{count} sequences", "vllm", "all", 1) for count in (256, 64)],
    ),
    (
        r"makes the same batch in ([\d.]+) and ([\d.]+) ms",
        [(SCHEDULER, f"{count} sequences", "rlbench", "all", 1) for count in (256, 64)],
    ),
    (
        r"takes (\d+) KiB more, so ([\d,]+) tokens fit in 24 GiB and ([\d,]+) in 80",
        [
            (CONTEXT, NF4, "rlbench:full+offload@1", m, 1)
            for m in ("peak a token more", LINE.format(24), LINE.format(80))
        ],
    ),
    (
        r"it has run with 65,536, in ([\d.]+) GiB",
        [(CONTEXT, f"one@65536, {NF4}", "rlbench:full+offload@1", "peak", 1024)],
    ),
    (
        r"took ([\d.]+) MiB a token more, which gives ([\d,]+) and ([\d,]+) tokens",
        [
            (CONTEXT, NF4, "unsloth:unsloth", "peak a token more", 1024),
            (CONTEXT, NF4, "unsloth:unsloth", LINE.format(24), 1),
            (CONTEXT, NF4, "unsloth:unsloth", LINE.format(80), 1),
        ],
    ),
    (
        r"in NF4, DPO ([\d.]+) and ([\d.]+) GiB, ([\d.]+) and ([\d.]+) without offload, ([\d.]+) and ([\d.]+) with "
        r"rows of 6,000 tokens, PPO ([\d.]+) and ([\d.]+); in FP8, GRPO ([\d.]+) and ([\d.]+)\.",
        planned(
            f"{DPO} 1,000",
            f"{DPO} 1,000, no offload",
            f"{DPO} 6,000",
            f"{NF4}, PPO{SHORT}",
            f"llama-3.1-8b, fp8, GRPO{SHORT}",
        ),
    ),
    (
        r"fine-tuning ([\d.]+) and ([\d.]+), DPO ([\d.]+) and ([\d.]+), PPO ([\d.]+) and ([\d.]+); GRPO in NF4 "
        r"([\d.]+) and ([\d.]+), in FP8 ([\d.]+) and ([\d.]+)\.",
        planned(
            "qwen2.5-1.5b, none, SFT, rows of 6,000",
            "qwen2.5-1.5b, none, DPO, rows of 1,000",
            f"qwen2.5-1.5b, none, PPO{SHORT}",
            f"qwen2.5-1.5b, nf4, GRPO{SHORT}",
            f"qwen2.5-1.5b, fp8, GRPO{SHORT}",
        ),
    ),
    (r"GRPO of the 8B shape in NF4, ([\d.]+) and ([\d.]+)\.", planned(f"{NF4}, GRPO{SHORT}")),
    (
        r"takes ([\d,]+) MB with `adamw`, (\d+) with `muon`, (\d+) with `galore`, (\d+) with `adamw_8bit` and (\d+)",
        [
            (STATE, ALL_WEIGHTS, f"optim={name}", "state", 1)
            for name in ("adamw", "muon", "galore", "adamw_8bit", "galore_8bit")
        ],
    ),
    (
        r"soak_kills.py`, (\d+) kills of (\d+) kinds of run, (\d+) files that differ",
        [("kills_cpu.json", "all", "rlbench", m, 1) for m in ("kills", "kinds", "files that differ")],
    ),
]


@pytest.mark.parametrize(("sentence", "places"), SENTENCES, ids=[sentence[:40] for sentence, _ in SENTENCES])
def test_a_sentence_has_the_numbers_of_its_file(sentence, places):
    (found,) = re.findall(sentence, " ".join((FRONT + MEASURED + STAGES + COMMANDS).split()))
    measured = [value(file, case=case, impl=impl, metric=m) / scale for file, case, impl, m, scale in places]

    check([found] if isinstance(found, str) else list(found), measured)
