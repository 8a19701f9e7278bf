"""The commands ``quantrain quantize`` and ``quantrain evaluate``: language models and classifiers in few bits without
training."""
