"""``tetris.calibrate``: measure layers on this machine, and fit the cost model to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from .. import _C, tuning
from ..checks import check_search, describe
from ..machine import check_threads, cores, cpu_model
from ..progress import steps
from . import store
from .measure import Draw, Sample, measure
from .model import CostModel


def calibrate(
    *,
    threads: Iterable[int] | int | None = None,
    quick: bool = False,
    passes: int | None = None,
    save: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> CostModel:
    """Measure random layers on this CPU, dense and sparse, and learn how long layers take.

    Takes about a minute, with ``quick`` a few seconds, and wants the machine to itself: with
    several threads another busy program makes figures useless. Later calls of
    :func:`tetris.analyze` and latency targets use the result.

    Args:
        threads: Numbers of threads to measure on; by default 1 and all cores.
        quick: A fifth of the layers.
        passes: How often each layer is measured, some time apart; the least time counts. More than
            the default, one on one thread and two on several, help where other programs disturb.
        save: Keep the result in the user's cache folder (TETRIS_CACHE_DIR, else
            XDG_CACHE_HOME/tetris, else ~/.cache/tetris).
        seed: Of the random layers.
        progress: Show a progress bar.

    Returns:
        The model of this machine; ``errors`` says how well it fits what was measured.

    Raises:
        ValueError: a number of threads or passes that is none.
        OSError: the folder cannot be written; found out before anything is measured.

    Example:
        >>> model = tetris.calibrate(quick=True)
        >>> print(model)
    """
    where = "tetris.calibrate"
    check_search(where, seed=seed, passes=passes)
    counts = sorted({1, cores()}) if threads is None else _counts(where, threads)
    if save:
        tuning.make_folder()
    samples = list(Draw(seed).samples(8 if quick else 40))
    prior = store.default()
    model = CostModel(
        cpu_model(), _C.isa_in_use(), _C.version, prior.threads, source="calibrated just now"
    )
    fitted: dict[int, CostModel] = {}
    often = {count: passes or (1 if count == 1 else 2) for count in counts}
    with steps(progress, "calibrating", sum(often.values()) * len(samples)) as advance:
        for count in counts:
            taken = measure_all(samples, count, often[count], advance)
            fitted[count] = model.fitted(count, [s.point for s in samples], taken)
    result = CostModel(
        model.cpu,
        model.isa,
        model.version,
        {count: own.threads[count] for count, own in fitted.items()},
        {count: own.errors[count] for count, own in fitted.items()},
        model.source,
    )
    if save:
        store.save(result)
    return result


def measure_all(
    samples: list[Sample], threads: int, passes: int, advance: Callable[[], None]
) -> np.ndarray:
    """Seconds of each sample, the least of several passes over all, on a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        taken = []
        for _ in range(passes):
            for i, sample in enumerate(samples):
                taken.append(measure(sample, seed=i))
                advance()
    finally:
        torch.set_num_threads(before)
    return np.asarray(taken).reshape(passes, -1).min(0)


def _counts(where: str, threads: Iterable[int] | int) -> list[int]:
    counts = list(threads) if isinstance(threads, Iterable) else [threads]
    for count in counts:
        check_search(where, threads=count)
        check_threads(f"{where}: threads", count)
    if not counts:
        raise ValueError(
            f"{where}: threads must name a number of threads (got {describe(threads)})"
        )
    return sorted(set(counts))
