"""Where torch and numpy are all there is, layers compute: rich, safetensors wait for their use."""

import subprocess
import sys

CODE = """
import sys
sys.modules.update(dict.fromkeys(["rich", "safetensors", "scipy", "sklearn", "matplotlib"]))
import torch, tetris
from tetris import tune
layer = tetris.sparsify(torch.nn.Linear(32, 16), sparsity=0.5, block=(4, 1), sweeps=1)
assert layer(torch.ones(2, 32)).isfinite().all()
try:
    tetris.save(layer, "/tmp/never-written.safetensors")
except ModuleNotFoundError as error:
    print(error.name)
"""


def test_import_without_extras():
    """A module that is None in sys.modules cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("safetensors")
