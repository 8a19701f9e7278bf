"""Post-training quantization of transformers: what it costs, and what repairs it."""
