"""Questions that take more than one number: a folder each, run by its study.py."""
