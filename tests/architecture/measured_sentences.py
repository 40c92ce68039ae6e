"""Sentences of the READMEs with measured numbers, and where each number comes from."""

BASE = "shared_base_h200.json"
WHOLE_STEPS = {"nf4": "grpo_h200.json", "none": "grpo_bf16_h200.json"}  # of the 8B shape
SMALLER_CACHE = "rlbench, KV cache of 35 GiB"
GAP, GAPS, FLOAT32 = "gap_h200.json", "qwen2.5-1.5b, none", "transformers, float32"
ZEROS = "trainer, adapter of zeros"
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
DENSE, LAYER = "dequantise_nf4_h200.json", "Llama-3.1-8B nf4"
ATTENTION, SHARED = "packed_attention_h200.json", "Llama-3.1-8B prompt 512, 16 completions of 100 to 800"


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
        r"over NF4 takes ([\d.]+) s, of which generation ([\d.]+) \(128 sequences at a time, no dense copies\) and the "
        r"update ([\d.]+); torch allocated ([\d.]+) GiB at most, the device showed ([\d.]+) \(",
        [(CAP, NF4, "rlbench", m, 1) for m in ("step", "generation", "update")]
        + [(CAP, NF4, "rlbench", m, 1024) for m in ("engine and trainer, allocated", "device")],
    ),
    (r"the 8B step takes ([\d.]+) s over NF4\.", [(CAP, NF4, "rlbench", "step", 1)]),
    (r"shape over NF4 ran in ([\d.]+) GiB of an H200", [(CAP, NF4, "rlbench", "device", 1024)]),
    (
        r"\(before, ([\d.]+) s and ([\d.]+) GiB; the first row",
        [(WHOLE_STEPS["none"], "llama-3.1-8b, none", "rlbench", m, x) for m, x in (("step", 1), ("device", 1024))],
    ),
    (
        r"update \(([\d.]+) s over NF4, ([\d.]+) over bf16\)",
        [
            (WHOLE_STEPS["nf4"], NF4, "rlbench", "update", 1),
            (WHOLE_STEPS["none"], "llama-3.1-8b, none", SMALLER_CACHE, "update", 1),
        ],
    ),
    (
        r"Floors by arithmetic: generation ([\d.]+) and ([\d.]+) s, update ([\d.]+) and ([\d.]+) s",
        [
            (WHOLE_STEPS[base], f"llama-3.1-8b, {base}", "floor", metric, 1)
            for metric in ("generation", "update")
            for base in ("nf4", "none")
        ],
    ),
    (
        r"vLLM is ([\d.]+) away while it samples and ([\d.]+) when it reads the same tokens as a prompt, transformers "
        r"([\d.]+), rlbench's trainer ([\d.]+)\. vLLM is ([\d.]+) away from itself",
        [
            (GAP, GAPS, impl, f"gap to {FLOAT32}", 1)
            for impl in ("vLLM, sampling", "vLLM, as a prompt", "transformers, bfloat16", ZEROS)
        ]
        + [(GAP, GAPS, "vLLM, sampling", "gap to vLLM, as a prompt", 1)],
    ),
    (
        r"From vLLM's samples transformers is ([\d.]+) away, the trainer ([\d.]+)\.",
        [(GAP, GAPS, "vLLM, sampling", f"gap to {impl}", 1) for impl in ("transformers, bfloat16", ZEROS)],
    ),
    (
        r"copied between them, in ([\d.]+) ms for the shape of Llama-3.1-8B",
        [(BASE, NF4, "rlbench", "adapter copy into the engine", 1)],
    ),
    (
        r"By arithmetic, ([\d.]+) s of generation, and ([\d.]+) with 32 sequences",
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
    (
        r"`linear_token_loss` had ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+) ms \(.*?\) for its ([\d.]+), ([\d.]+), "
        r"([\d.]+) and ([\d.]+)\.",
        [
            ("linear_logprobs_unsloth_h200.json", f"{model} N={n} llm", impl, "forward_backward", 1)
            for impl in ("rlbench", "unsloth_zoo")
            for model in ("Llama-3.1-8B", "Qwen2.5-7B")
            for n in (8192, 16384)
        ],
    ),
    (
        r"falls back, it takes ([\d.]+) ms for the dense mode's ([\d.]+), in the run with unsloth_zoo ([\d.]+) for "
        r"([\d.]+)\. The card",
        [
            (f"linear_logprobs{run}_h200.json", "Llama-3.1-8B N=8192 flat", impl, "forward_backward", 1)
            for run in ("", "_unsloth")
            for impl in ("rlbench_sparse", "rlbench")
        ],
    ),
    (
        r"the layer takes (\d+) us now for (\d+), a share of ([\d.]+) for ([\d.]+), q, k, gate and down alone "
        r"([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+)\.",
        [(DENSE, LAYER, impl, "layer", 1e-3) for impl in ("rlbench", "rlbench, before")]
        + [(DENSE, LAYER, impl, "layer/copy_frac", 1) for impl in ("rlbench", "rlbench, before")]
        + [(DENSE, LAYER, "rlbench", f"{name}/copy_frac", 1) for name in ("q", "k", "gate", "down")],
    ),
    (
        r"([\d,]+) MiB beside ([\d,]+) in the first case, of ([\d,]+) tokens, below the ([\d,]+) without sharing",
        [
            (ATTENTION, SHARED, impl, metric, 1)
            for impl, metric in (
                ("rlbench:flash4", "extra_memory"),
                ("two_calls:flash4", "extra_memory"),
                ("rlbench:flash4", "tokens"),
                ("unshared:flash4", "extra_memory"),
            )
        ],
    ),
]
