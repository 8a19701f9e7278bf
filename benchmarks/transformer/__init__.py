"""Sections of bench_transformer."""
