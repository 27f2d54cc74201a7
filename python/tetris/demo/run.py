"""Runs the demo: everything between the command line and the table."""

from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from .. import data as datasets
from . import report
from .config import DemoConfig, Variant
from .latency import measure
from .networks import NETWORKS
from .train import accuracy, recalibrate, steps_of, train
from .variants import build


@dataclass(frozen=True)
class Result:
    """What one variant reached; accuracies per seed."""

    variant: Variant
    accuracies: list[float]
    milliseconds: float


@dataclass(frozen=True)
class Outcome:
    """The whole run."""

    data_name: str
    dense_accuracies: list[float]
    dense_milliseconds: float
    dense_library: str
    results: list[Result]
    example: nn.Module  # a TETRIS model of the first seed, for the picture


def run(config: DemoConfig, console: Console | None = None) -> Outcome:
    """Trains, prunes, fine-tunes, measures, prints the table and writes the pictures."""
    console = console or Console()
    if config.threads:
        torch.set_num_threads(config.threads)
    data = _images(datasets.load(config.data, digits=config.digits), config)
    config.out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of training
    console.print(f"Data: {data.note}.", highlight=False)
    outcome = _outcome(config, data, console)
    console.print(report.table(outcome, config))
    console.print(report.legend(outcome, config), highlight=False)
    text = config.out / "demo.md"
    text.write_text(report.markdown(outcome, config))
    for path in [text, *report.pictures(outcome, config)]:
        console.print(f"written: {path}", highlight=False)
    return outcome


def _images(data: datasets.Dataset, config: DemoConfig) -> datasets.Dataset:
    """The images as the network takes them, no more than asked for."""
    shaped = NETWORKS[config.model].inputs
    train_x, train_y = data.train_x[: config.train_images], data.train_y[: config.train_images]
    test_x = shaped(data.test_x)
    return replace(data, train_x=shaped(train_x), train_y=train_y, test_x=test_x)


def _outcome(config: DemoConfig, data: datasets.Dataset, console: Console) -> Outcome:
    network = NETWORKS[config.model]
    variants = config.variants()
    features, classes = data.train_x[0].numel(), int(data.train_y.max()) + 1
    dense_steps = steps_of(data, epochs=config.dense_epochs, batch=config.train_batch)
    tune_steps = steps_of(data, epochs=config.tune_epochs, batch=config.train_batch)
    narrow = sum(v.method == "narrow" for v in variants)
    per_seed = dense_steps + len(variants) * tune_steps + narrow * dense_steps
    dense_accuracies: list[float] = []
    accuracies: dict[Variant, list[float]] = {variant: [] for variant in variants}
    first: dict[Variant, nn.Module] = {}
    trained: list[nn.Module] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    with bar:
        task = bar.add_task("", total=per_seed * len(config.seeds))

        def step() -> None:
            bar.advance(task)

        def describe(text: str) -> None:
            bar.update(task, description=text)
            if not console.is_terminal:  # a log has no live bar
                console.print(f"  {text}", highlight=False)

        def fit(model: nn.Module, epochs: int, learning_rate: float, seed: int) -> float:
            train(
                model,
                data,
                epochs=epochs,
                batch=config.train_batch,
                learning_rate=learning_rate,
                seed=seed,
                step=step,
            )
            recalibrate(model, data, config.train_batch)
            return accuracy(model, data)

        for seed in config.seeds:
            describe(f"seed {seed}: dense training")
            torch.manual_seed(seed)
            dense = network.build(features, config.width, classes)
            dense_accuracies.append(fit(dense, config.dense_epochs, config.learning_rate, seed))
            trained.append(dense)
            for variant in variants:
                describe(f"seed {seed}: {_label(variant)}")
                model = build(dense, network, variant, config, features, seed)
                epochs, rate = config.tune_epochs, config.tune_learning_rate
                if variant.method == "narrow":  # from scratch
                    epochs += config.dense_epochs
                accuracies[variant].append(fit(model, epochs, rate, seed + 1000))
                first.setdefault(variant, model)
        describe("measuring latency")
        x = data.test_x[: config.latency_batch].contiguous()
        models = {_label(v): model for v, model in first.items()}
        library, times = measure(network, trained[0], models, x)
    results = [Result(v, accuracies[v], times[_label(v)]) for v in variants]
    reordered = [v for v in variants if v.method == "TETRIS"]
    example = first[min(reordered, key=lambda v: (v.sparsity, -v.block[0] * v.block[1]))]
    return Outcome(data.name, dense_accuracies, times["dense"], library, results, example)


def _label(variant: Variant) -> str:
    height, width = variant.block
    block = "" if variant.method == "narrow" else f" {height}x{width}"
    return f"{variant.method}{block} at {variant.sparsity:.0%}"
