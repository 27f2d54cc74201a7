"""The demo behind ``tetris demo``: train, prune, fine-tune, measure, on this machine.

config.py    what is run: sizes, seeds, variants
networks.py  the networks, and the ways to run them
train.py     training, accuracy
variants.py  from a dense network to a pruned one, per method
latency.py   milliseconds of dense and sparse networks, in turns
report.py    the table and the pictures
run.py       all of it, in order
"""
