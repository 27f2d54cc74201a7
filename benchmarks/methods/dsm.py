"""Dirichlet scale mixture priors: does a posterior under them survive pruning?

Networks of 16 hidden nodes are sampled on Friedman's regression (independent and correlated inputs)
and on breast cancer, by batched HMC on all seeds and by the reference sampler, NUTS, on the first;
then they are pruned, draw by draw and by one mask per chain, and attacked. Wide networks take the
scalable path, MAP, and end on the kernels. Accuracy of a regression is R^2; the latency of wide
networks is of a batch of 256.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from statistics import median

import torch
from torch import Tensor

from tetris.bayes import Posterior
from tetris.bayes.weights import Task

from . import dsm_small as small
from . import dsm_wide as wide
from .dsm_data import Points, breast_cancer, friedman
from .dsm_plots import Curves
from .dsm_small import BLOCK_PRIORS, PRIORS, AuthorsDHS, Sampling
from .experiment import Check, Claim, Row, Setting
from .progress import Progress
from .stats import by_seed, figure, mean_sd

# Short trajectories walk at random: Friedman 100, DHS, 200 + 200 iterations of 20 leapfrog steps
# had an R-hat of the outputs of 1.27, of 60 steps 1.13, and NUTS fills trees of 1023.
FRIEDMAN = {
    100: Sampling(warmup=400, draws=400, steps=50),
    200: Sampling(warmup=300, draws=300, steps=50),
    500: Sampling(warmup=250, draws=250, steps=40),
}
CANCER = Sampling(warmup=300, draws=300, steps=40)
CANCER_POINTS = 400
NUTS = Sampling(warmup=150, draws=150)
QUICK, QUICK_NUTS = Sampling(100, 100), Sampling(20, 20, depth=5)
EPOCHS = {"regression": 1500, "classification": 500}  # of MAP; of one step and of four
QUICK_EPOCHS = 200
AUTHORS_FRIEDMAN = {100: 0.357, 200: 0.223, 500: 0.198}  # DHS, notebook
AUTHORS_CANCER = {"Gaussian": 0.129, "RHS": 0.101, "DHS": 0.096, "DST": 0.098}  # notebook, NLL
CORRELATED = " correlated"


def _sizes(setting: Setting) -> tuple[int, ...]:
    return (100,) if setting.quick else (100, 200, 500)


def _kinds(setting: Setting) -> tuple[str, ...]:
    return ("",) if setting.quick else ("", CORRELATED)


def _shorter(setting: Setting, sampling: Sampling) -> Sampling:
    return QUICK if setting.quick else sampling


class DsmExperiment:
    """See the module."""

    name = "dsm"
    title = "DSM: Bayesian networks with shrinkage priors, pruned by their posterior"

    def __init__(self) -> None:
        self._sparse: list[tuple[float, float]] = []
        self._means: dict[tuple[str, int], Tensor] = {}
        self._quick = False

    def rows(self, setting: Setting, progress: Progress) -> Iterator[Row]:
        """Friedman, breast cancer, the reference sampler and the scalable path on both, wide."""
        self._sparse, self._means, self._quick = [], {}, setting.quick
        curves = Curves()
        sizes, others = _sizes(setting), list(_others(setting))
        progress.plan(
            len(sizes) * (len(PRIORS) + 1)
            + (len(PRIORS) + len(BLOCK_PRIORS) + 1)
            + sum(1 + len(setting.seeds) * fits for *_, fits in others)
            + wide.count(setting)
        )
        for points in sizes:
            for prior in PRIORS:
                yield from self._friedman(points, prior, setting, progress, curves)
            yield from self._as_the_authors(points, setting, progress)
        yield from self._cancer(setting, progress, curves)
        yield from self._compared(others, setting, progress)
        setting.out.mkdir(parents=True, exist_ok=True)
        curves.draw(setting.out / f"{self.name}-{setting.data}")
        yield from wide.rows(setting, progress)

    def _rows_of(
        self, name: str, seeds: Sequence[int], found: Sequence[Posterior], data: Points, **shares
    ) -> Iterator[Row]:
        """Rows of all seeds; what HMC predicts is kept for others to be compared with."""
        for index, (seed, posterior) in enumerate(zip(seeds, found, strict=True)):
            x, y = data.test_x[index], data.test_y[index]
            self._means[name, seed] = posterior.thin(small.SHOWN).predict(x).mean
            yield from small.rows_of(name, seed, posterior, x, y, **shares)

    def _friedman(
        self, points: int, prior: str, setting: Setting, progress: Progress, curves: Curves
    ) -> Iterator[Row]:
        """Both kinds of inputs, in one batch of chains."""
        seeds, kinds = setting.seeds, _kinds(setting)
        parts = [friedman(points, seeds, correlated=bool(kind)) for kind in kinds]
        both = Points(
            *(torch.cat(part) for part in zip(*(vars(d).values() for d in parts), strict=True))
        )
        found = small.sample(
            f"Friedman {points}, {prior}",
            both,
            PRIORS[prior],
            "regression",
            _shorter(setting, FRIEDMAN[points]),
            progress,
        )
        for index, (kind, data) in enumerate(zip(kinds, parts, strict=True)):
            name = f"Friedman {points}{kind}"
            own = found[index * len(seeds) : (index + 1) * len(seeds)]
            yield from self._rows_of(f"{name} {prior}", seeds, own, data, per_draw=(0.75,))
            if points == 100:
                for i, posterior in enumerate(own):
                    curves.add(name, prior, posterior, data.test_x[i], data.test_y[i])

    def _as_the_authors(self, points: int, setting: Setting, progress: Progress) -> Iterator[Row]:
        """Their prior, their .8 N training points, their inputs, which are not standardized."""
        data = friedman(points * 4 // 5, setting.seeds, standardize=False)
        sampling = _shorter(setting, FRIEDMAN[points])
        name = f"Friedman {points} authors' DHS"
        found = small.sample(name, data, AuthorsDHS(), "regression", sampling, progress)
        yield from self._rows_of(name, setting.seeds, found, data)

    def _cancer(self, setting: Setting, progress: Progress, curves: Curves) -> Iterator[Row]:
        data, sampling = breast_cancer(CANCER_POINTS, setting.seeds), _shorter(setting, CANCER)
        for prior, law in {**PRIORS, **BLOCK_PRIORS}.items():
            name = f"cancer {prior}"
            found = small.sample(name, data, law, "classification", sampling, progress)
            yield from self._rows_of(
                name,
                setting.seeds,
                found,
                data,
                per_draw=(0.95,),
                blocks=(0.75, 0.9),
                inputs=(0.75,),
            )
            for index, posterior in enumerate(found):
                curves.add("cancer", prior, posterior, data.test_x[index], data.test_y[index])
            self._sparse.append(small.sparse_error(found[0].chain(0), 0.75, data.test_x[0]))
        name = "cancer DHS, two hidden layers"
        found = small.sample(
            name, data, PRIORS["DHS"], "classification", sampling, progress, layers=2
        )
        yield from self._rows_of(name, setting.seeds, found, data)

    def _compared(
        self,
        others: Sequence[tuple[str, str, Task, Points, int]],
        setting: Setting,
        progress: Progress,
    ) -> Iterator[Row]:
        """The reference sampler on the first seed; MAP and draws around it on all."""
        sampling = QUICK_NUTS if setting.quick else NUTS
        for problem, prior, task, data, fits in others:
            name, law = f"{problem} {prior}", PRIORS[prior]
            epochs = QUICK_EPOCHS if setting.quick else EPOCHS[task]
            progress.describe(f"{name}: NUTS")
            runs = [("NUTS", 0, small.sample_nuts(data, law, task, sampling))]
            progress.advance()
            for index in range(len(setting.seeds) if fits else 0):
                progress.describe(f"{name}: MAP")
                found = small.fit_map(data, law, task, index, epochs)
                runs += [(way, index, posterior) for way, posterior in found.items()]
                progress.advance()
            for way, index, posterior in runs:
                seed = setting.seeds[index]
                yield from small.rows_of(
                    f"{name} {way}",
                    seed,
                    posterior,
                    data.test_x[index],
                    data.test_y[index],
                    reference=self._means[name, seed],
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
        posteriors = [
            *_close_to_gaussian(rows),
            *_samplers(rows),
            *_scalable(rows),
            *_authors(rows),
            *_converged(rows),
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


def _others(setting: Setting) -> Iterator[tuple[str, str, Task, Points, int]]:
    """Name, prior, task, data of what NUTS samples, too, and whether MAP fits it as well.

    All priors where the acceptance protocol compares them; elsewhere the Dirichlet horseshoe, of
    which there are figures by the authors.
    """
    for points, kind in product(_sizes(setting), _kinds(setting)):
        data = friedman(points, setting.seeds, correlated=bool(kind))
        fits = int(points == 100 and not kind)
        for prior in PRIORS if fits else ("DHS",):
            yield f"Friedman {points}{kind}", prior, "regression", data, fits
    data = breast_cancer(CANCER_POINTS, setting.seeds)
    for prior in PRIORS:
        yield "cancer", prior, "classification", data, 1


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.label for row in rows))


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
    for start, field, limit, far in (
        ("Friedman", "rmse", 0.03, 0.15),
        ("cancer", "nll", 0.02, 0.03),
    ):
        names = [n for n in _labels(rows) if n.startswith(start) and n.endswith(" NUTS")]
        parts, good = [], True
        for name in names:
            ((seed, nuts),) = by_seed(rows, name).items()
            hmc = by_seed(rows, name.removesuffix(" NUTS"))[seed]
            a, b = figure(hmc, field), figure(nuts, field)
            apart = figure(nuts, "distance from HMC")
            good = good and abs(a - b) < limit and apart < far
            parts.append(f"{name.removesuffix(' NUTS')} {a:.3f}, NUTS {b:.3f}, apart {apart:.3f}")
        yield (
            f"{start}, first seed: HMC within {limit:g} of NUTS ({field}), "
            f"predictive means {far:g} apart at most",
            good,
            "; ".join(parts),
        )


def _scalable(rows: Sequence[Row]) -> Iterator[Check]:
    for name, field, limit in (("Friedman 100", "rmse", 0.1), ("cancer", "nll", 0.05)):
        for prior in PRIORS:
            own = f"{name} {prior}"
            gaps = {
                way: (
                    _mean(rows, f"{own} {way}", field) - _mean(rows, own, field),
                    _mean(rows, f"{own} {way}", "distance from HMC"),
                )
                for way in ("MAP", "SWAG")
            }
            yield (
                f"{own}: the scalable path at most {limit:g} worse than HMC ({field})",
                all(gap < limit for gap, _ in gaps.values()),
                "; ".join(
                    f"{way} {gap:+.3f}, predictive mean {apart:.3f} apart"
                    for way, (gap, apart) in gaps.items()
                ),
            )


def _authors(rows: Sequence[Row]) -> Iterator[Check]:
    """Beside the notebooks' figures, and with their prior and data where these are known."""
    known = set(_labels(rows))
    for points, theirs in AUTHORS_FRIEDMAN.items():
        name = f"Friedman {points} DHS"
        if name not in known:
            continue
        field = "rmse of single draws"
        own, nuts = _mean(rows, name, field), _mean(rows, f"{name} NUTS", field)
        same = _mean(rows, f"Friedman {points} authors' DHS", field)
        yield (
            f"{name}, RMSE of single draws: no worse than the authors' {theirs:.3f} by .05",
            own < theirs + 0.05,
            f"HMC {own:.3f}, NUTS (first seed) {nuts:.3f}; their older prior on .8 N points with "
            f"inputs in [0, 1] {same:.3f}",
        )
    for prior, theirs in AUTHORS_CANCER.items():
        own, nuts = (_mean(rows, f"cancer {prior}{end}", "nll") for end in ("", " NUTS"))
        yield (
            f"cancer {prior}, NLL: no worse than the authors' {theirs:.3f} by .05 (one split of "
            "455 / 114; lambda per weight)",
            own < theirs + 0.05,
            f"HMC {own:.3f}, NUTS (first seed) {nuts:.3f}",
        )


def _converged(rows: Sequence[Row]) -> Iterator[Check]:
    runs = {"HMC": [], "NUTS": [], "MAP": []}
    for row in rows:
        if "converged" in row.extra and not row.variant.startswith("wide"):
            end = row.variant.rsplit(" ", 1)[-1]
            runs[end if end in runs else "MAP" if end == "SWAG" else "HMC"].append(row)
    for way, found in runs.items():
        good = sum(r.extra["converged"] for r in found)
        measured = f"{good:.0f} of {len(found)} runs"
        if way != "MAP":
            for field in ("R-hat, outputs", "R-hat, worst"):
                values = [figure(row, field) for row in found]
                measured += f"; {field}: median {median(values):.2f}, up to {max(values):.2f}"
        yield f"{way}: every run passes its own diagnostics", good == len(found), measured


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
