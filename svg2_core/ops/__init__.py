"""The operations, one folder each: the public op (`__init__.py`), its definition (`reference.py`) and its kernels."""
