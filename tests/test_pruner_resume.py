"""Ten steps straight are five steps, a file, other objects, and five steps: bit for bit."""

import io

import pytest
import torch
from torch import nn

from tetris.prune import Cubic, Flops, Regrow, TetrisPruner

FAST = {"sweeps": 1, "block": (4, 3), "exclude": "4", "sparsity": 0.8}
CASES = {
    "one-shot": {},
    "cubic": {"schedule": Cubic(1, 8, every=2)},
    "custom": {"schedule": lambda step, final: final * min(1.0, 0.2 + step / 10)},
    "global": {
        "schedule": Cubic(0, 8),
        "scope": "global",
        "overrides": {"2": {"min_sparsity": 0.3, "max_sparsity": 0.85}},
    },
    "random": {"regrow": Regrow(0.4, every=2, by="random")},
    "gradient": {"regrow": Regrow(0.4, every=3), "schedule": Cubic(0, 7, every=2)},
    "searched-at": {"search_at": (3, 7), "schedule": Cubic(0, 8, every=2)},
    "searched": {"search_every_update": True, "schedule": Cubic(0, 8, every=2)},
    "everything": {
        "search_at": range(4, 11, 4),
        "schedule": Cubic(0, 8, every=2),
        "regrow": Regrow(0.3, every=3),
        "scope": "global",
    },
}
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda groups: torch.optim.AdamW(groups, 0.01),
}


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 30), nn.ReLU(), nn.Linear(30, 10)
    )


class Run:
    """A model in training with its pruner and an optimizer of two groups."""

    def __init__(self, optimizer="sgd", seed=0, **arguments):
        self.model = mlp(seed)
        weights = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.pruner = TetrisPruner(self.model, optimizers=self.optimizer, **{**FAST, **arguments})

    def train(self, first, last):
        for step in range(first, last):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.pruner.step()

    def save(self):
        file = io.BytesIO()
        parts = self.pruner, self.model, self.optimizer
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        return file

    def load(self, file):
        states = torch.load(file, weights_only=True)
        for part, state in zip((self.pruner, self.model, self.optimizer), states, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_run(case, execution):
    for optimizer in OPTIMIZERS if case in ("gradient", "searched-at") else ("sgd",):
        arguments = {**CASES[case], "execution": execution, "optimizer": optimizer}
        straight, stopped = Run(**arguments), Run(**arguments)
        straight.train(0, 10)
        stopped.train(0, 5)
        resumed = Run(**arguments, seed=7)  # other weights, so other permutations
        resumed.load(stopped.save())
        resumed.train(5, 10)
        assert resumed.pruner.steps == straight.pruner.steps == 10
        assert resumed.pruner.layouts() == straight.pruner.layouts()
        pairs = zip(resumed.model.parameters(), straight.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert straight.pruner.sparsity == pytest.approx(0.8, abs=0.03)


DIFFERENT = {
    "scope": {"scope": "global"},
    "schedule": {"schedule": Cubic(0, 8)},
    "search_every_update": {"search_every_update": True},
    "search_at": {"search_at": {3}},
    "regrow": {"regrow": Regrow()},
    "sparsity of layer '0'": {"sparsity": 0.7},
    "sparsity of layer '2'": {"overrides": {"2": {"sparsity": 0.5}}},
    "importance of layer '0'": {"importance": lambda name, layer: layer.weight.abs()},
    "balanced of layer '0'": {"balanced": True},
    "allow_empty_rows of layer '0'": {"allow_empty_rows": True},
    "reorder of layer '0'": {"reorder": "identity"},
    "seed of layer '0'": {"overrides": {"0": {"seed": 3}}},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_state_of_other_settings_is_refused_by_name(name):
    own, other = Run(), Run(**DIFFERENT[name])
    before = own.pruner.layouts()
    message = f"TetrisPruner.load_state_dict: {name} is .*make the pruner with the same"
    with pytest.raises(ValueError, match=message):
        own.pruner.load_state_dict(other.pruner.state_dict())
    assert own.pruner.layouts() == before
    other.pruner.load_state_dict(other.pruner.state_dict())


def test_targets_are_compared_without_their_example():
    def make(kept, x):
        target = Flops(kept, x)
        return TetrisPruner(mlp(), target=target, block=(4, 3), sweeps=1)

    state = make(0.3, torch.randn(2, 16)).state_dict()
    make(0.3, torch.randn(2, 16)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"target is 'Flops\(kept=0\.3\)' in the state"):
        make(0.4, torch.randn(2, 16)).load_state_dict(state)
