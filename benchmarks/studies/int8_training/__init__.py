"""Does training in int8 reach what bfloat16 and float32 reach? Run by study.py."""
