"""Measures the block-sparse product against the fastest dense library, and compares results.

What ``tetris bench``, ``tetris compare`` and the repository's ``benchmarks`` share: ``layers`` has
the problems and their dense rivals, ``sweep`` a grid of them, timed in turns, ``machine`` what it
was measured on, ``compare`` two results, row by row.
"""
