"""The parts of ``tools/gpu_check.py``, each a program of its own: ``python -m benchmarks.gpu_check.PART --out FILE``.

``step`` and ``decode`` train and ask a model of middle size, ``kernels`` times the kernels against torch, ``prebuilt``
packs and unpacks compiled kernels. On a machine without a GPU they run on the CPU with small sizes: their twins.
"""
