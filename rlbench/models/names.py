"""Names that the planning of a run and the models share; nothing heavy is imported."""

NONE, MLP, FULL = "none", "mlp", "full"  # training.recompute
PATCHED_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
