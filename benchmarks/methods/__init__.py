"""Experiments with the pruning methods: does each do what its paper promises, here and now?

    python -m benchmarks.methods --method tetris --quick

A method is one module of this package with an ``EXPERIMENT``; see :mod:`.experiment`.
"""
