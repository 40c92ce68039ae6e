"""vLLM's scheduler with a short way for batches in which every sequence gets its next token.

Of what the host does for a step of 256 sequences, vLLM's scheduler and the way of one token to its output take most:
a small model waits for them. In rollouts nearly all steps are alike: nobody waits, each sequence gets one more token,
one in 16 of them a new block of keys and values. Such steps are scheduled here by two short loops, and tokens and
logprobs are held back until their sequence is finished, when vLLM gets them as one output. All else, and every step in
which something else is going on, is left to vLLM's own methods. The batches are those that vLLM would have made:
`tests/engine/test_vllm_scheduler.py` compares both, step by step. Nothing here imports vllm before it is called.

Source: vLLM 0.26 and 0.32, `v1/core/sched/scheduler.py` and `async_scheduler.py`, whose state this continues.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import numpy as np


@dataclass(slots=True)
class HeldTokens:
    """Of one request that asks for nothing but tokens and their logprobs: what vLLM has not been told yet."""

    request: Any
    stops: frozenset[int]  # token ids that end it
    num_held: int = 0
    token_ids: list[int] = field(default_factory=list)  # [num_held * columns] of `logprobs`
    logprobs: list[float] = field(default_factory=list)


class QuickDecode(ABC):  # as vLLM's is, or Python refuses the change of class
    """Mixed into a live `Scheduler` or `AsyncScheduler` by `schedule_quickly`."""

    rlbench_num_quick: int  # steps that took the short way
    _rlbench_held: dict[str, HeldTokens]
    _rlbench_ended: dict[str, HeldTokens]
    _rlbench_is_async: bool
    _rlbench_required: frozenset[str]  # fields of this vLLM's SchedulerOutput that have no default
    _rlbench_block: int  # tokens of a block of keys and values

    def rlbench_start(self) -> None:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # pyright: ignore[reportMissingImports]
        from vllm.v1.core.sched.output import SchedulerOutput  # pyright: ignore[reportMissingImports]

        self.rlbench_num_quick = 0
        self._rlbench_held, self._rlbench_ended = {}, {}
        self._rlbench_is_async = isinstance(self, AsyncScheduler)
        without = [f.name for f in fields(SchedulerOutput) if f.default is MISSING and f.default_factory is MISSING]
        self._rlbench_required = frozenset(without)
        scheduler: Any = self
        (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._rlbench_block = manager.block_size

    def add_request(self: Any, request: Any) -> None:
        super().add_request(request)  # type: ignore[misc]
        if is_plain(request):
            params = request.sampling_params
            stops = frozenset({*(params.stop_token_ids or ()), params.eos_token_id} - {None})
            self._rlbench_held[request.request_id] = HeldTokens(request, stops)

    def _free_request(self: Any, request: Any, *arguments: Any, **named: Any) -> Any:
        state = self._rlbench_held.pop(request.request_id, None)
        if state is not None and state.num_held:
            self._rlbench_ended[request.request_id] = state  # its last output is still to be made
        return super()._free_request(request, *arguments, **named)  # type: ignore[misc]

    def schedule(self: Any, *arguments: Any, **named: Any) -> Any:
        if not any(arguments) and not any(named.values()) and (output := self._rlbench_schedule()) is not None:
            self.rlbench_num_quick += 1
            return output
        return super().schedule(*arguments, **named)  # type: ignore[misc]

    def update_from_output(self: Any, scheduler_output: Any, model_output: Any) -> Any:
        chosen = getattr(scheduler_output, "rlbench_requests", None)
        if chosen is not None and self._rlbench_can_take(chosen, model_output):
            return self._rlbench_take(chosen, model_output)
        outputs = super().update_from_output(scheduler_output, model_output)  # type: ignore[misc]
        for of_client in outputs.values():
            for output in of_client.outputs:
                state = self._rlbench_held.get(output.request_id) or self._rlbench_ended.get(output.request_id)
                if state is not None and state.num_held:
                    _give(output, state)
        self._rlbench_ended.clear()
        return outputs

    def _rlbench_schedule(self: Any) -> Any:
        """vLLM's `SchedulerOutput`; None, and nothing changed, where this step is not one of those."""
        running = self.running
        if not running or self._inflight_prefills or self._pause_state.name != "UNPAUSED":
            return None
        if len(running) > self.max_num_scheduled_tokens or not self._rlbench_has_no_other(len(running)):
            return None
        held, is_async, last = self._rlbench_held, self._rlbench_is_async, self.max_model_len - 1
        block = self._rlbench_block
        of_request = self.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
        chosen: list[HeldTokens] = []
        touched: list[Any] = []  # get a block, or have filled one that can be cached now
        num_new_blocks = 0
        for request in running:
            state = held.get(request.request_id)
            computed, waiting = request.num_computed_tokens, request.num_output_placeholders
            known = len(request._all_token_ids)
            if state is None or request.is_prefill_chunk:
                return None
            if waiting > 0 and computed + 2 - waiting >= request.num_prompt_tokens + request.max_tokens:
                continue  # its last token is on its way
            if computed >= last:
                continue
            if known + waiting - computed != 1:
                return None
            is_full = computed >= block * len(of_request[request.request_id])
            num_new_blocks += is_full
            if is_full or known % block == 0:
                touched.append(request)
            chosen.append(state)
        if not chosen or num_new_blocks > self.kv_cache_manager.block_pool.get_num_free_blocks():
            return None
        return self._rlbench_output(chosen, touched, is_async)

    def _rlbench_has_no_other(self: Any, num_running: int) -> bool:
        """Nobody waits, or nobody could be let in."""
        num_waiting = sum(len(getattr(self, name, ())) for name in ("waiting", "skipped_waiting", "kv_holding_waiting"))
        most = max(self.max_num_running_reqs, getattr(self, "max_num_active_reqs", 0))
        return num_waiting == 0 or num_running >= most

    def _rlbench_output(self: Any, chosen: list[HeldTokens], touched: list[Any], is_async: bool) -> Any:
        """What `schedule` and `_update_after_schedule` do for one token of each."""
        from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput  # pyright: ignore

        self.current_step += 1
        manager = self.kv_cache_manager
        manager.new_step_starts()
        new_blocks = {request.request_id: manager.allocate_slots(request, 1) for request in touched}
        ids = [state.request.request_id for state in chosen]
        cached = CachedRequestData(
            req_ids=ids,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids=self._rlbench_new_to_runner(chosen),
            new_block_ids=[
                new_blocks[name].get_block_ids(allow_none=True) if name in new_blocks else None for name in ids
            ],
            num_computed_tokens=[state.request.num_computed_tokens for state in chosen],
            num_output_tokens=[
                len(state.request._output_token_ids) + state.request.num_output_placeholders for state in chosen
            ],
        )
        optional: dict[str, Any] = {}
        if "num_common_prefix_blocks" in self._rlbench_required:
            optional["num_common_prefix_blocks"] = manager.get_num_common_prefix_blocks(self.running[0].request_id)
        if hasattr(self.encoder_cache_manager, "get_manager_metadata"):
            optional["ec_manager_metadata"] = self.encoder_cache_manager.get_manager_metadata()
        copies, _ = manager.take_kv_cache_block_copies()
        assert not copies  # prompts alone share part of a block
        output = SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=dict.fromkeys(ids, 1),
            total_num_scheduled_tokens=len(ids),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            preempted_req_ids=self.reset_preempted_req_ids,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=self.encoder_cache_manager.get_freed_mm_hashes(),
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
            num_spec_tokens_to_schedule=0,
            **optional,
        )
        output.rlbench_requests = chosen  # pyright: ignore[reportAttributeAccessIssue]
        next_step = self.current_step + 1
        for state in chosen:
            request = state.request
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
            if is_async:
                request.num_output_placeholders += 1
                request.next_decode_eligible_step = next_step
        self.finished_req_ids, self.reset_preempted_req_ids = set(), set()
        return output

    def _rlbench_new_to_runner(self: Any, chosen: list[HeldTokens]) -> dict[str, list[int]]:
        """All tokens of those that vLLM's first model runner did not see in the step before."""
        if self.use_v2_model_runner:
            return {}
        before = self.prev_step_scheduled_req_ids
        ids = {state.request.request_id for state in chosen}
        new = {
            s.request.request_id: list(s.request._all_token_ids) for s in chosen if s.request.request_id not in before
        }
        before.clear()
        before.update(ids)
        return new

    def _rlbench_can_take(self: Any, chosen: list[HeldTokens], model_output: Any) -> bool:
        """Whether each sequence that is still running has one token with its logprobs, and there is nothing else."""
        logprobs = model_output.logprobs
        if logprobs is None or logprobs.cu_num_generated_tokens is not None or model_output.num_nans_in_logits:
            return False
        if any(model_output.prompt_logprobs_dict.values()) or self.grammar_compile_error_reqs:
            return False
        sampled, index_of = model_output.sampled_token_ids, model_output.req_id_to_index
        for state in chosen:
            request = state.request
            if request.is_finished():
                continue
            is_running = request.status.name == "RUNNING" and not getattr(request, "num_stale_output_tokens", 0)
            if not is_running or getattr(request, "async_tokens_to_discard", 0):
                return False
            if len(sampled[index_of[request.request_id]]) != 1:
                return False
        return True

    def _rlbench_take(self: Any, chosen: list[HeldTokens], model_output: Any) -> Any:
        """What `update_from_output` does for one token of each; outputs of those that are finished alone."""
        from vllm.v1.core.sched.utils import check_stop, remove_all  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine import EngineCoreOutputs  # pyright: ignore[reportMissingImports]

        sampled, index_of = model_output.sampled_token_ids, model_output.req_id_to_index
        token_ids, logprobs = model_output.logprobs.logprob_token_ids.tolist(), model_output.logprobs.logprobs.tolist()
        block, hashed, longest = self._rlbench_block, self.hash_block_size, self.max_model_len
        stopped: set[Any] = set()
        outputs: list[Any] = []
        for state in chosen:
            request = state.request
            request.num_in_flight_tokens -= 1
            if request.is_finished():  # while its token was computed
                continue
            index = index_of[request.request_id]
            token = sampled[index][0]
            output, everything = request._output_token_ids, request._all_token_ids
            output.append(token)
            everything.append(token)
            if len(everything) % hashed == 0:
                request.update_block_hashes()
            state.num_held += 1
            state.token_ids.extend(token_ids[index])
            state.logprobs.extend(logprobs[index])
            is_last = token in state.stops or len(everything) >= longest or len(output) >= request.max_tokens
            if is_last:
                assert check_stop(request, longest)
            if self._rlbench_is_async:
                request.num_output_placeholders -= 1
                done = request.num_computed_tokens - request.num_output_placeholders
                if done % block == 0:
                    self.kv_cache_manager.cache_blocks(request, done)
            if is_last:
                outputs.append(self._rlbench_finish(state))
                stopped.add(request)
        if not outputs:
            return {}
        self.running = remove_all(self.running, stopped)
        return {0: EngineCoreOutputs(outputs=outputs)}

    def _rlbench_finish(self: Any, state: HeldTokens) -> Any:
        from vllm.v1.engine import EngineCoreOutput  # pyright: ignore[reportMissingImports]

        request = state.request
        reason = request.get_finished_reason()
        assert self._handle_stopped_request(request)
        self._free_request(request)
        output = EngineCoreOutput(
            request_id=request.request_id, new_token_ids=[], finish_reason=reason, stop_reason=request.stop_reason
        )
        _give(output, state)
        self._rlbench_ended.pop(request.request_id)
        return output


def _give(output: Any, state: HeldTokens) -> None:
    from vllm.v1.outputs import LogprobsLists  # pyright: ignore[reportMissingImports]

    tokens = state.request._output_token_ids
    end = len(tokens) - len(output.new_token_ids)
    shape = (state.num_held, -1)
    ids = np.array(state.token_ids, dtype=np.int32).reshape(shape)
    logprobs = np.array(state.logprobs, dtype=np.float32).reshape(shape)
    ranks = np.zeros(state.num_held, dtype=np.int32)  # nobody asks
    if output.new_logprobs is not None:
        ids = np.concatenate([ids, output.new_logprobs.logprob_token_ids])
        logprobs = np.concatenate([logprobs, output.new_logprobs.logprobs])
        ranks = np.concatenate([ranks, output.new_logprobs.sampled_token_ranks])
    output.new_token_ids = [*tokens[end - state.num_held : end], *output.new_token_ids]
    output.new_logprobs = LogprobsLists(ids, logprobs, ranks, None)
    state.num_held, state.token_ids, state.logprobs = 0, [], []


def is_plain(request: Any) -> bool:
    """Whether it asks for nothing but tokens and their logprobs, all at its end."""
    params = request.sampling_params
    if params is None or request.pooling_params is not None or request.has_encoder_inputs or request.resumable:
        return False
    if request.use_structured_output or request.client_index != 0:
        return False
    is_whole = params.output_kind.name == "FINAL_ONLY" and not params.detokenize and not params.stop
    asks = (params.logprob_token_ids, params.min_tokens, params.repetition_detection)
    return is_whole and params.logprobs is not None and params.prompt_logprobs is None and not any(asks)


def schedule_quickly(scheduler: Any) -> bool:
    """Give a live scheduler of vLLM the short way; False, and nothing changed, where its engine is not that simple."""
    if not _is_simple(scheduler):
        return False
    kind = type(scheduler)
    scheduler.__class__ = type("Rlbench" + kind.__name__, (QuickDecode, kind), {})
    scheduler.rlbench_start()
    return True


def _is_simple(scheduler: Any) -> bool:
    """One kind of layers that attend to all tokens, one device, no speculation, no connectors, no statistics."""
    kind = {base.__name__ for base in type(scheduler).__mro__}
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    has = [
        scheduler.connector, scheduler.ec_connector, getattr(scheduler, "aux_output_connector", None),
        scheduler.num_spec_tokens, scheduler.num_lookahead_tokens, scheduler.log_stats, scheduler.defer_block_free,
        scheduler.use_pp, scheduler.need_mamba_block_aligned_split, scheduler.is_encoder_decoder,
        scheduler.enable_kv_cache_events, scheduler.finished_req_ids_dict is not None,
        scheduler.dynamic_sd_lookup is not None, getattr(scheduler, "enable_return_routed_experts", False),
        getattr(scheduler, "return_sampling_mask", False), getattr(scheduler, "is_mm_encoder_only", False),
        scheduler.perf_metrics is not None and scheduler.perf_metrics.is_enabled(),
    ]  # fmt: skip
    is_known = "Scheduler" in kind and "QuickDecode" not in kind and scheduler.num_sampled_tokens_per_step == 1
    return is_known and not any(has) and [type(manager).__name__ for manager in managers] == ["FullAttentionManager"]
