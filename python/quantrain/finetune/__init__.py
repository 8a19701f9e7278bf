"""The fine-tuning job behind ``quantrain finetune``: a float32 baseline against quantised models, measured and reported."""
