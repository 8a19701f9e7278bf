"""The job behind ``quantrain finetune``: a float32 baseline against quantized models, measured and reported."""
