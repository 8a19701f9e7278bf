"""The study of gradient quantisers behind benchmarks/gradient_quant_study.py: data, tasks, captured steps, parts, figures."""
