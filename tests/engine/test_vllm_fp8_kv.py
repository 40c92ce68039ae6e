"""FP8 keys and values in vLLM on a CPU: how many fit, what they are rounded to, and where they are refused."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlbench.config.schema import EngineConfig, RunConfig
from rlbench.engine import vllm_checks, vllm_engine
from rlbench.models.fit import kv_token_bytes
from rlbench.records import SamplingParams
from tests.engine.factories import start_vllm

pytestmark = pytest.mark.usefixtures("one_thread")
needs_avx512 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM reads FP8 with AVX-512")


@pytest.fixture(scope="module")
def fp8_kv_engine(tiny) -> Iterator[vllm_engine.VllmEngine]:
    engine = start_vllm(tiny, kv_cache_dtype="fp8")
    yield engine
    engine.close()


@needs_avx512
def test_one_byte_a_number_is_what_the_plan_counts(fp8_kv_engine, tiny):
    config = RunConfig(engine=EngineConfig(kind="vllm", kv_cache_dtype="fp8"))
    token_bytes = kv_token_bytes(tiny.model.config, config)
    cache = fp8_kv_engine._llm.llm_engine.vllm_config.cache_config

    assert token_bytes == 2 * 2 * 2 * 32  # keys and values, layers, heads, their size
    assert cache.num_gpu_blocks * cache.block_size * token_bytes == pytest.approx(0.05 * 2**30, rel=0.01)


@needs_avx512
def test_on_a_cpu_keys_and_values_are_cut_off_to_fp8_and_nothing_else_is_rounded(fp8_kv_engine, tiny):
    """In float32. If this vLLM rounds otherwise, the gap of rlbench/checks/limits.py is to be measured again."""
    prompts = [[(5 * i + 7 * j) % 90 + 2 for i in range(40)] for j in range(8)]

    completions = fp8_kv_engine.generate(prompts, SamplingParams(max_tokens=16), list(range(8)))

    found = torch.tensor([c.sampling_logprobs for c in completions])
    exact, expected = (_logprobs(tiny, prompts, completions, cuts=cuts) for cuts in (False, True))
    assert (found - expected).abs().mean() < 0.01
    assert (found - exact).abs().mean() > 0.1


def _logprobs(tiny, prompts, completions, *, cuts: bool) -> torch.Tensor:
    def attend(module, query, key, value, mask, **options):
        key, value = (_cut_off(x) if cuts else x for x in (key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS["cut_off"] = attend
    model = LlamaForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32, attn_implementation="cut_off")
    token_ids = torch.tensor([[*p, *c.token_ids] for p, c in zip(prompts, completions, strict=True)])
    start = len(prompts[0])
    with torch.no_grad():
        logprobs = model(token_ids).logits.log_softmax(-1)[:, start - 1 : -1]
    return logprobs.gather(2, token_ids[:, start:, None])[..., 0]


def _cut_off(x: torch.Tensor) -> torch.Tensor:
    codes = x.to(torch.float8_e4m3fn)
    is_larger = codes.float().abs() > x.abs()
    return (codes.view(torch.uint8) - is_larger.to(torch.uint8)).view(torch.float8_e4m3fn).float()


@pytest.mark.parametrize(("capability", "device"), [((8, 6), "cuda"), (None, "cpu")])
def test_fp8_keys_and_values_are_refused_where_vllm_cannot_read_them(monkeypatch, tiny, capability, device):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    words = "on a GPU of compute capability 8.6" if device == "cuda" else "on a CPU without AVX-512"
    with pytest.raises(
        ValueError, match=rf"engine\.kv_cache_dtype is fp8 {words}.*expected engine\.kv_cache_dtype=auto"
    ):
        vllm_checks.check_kv_cache_dtype("fp8", str(tiny.folder), device)
    vllm_checks.check_kv_cache_dtype("auto", str(tiny.folder), device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    vllm_checks.check_kv_cache_dtype("fp8", str(tiny.folder), device)


def test_fp8_keys_and_values_of_head_sizes_that_vllm_cannot_read_on_a_cpu_are_refused(monkeypatch, tiny, tmp_path):
    config = (tiny.folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"head_dim": 32', '"head_dim": 80'))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)

    with pytest.raises(ValueError, match=r"kv_cache_dtype is fp8 and attention heads have size 80.*multiples of 32"):
        vllm_checks.check_kv_cache_dtype("fp8", str(tmp_path), "cpu")
