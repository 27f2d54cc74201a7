"""Ten steps straight are five steps, a file, other objects, and five steps: bit for bit."""

import copy
import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from nested import same
from tetris.checks import plain
from tetris.prune import Cubic, Flops, LayerOptions, Regrow, TetrisPruner

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


def test_numbers_of_numpy_are_numbers():
    """In a file that torch.load takes with weights_only, and compared with Python's."""
    settings = {"scope": "global", "schedule": Cubic(0, 8)}
    own = {"seed": 3, "sweeps": 1, "min_sparsity": 0.25, "max_sparsity": 0.75, "sparsity": 0.5}
    numpy = {name: np.asarray(value)[()] for name, value in own.items()}

    def run(options, search_at):
        return Run(**settings, overrides={"0": options}, search_at=search_at)

    saved = run(numpy, np.asarray([2, 4]))
    run(own, [2, 4]).load(saved.save())
    for name, other in {"seed": np.int64(4), "max_sparsity": np.float64(0.8)}.items():
        with pytest.raises(ValueError, match=f"{name} of layer '0' is {own[name]} in the state"):
            run({**numpy, name: other}, [2, 4]).load(saved.save())
    with pytest.raises(ValueError, match=r"search_at is \(2, 4\) in the state and \(2, 5\)"):
        run(own, np.asarray([2, 5])).load(saved.save())
    assert type(LayerOptions(budget=np.float32(0.5)).budget) is float
    given = (np.bool_(True), np.float32(0.5), np.asarray([[1, 2]]), {np.int64(1)})
    assert repr(plain(given)) == "(True, 0.5, ((1, 2),), (1,))"


@dataclass(frozen=True)
class Linear:
    """A schedule of somebody else's."""

    steps: int
    like: tuple[Cubic, ...] = ()

    def __call__(self, step, final):
        return final * min(1.0, step / self.steps)


def test_numbers_of_numpy_in_dataclasses_are_numbers():
    own = {"schedule": Cubic(1, 8, 2, 0.25), "regrow": Regrow(0.5, every=2, end=20)}
    numpy = {
        "schedule": Cubic(np.int64(1), np.int32(8), np.int64(2), np.float32(0.25)),
        "regrow": Regrow(np.float64(0.5), every=np.int64(2), end=np.int64(20)),
    }
    for saved, resumed in ((own, numpy), (numpy, own)):
        Run(**resumed).load(Run(**saved).save())
    assert type(numpy["regrow"].share) is np.float64  # as it was
    with pytest.raises(ValueError, match=r"Regrow\(share=0.5, .* in the state"):
        Run(**own | {"regrow": Regrow(np.float64(0.25), 2, 20)}).load(Run(**numpy).save())
    ordinary = (Linear(8), Linear(8, (Cubic(1, 8),)), Flops(0.3, None))
    for value in (*own.values(), *ordinary):
        assert plain(value) == repr(value)  # as states have had it
    assert plain(Flops(np.float64(0.3), None)) == "Flops(kept=0.3)"
    assert plain(Linear(np.int64(8))) == plain(Linear(8))


def test_targets_are_compared_without_their_example():
    def make(kept, x):
        target = Flops(kept, x)
        return TetrisPruner(mlp(), target=target, block=(4, 3), sweeps=1)

    state = make(0.3, torch.randn(2, 16)).state_dict()
    make(0.3, torch.randn(2, 16)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"target is 'Flops\(kept=0\.3\)' in the state"):
        make(0.4, torch.randn(2, 16)).load_state_dict(state)


class Mixed(nn.Module):
    """Convolutions, grouped and transposed, batch norm, dropout, and linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.hidden, self.drop, self.out = nn.Linear(16, 48), nn.Dropout(0.1), nn.Linear(48, 10)

    def forward(self, x):
        x = self.grouped(self.norm(self.first(x)).relu()).relu()
        x = self.up(x).relu().mean((2, 3))
        return self.out(self.drop(self.hidden(x).relu()))


class MixedRun(Run):
    """Bounds, regrowth, searches, a schedule, and a GradScaler that skips steps."""

    def __init__(self, execution, by):
        torch.manual_seed(0)
        self.model = Mixed()
        weights = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]
        self.optimizer = torch.optim.AdamW(groups, 0.01)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        self.pruner = TetrisPruner(
            self.model, sparsity=0.8, block=(4, 1), exclude="out", sweeps=1, scope="global",
            schedule=Cubic(2, 11, every=3), search_at={5, 9}, min_sparsity=0.2, max_sparsity=0.95,
            regrow=Regrow(0.3, every=2, end=15, by=by), overrides={"hidden": {"sparsity": 0.6}},
            execution=execution, optimizers=self.optimizer,
        )  # fmt: skip

    @property
    def parts(self):
        return self.pruner, self.model, self.optimizer, self.scaler

    def train(self, first, last):
        masked = self.pruner.execution == "masked"
        for step in range(first, last):
            torch.manual_seed(step)  # of the dropout, too
            x, target = torch.randn(8, 16, 6, 6), torch.randint(10, (8,))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=masked):
                loss = nn.functional.cross_entropy(self.model(x).float(), target)
            self.optimizer.zero_grad()
            self.scaler.scale(loss * (float("inf") if step == 7 else 1.0)).backward()
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.pruner.step(skipped=self.scaler.get_scale() < before)


@pytest.mark.parametrize(("execution", "by"), [("masked", "gradient"), ("sparse", "random")])
def test_a_resumed_run_of_everything_together(execution, by):
    straight, stopped, resumed = (MixedRun(execution, by) for _ in range(3))
    straight.train(0, 13)
    stopped.train(0, 8)  # just after the step that was skipped
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped.parts], file)
    file.seek(0)
    for part, state in zip(resumed.parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    resumed.train(8, 13)
    assert straight.pruner.steps == 12
    for a, b in zip(resumed.parts, straight.parts, strict=True):
        assert same(a.state_dict(), b.state_dict())


# -- in another order -----------------------------------------------------------------------------

FIRST = "load the pruner's state first, then the model's and the optimizer's .docs/training.md"


def states_after(steps, **arguments):
    run = Run(**arguments)
    run.train(0, steps)
    return copy.deepcopy(
        [run.pruner.state_dict(), run.model.state_dict(), run.optimizer.state_dict()]
    )


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_an_optimizers_state_that_comes_first_warns(execution):
    pruner, model, optimizer = states_after(3, execution=execution)
    run = Run(execution=execution, seed=7)  # other weights, so other blocks
    run.optimizer.load_state_dict(optimizer)
    with pytest.warns(UserWarning, match=f"had states already.*{FIRST}") as caught:
        run.pruner.load_state_dict(pruner)
    assert caught[0].filename == __file__


def test_an_optimizers_state_of_other_shapes_that_comes_first_is_refused():
    arguments = {"execution": "sparse", "schedule": Cubic(1, 8)}
    pruner, model, optimizer = states_after(3, **arguments)
    run = Run(**arguments)
    run.optimizer.load_state_dict(optimizer)
    with pytest.raises(ValueError, match=f"'momentum_buffer' of shape.*{FIRST}"):
        run.pruner.load_state_dict(pruner)


def test_the_right_order_does_not_warn(recwarn):
    states = states_after(3)
    run = Run(seed=7)
    for _ in range(2):  # the second time there are states
        for part, state in zip((run.pruner, run.model, run.optimizer), states, strict=True):
            part.load_state_dict(copy.deepcopy(state))
    assert not [w for w in recwarn if "tetris" in str(w.message).lower()]


def test_a_state_from_before_the_masks_names_the_order():
    dense = mlp().state_dict()
    hint = "layer 0 is masked by a pruner, and the state has no mask.*load the pruner's state"
    with pytest.raises(RuntimeError, match=hint):
        Run().model.load_state_dict(dense)
    hint = "SparseLinear 0: the state has a dense weight.*with a pruner, load its state before"
    with pytest.raises(RuntimeError, match=hint):
        Run(execution="sparse").model.load_state_dict(dense)
    with pytest.raises(RuntimeError, match=hint):  # masked into stored
        Run(execution="sparse").model.load_state_dict(Run().model.state_dict())


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_a_state_of_other_layers_alone_goes_into_a_pruned_model(execution):
    """``strict=False``, for a new head: masked and sparse layers stay as they are."""
    model = Run(execution=execution).model
    name = list(model.state_dict())[-1]
    layer, _, head = name.rpartition(".")
    assert head == "bias"
    before, other = copy.deepcopy(model.state_dict()), torch.full_like(model.state_dict()[name], 7)
    found = model.load_state_dict({name: other}, strict=False)
    assert not found.unexpected_keys
    assert any(key.startswith("0.") for key in found.missing_keys)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other if key == name else before[key])


def test_a_layer_without_its_mask_takes_dense_states_again():
    dense, run = mlp().state_dict(), Run()
    copied, pruner = copy.deepcopy((run.model, run.pruner))
    with pytest.raises(RuntimeError, match="layer 0 is masked by a pruner"):
        copied.load_state_dict(dense)
    pruner.remove().load_state_dict(dense)
    with pytest.raises(RuntimeError, match="layer 0 is masked by a pruner"):
        run.model.load_state_dict(dense)  # the original of the copy is still masked
