"""The command ``quantrain prune``: language models and classifiers with fewer weights, without training."""
