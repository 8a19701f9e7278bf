"""Accuracy of 4-bit weights, of QLoRA and of 8-bit moments."""
