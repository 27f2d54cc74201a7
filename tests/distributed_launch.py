"""Starts the processes of the tests of distributed training."""

import os
import subprocess
import sys


def torchrun(*words):
    """Run a script in two processes, each of one thread."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words)


def python(*words):
    """Run Python in one thread; what it said, both streams."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
