"""Names that the planning of a run and the models share; nothing heavy is imported."""

NONE, MLP, FULL = "none", "mlp", "full"  # training.recompute
# `config.model_type`: the prefix of the family's classes in transformers
PATCHED_FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}
POST_NORM_FAMILIES = ("gemma2", "gemma3_text")  # norms behind attention and MLP too
QK_NORM_FAMILIES = ("qwen3", "gemma3_text")
