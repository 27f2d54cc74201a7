"""Dirichlet scale mixture priors: does a posterior under them survive pruning?

Networks of 16 hidden nodes are sampled on Friedman's regression (independent and correlated inputs)
and on breast cancer, then pruned, draw by draw and by one mask per chain. Wide networks take the
scalable path, MAP, and end on the kernels. Accuracy of a regression is R^2; the latency of wide
networks is a batch of 256.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tetris.bayes.weights import Task

from . import dsm_small as small
from . import dsm_wide as wide
from .dsm_data import Points, breast_cancer, friedman
from .dsm_small import BLOCK_PRIORS, PRIORS, Sampling
from .experiment import Check, Claim, Row, Setting
from .progress import Progress
from .stats import by_seed, figure, mean_sd

# Of 20 leapfrog steps, as many as for cancer, chains of 100 points mixed worse: DHS .307, not .285.
FRIEDMAN = {
    100: Sampling(warmup=400, draws=400, steps=40),
    200: Sampling(warmup=400, draws=400),
    500: Sampling(warmup=300, draws=300),
}
CANCER = Sampling(warmup=300, draws=300)
NUTS = Sampling(warmup=100, draws=100)
CANCER_POINTS = 400
AUTHORS_FRIEDMAN = {100: 0.357, 200: 0.223, 500: 0.198}  # DHS, notebook
AUTHORS_CANCER = {"Gaussian": 0.129, "RHS": 0.101, "DHS": 0.096, "DST": 0.098}  # notebook, NLL


def _sizes(setting: Setting) -> tuple[int, ...]:
    return (100,) if setting.quick else (100, 200, 500)


def _shorter(setting: Setting, sampling: Sampling) -> Sampling:
    return Sampling(100, 100) if setting.quick else sampling


class DsmExperiment:
    """See the module."""

    name = "dsm"
    title = "DSM: Bayesian networks with shrinkage priors, pruned by their posterior"

    def __init__(self) -> None:
        self._sparse: list[tuple[float, float]] = []
        self._quick = False

    def rows(self, setting: Setting, progress: Progress) -> Iterator[Row]:
        """Friedman, breast cancer, the reference sampler and the scalable path on both, wide."""
        sizes, priors = _sizes(setting), {**PRIORS, **BLOCK_PRIORS}
        progress.plan(
            len(sizes) * len(PRIORS)
            + len(priors)
            + 2 * len(PRIORS) * (1 + len(setting.seeds))
            + wide.count(setting)
        )
        self._sparse, self._quick = [], setting.quick
        for points in sizes:
            for prior in PRIORS:
                yield from self._friedman(points, prior, setting, progress)
        data = breast_cancer(CANCER_POINTS, setting.seeds)
        for name, prior in priors.items():
            found = small.sample(
                f"breast cancer, {name}",
                data,
                prior,
                "classification",
                _shorter(setting, CANCER),
                progress,
            )
            for index, (seed, posterior) in enumerate(zip(setting.seeds, found, strict=True)):
                yield from small.rows_of(
                    f"cancer {name}",
                    seed,
                    posterior,
                    data.test_x[index],
                    data.test_y[index],
                    per_draw=(0.95,),
                    blocks=(0.75, 0.9),
                    inputs=(0.75,),
                )
            first = small.sparse_error(found[0].chain(0), 0.75, data.test_x[0])
            self._sparse.append(first)
        yield from self._others(setting, progress)
        yield from wide.rows(setting, progress)

    def _friedman(
        self, points: int, prior: str, setting: Setting, progress: Progress
    ) -> Iterator[Row]:
        """Both kinds of inputs, in one batch of chains."""
        kinds = {"": friedman(points, setting.seeds)}
        if not setting.quick:
            kinds[" correlated"] = friedman(points, setting.seeds, correlated=True)
        parts = [list(vars(d).values()) for d in kinds.values()]
        data = Points(*(torch.cat(part) for part in zip(*parts, strict=True)))
        found = small.sample(
            f"Friedman {points}, {prior}",
            data,
            PRIORS[prior],
            "regression",
            _shorter(setting, FRIEDMAN[points]),
            progress,
        )
        labels = [(kind, seed) for kind in kinds for seed in setting.seeds]
        for index, ((kind, seed), posterior) in enumerate(zip(labels, found, strict=True)):
            yield from small.rows_of(
                f"Friedman {points}{kind} {prior}",
                seed,
                posterior,
                data.test_x[index],
                data.test_y[index],
                per_draw=(0.75,),
            )

    def _others(self, setting: Setting, progress: Progress) -> Iterator[Row]:
        """The reference sampler on the first seed, MAP and draws around it on all."""
        sampling = Sampling(20, 20) if setting.quick else NUTS
        problems: list[tuple[str, Task, Points]] = [
            ("Friedman 100", "regression", friedman(100, setting.seeds)),
            ("cancer", "classification", breast_cancer(CANCER_POINTS, setting.seeds)),
        ]
        for name, task, data in problems:
            for prior, law in PRIORS.items():
                progress.describe(f"{name}, {prior}: NUTS, MAP")
                runs = [("NUTS", 0, small.sample_nuts(data, law, task, sampling))]
                progress.advance()
                for index in range(len(setting.seeds)):
                    fits = small.fit_map(data, law, task, index, 200 if setting.quick else 1500)
                    runs += [(way, index, posterior) for way, posterior in fits.items()]
                    progress.advance()
                for way, index, posterior in runs:
                    yield from small.rows_of(
                        f"{name} {prior} {way}",
                        setting.seeds[index],
                        posterior,
                        data.test_x[index],
                        data.test_y[index],
                    )

    def claims(self, setting: Setting) -> list[Claim]:
        """What the paper and the prototype saw."""
        result = []
        for prior in ("RHS", "DHS", "DST"):
            for end in ("", ", 75% per draw"):
                result.append(
                    Claim(f"Friedman 100 {prior}{end}", f"Friedman 100 Gaussian{end}", "rmse")
                )
        for prior in ("DHS", "DST"):
            for rival in ("Gaussian", "RHS"):
                end = ", 95% per draw"
                result.append(Claim(f"cancer {prior}{end}", f"cancer {rival}{end}", "nll"))
            for end in (", 75% of blocks", ", 90% of blocks"):
                note = "blocks of the prior against weights of their own"
                result.append(Claim(f"cancer {prior} 4x2{end}", f"cancer DHS{end}", "nll", note))
        for share in ("90%", "95%"):
            pair = (f"wide DHS 16x16 {share}", f"wide plain 16x16 {share}")
            result.append(Claim(*pair, "before", "without fine-tuning"))
        return result

    def check(self, rows: Sequence[Row]) -> list[Check]:
        """Equal quality unpruned, other samplers, the authors' figures, sparse modules, speed."""
        worst = max(max(pair) for pair in self._sparse)
        wide_errors = [r.extra["sparse error"] for r in rows if "sparse error" in r.extra]
        worst = max(worst, *wide_errors)
        sampled = [r for r in rows if "R-hat" in r.extra]
        good = sum(r.extra["converged"] for r in sampled)
        rhats = sorted(r.extra["R-hat"] for r in sampled)
        posteriors = [
            *_close_to_gaussian(rows),
            *_samplers(rows),
            *_scalable(rows),
            *_authors(rows),
            (
                "every chain passes its own diagnostics",
                good == len(sampled),
                f"{good:.0f} of {len(sampled)} runs; median R-hat {rhats[len(rhats) // 2]:.2f}",
            ),
        ]
        if self._quick:  # chains this short say nothing
            posteriors = [(what, None, measured) for what, _, measured in posteriors]
        return [
            *posteriors,
            (
                "sparse modules, means and draws, equal masked ones to 1e-5",
                worst < 1e-5,
                f"relative error up to {worst:.1e}",
            ),
            *_speed(rows),
        ]


def _mean(rows: Sequence[Row], name: str, field: str) -> float:
    return mean_sd(figure(row, field) for row in by_seed(rows, name).values())[0]


def _close_to_gaussian(rows: Sequence[Row]) -> Iterator[Check]:
    rival = _mean(rows, "cancer Gaussian", "nll")
    for prior in ("RHS", "DHS", "DST", *BLOCK_PRIORS):
        own = _mean(rows, f"cancer {prior}", "nll")
        yield (
            f"cancer {prior}, unpruned: NLL within .01 of Gaussian",
            own < rival + 0.01,
            f"{own:.3f} against {rival:.3f}",
        )


def _samplers(rows: Sequence[Row]) -> Iterator[Check]:
    for name, field, limit in (("Friedman 100", "rmse", 0.05), ("cancer", "nll", 0.02)):
        gaps = {}
        for prior in PRIORS:
            ((seed, nuts),) = by_seed(rows, f"{name} {prior} NUTS").items()
            hmc = by_seed(rows, f"{name} {prior}")[seed]
            gaps[prior] = (figure(hmc, field), figure(nuts, field))
        yield (
            f"{name}, first seed: HMC within {limit:g} of NUTS ({field})",
            all(abs(a - b) < limit for a, b in gaps.values()),
            "; ".join(f"{p} {a:.3f}, NUTS {b:.3f}" for p, (a, b) in gaps.items()),
        )


def _scalable(rows: Sequence[Row]) -> Iterator[Check]:
    for name, field, limit in (("Friedman 100", "rmse", 0.1), ("cancer", "nll", 0.05)):
        gaps = {
            (prior, way): _mean(rows, f"{name} {prior} {way}", field)
            - _mean(rows, f"{name} {prior}", field)
            for prior in PRIORS
            for way in ("MAP", "SWAG")
        }
        yield (
            f"{name}: the scalable path at most {limit:g} worse than HMC ({field})",
            all(gap < limit for gap in gaps.values()),
            "; ".join(f"{prior} {way} {gap:+.3f}" for (prior, way), gap in gaps.items()),
        )


def _authors(rows: Sequence[Row]) -> Iterator[Check]:
    known = {row.label for row in rows}
    pairs = {
        f"Friedman {points} DHS": ("rmse of single draws", value)
        for points, value in AUTHORS_FRIEDMAN.items()
    }
    pairs |= {f"cancer {prior}": ("nll", value) for prior, value in AUTHORS_CANCER.items()}
    found = {n: (_mean(rows, n, f), v) for n, (f, v) in pairs.items() if n in known}
    yield (
        "no worse than the authors' figures by .05 (theirs: lambda per weight; Friedman with .8 N "
        "training points, inputs not standardized; cancer one split of 455 / 114)",
        all(own < theirs + 0.05 for own, theirs in found.values()),
        "; ".join(f"{n} {own:.3f}, authors {theirs:.3f}" for n, (own, theirs) in found.items()),
    )


def _speed(rows: Sequence[Row]) -> Iterator[Check]:
    dense = _mean(rows, "wide plain", "latency_ms")
    for share in ("75%", "90%"):
        own = _mean(rows, f"wide DHS 16x16 {share}", "latency_ms")
        yield (
            f"wide DHS at {share}: faster than the dense network, best library",
            own < dense,
            f"{own:.3f} ms against {dense:.3f} ms, {dense / own:.1f} times",
        )


EXPERIMENT = DsmExperiment()
