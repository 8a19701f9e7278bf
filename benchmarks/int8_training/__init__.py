"""The study behind benchmarks/int8_training_study.py: does training in int8 reach what bfloat16 and float32 reach?"""
