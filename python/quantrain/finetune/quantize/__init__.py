"""The commands ``quantrain quantize`` and ``quantrain evaluate``: a language model in few bits without training."""
