"""The study of gradient quantizers: its parts, tables and figures. Run by study.py."""
