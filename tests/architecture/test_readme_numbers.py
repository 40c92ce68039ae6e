"""Every number of a table of measurements is that of the committed JSON."""

import json
import re
from typing import Any

import pytest

from tests.architecture.measured_sentences import BASE, SENTENCES, SMALLER_CACHE, WHOLE_STEPS
from tests.architecture.test_layout import ROOT

FRONT = (ROOT / "README.md").read_text()
MEASURED = (ROOT / "scripts" / "README.md").read_text()
KERNELS = (ROOT / "kernels" / "README.md").read_text()
STAGES = (ROOT / "rlbench" / "training" / "README.md").read_text()
COMMANDS = (ROOT / "rlbench" / "commands" / "README.md").read_text()
STEP_GAP = "logprob gap of sampled tokens, engine to trainer, mean"
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
    ("label", "impl", "base"),
    [
        ("rlbench, NF4 base", "rlbench", "nf4"),
        ("unsloth 2026.10.9, `fast_inference`, NF4 base", "unsloth", "nf4"),
        ("TRL 1.15 with vLLM colocated, PEFT and Liger, bf16 base", "trl", "nf4"),
        ("rlbench, bf16 base", "rlbench", "none"),
        ("unsloth 2026.10.9, `fast_inference`, bf16 base", "unsloth", "none"),
        ("rlbench, bf16 base, later that day", SMALLER_CACHE, "none"),
    ],
)
def test_whole_steps_of_the_8b_shape(label, impl, base):
    file, row = WHOLE_STEPS[base], {"case": f"llama-3.1-8b, {base}", "impl": impl}
    gaps = {"unsloth": None, "trl": f"step 2, {STEP_GAP}"}
    gap = gaps.get(impl, STEP_GAP)
    found = [value(file, metric=metric, **row) for metric in ("step", "generation", "device")]

    check(
        table(MEASURED, "| a whole step | s | of it generation | GiB of the device |")[label],
        [*found[:2], found[2] / 1024, value(file, metric=gap, **row) if gap else None],
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

    device = measured("device")
    assert device is not None

    check(
        table(MEASURED, "| a whole step | s | of it generation | update |")[label],
        [
            measured("step"),
            measured("generation"),
            measured("update"),
            device / 1024,
            measured(STEP_GAP) or measured(f"step 2, {STEP_GAP}"),
        ],
    )


@pytest.mark.parametrize(
    ("label", "file", "case", "impls"),
    [
        ("Llama-3.1-8B shape, NF4 base", WHOLE_STEPS["nf4"], "llama-3.1-8b, nf4", ["rlbench", "unsloth", "trl"]),
        ("Llama-3.1-8B shape, bf16 base", WHOLE_STEPS["none"], "llama-3.1-8b, none", [SMALLER_CACHE, "unsloth", ""]),
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
        assert impl or cell == "the same"


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
    file = f"linear_logprobs{'_unsloth' if impl == 'unsloth_zoo' else ''}_h200.json"

    def measured(size: int, metric: str, of: str = impl) -> float:
        return value(file, case=f"{model} N={size} llm", impl=of, metric=metric)

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
    impls = ["rlbench:flash4", "rlbench:flash", "two_calls:flash4", "unshared:flash4", "unshared:flash", "sdpa_padded"]
    for label, cells in table(KERNELS, "| 4 groups | shared, FA 4 |").items():
        case = label.replace("one sequence of 16,384", "prompt 384, 1 completions of 16000 to 16000")
        row = {"case": f"Llama-3.1-8B {case}", "metric": "forward_backward"}
        check(cells, [value("packed_attention_h200.json", impl=impl, **row) for impl in impls])


def test_lora_layers():
    for label, cells in table(KERNELS, "| | rlbench | unsloth | PEFT |").items():
        case = label.replace(",", "").replace("NF4", "nf4")
        for cell, impl in zip(cells, ("rlbench", "unsloth", "peft", "matmuls"), strict=True):
            parts = [f"{case} N=8192 {part}" for part in ("qkv", "o", "mlp")] if cell else []
            row = {"impl": impl, "metric": "forward_backward"}
            check([cell], [sum(value("lora_nf4_h200.json", case=p, **row) for p in parts)] if cell else [None])


@pytest.mark.parametrize(("sentence", "places"), SENTENCES, ids=[sentence[:40] for sentence, _ in SENTENCES])
def test_a_sentence_has_the_numbers_of_its_file(sentence, places):
    (found,) = re.findall(sentence, " ".join((FRONT + MEASURED + STAGES + COMMANDS + KERNELS).split()))
    measured = [value(file, case=case, impl=impl, metric=m) / scale for file, case, impl, m, scale in places]

    check([found] if isinstance(found, str) else list(found), measured)
