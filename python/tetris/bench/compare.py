"""Two benchmark results, row by row, with a verdict that knows how noisy each row was."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

By = Literal["time", "speedup"]
Key = tuple[tuple[str, Any], ...]  # what a row measured: (("threads", 1), ("block", "4x1"), ...)

# What tells rows of one file apart, over all kinds of result.
KEYS = ("model", "network", "optimizer", "isa", "threads", "batch", "shape", "block", "sparsity")
SECTIONS = ("rows", "training", "networks")
ENOUGH = 15  # rounds whose quartiles are taken as they are
FIELDS = {"time": ("sparse_ms", "sparse_iqr_ms"), "speedup": ("speedup", "speedup_iqr")}
DRIFT = 1.2  # of dense times, between two files, from which the machine was in another state


@dataclass(frozen=True)
class Measured:
    """One row's figure and its quartiles, as costs: larger is slower."""

    shown: float  # as it stands in the file: milliseconds, or times as fast as dense
    cost: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """A row that both results have.

    Attributes:
        key: what was measured.
        old: its figure before: milliseconds, or with ``by="speedup"`` times as fast as dense.
        new: its figure now.
        ratio: new time over old time; above 1 is slower.
        spread: the ratio at best and at worst, from the quartiles of both.
        verdict: ``slower`` or ``faster`` where even the spread says so, else ``same``.
    """

    key: dict[str, Any]
    old: float
    new: float
    ratio: float
    spread: tuple[float, float]
    verdict: Literal["slower", "faster", "same"]


@dataclass(frozen=True)
class Comparison:
    """What changed between two results."""

    by: By
    changes: list[Change]
    only_old: list[dict[str, Any]]
    only_new: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Geometric mean of the ratios."""
        return math.exp(sum(math.log(c.ratio) for c in self.changes) / len(self.changes))

    def slower_by(self, percent: float) -> list[Change]:
        """Rows that are slower beyond their spread, and by more than this many percent."""
        return [c for c in self.changes if c.verdict == "slower" and c.ratio > 1 + percent / 100]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "geometric_mean": self.mean}


def load(path: Path) -> dict[str, Any]:
    """Reads a result of ``tetris bench`` or of the repository's benchmarks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or no result with rows.
    """
    try:
        result = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(result, dict) or "rows" not in result:
        raise ValueError(f'{path} is no benchmark result: it has no list "rows"')
    for section in SECTIONS:
        rows = result.get(section, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f'{path} is no benchmark result: "{section}" is no list of objects')
        for row in rows:
            for name, value in row.items():
                if name in KEYS and not isinstance(value, (str, int, float)):
                    raise ValueError(
                        f'{path} is no benchmark result: "{name}" of a row must be a text or a '
                        f"number (got {value!r})"
                    )
    machine = result.get("machine") or {}
    if not isinstance(machine, dict) or not isinstance(machine.get("versions", {}), dict):
        raise ValueError(f'{path} is no benchmark result: "machine" does not describe one')
    return result


def compare(old: Path, new: Path, by: By = "time") -> Comparison:
    """Compares two result files.

    A row is ``slower`` if its new lower quartile lies above its old upper quartile, ``faster`` if
    its new upper quartile lies below its old lower one, and ``same`` if the quartiles overlap:
    what a second run of the same build may well show. Quartiles of few rounds are themselves
    uncertain: of fewer than 15 they are moved away from the median, by the power 15 / rounds. Of
    two equal layers one in 300 is then called slower at 15 rounds, and 1.4 % at 5, not 10 %.

    Args:
        old: JSON of ``tetris bench --json`` or ``python -m benchmarks.gemm`` (or ``conv``), before.
        new: the same, now.
        by: ``time`` compares the sparse times, for one machine in one state. ``speedup`` compares
            speed-ups over dense, each timed beside its dense rival, which also holds when the
            machine was slower as a whole.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no result, lacks the figure, names a row twice, or no row is in both.

    Example:
        >>> import json, pathlib, tempfile
        >>> from tetris.bench.compare import compare
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name, ms in (("old", 2.0), ("new", 1.0)):
        ...     row = {"block": "4x1", "sparse_ms": ms, "sparse_iqr_ms": [0.9 * ms, 1.1 * ms]}
        ...     _ = (folder / f"{name}.json").write_text(json.dumps({"rows": [row]}))
        >>> change = compare(folder / "old.json", folder / "new.json").changes[0]
        >>> change.ratio, change.verdict
        (0.5, 'faster')
    """
    results = load(old), load(new)
    before, now = (_measured(r, path, by) for r, path in zip(results, (old, new), strict=True))
    common = [key for key in before if key in now]
    if not common:
        raise ValueError(f"{old} and {new} have no row in common")
    return Comparison(
        by,
        [_change(key, before[key], now[key]) for key in common],
        [dict(key) for key in before if key not in now],
        [dict(key) for key in now if key not in before],
        _differences(*results) + _unrest(by, *results),
    )


def _measured(result: dict[str, Any], path: Path, by: By) -> dict[Key, Measured]:
    name, spread = FIELDS[by]
    cost: Callable[[float], float] = (lambda v: v) if by == "time" else (lambda v: 1 / v)
    found: dict[Key, Measured] = {}
    for section, row in ((s, row) for s in SECTIONS for row in result.get(s, [])):
        if name not in row or spread not in row:
            continue
        step = (("step", "training"),) if section == "training" else ()
        key = step + tuple((k, row[k]) for k in KEYS if k in row)
        quartiles = row[spread]
        if not (isinstance(quartiles, list) and len(quartiles) == 2):
            raise ValueError(f"{path}: {spread} of {_words(key)} must be a pair (got {quartiles})")
        got = [row[name], *quartiles]
        if not all(isinstance(v, (int, float)) and 0 < v < math.inf for v in got):
            raise ValueError(f"{path}: {name} of {_words(key)} must be above 0 (got {got})")
        if key in found:
            raise ValueError(f"{path} has two rows for {_words(key)}")
        middle = cost(row[name])
        low, high = (middle * (v / middle) ** _widening(row) for v in sorted(map(cost, quartiles)))
        found[key] = Measured(row[name], middle, low, high)
    if not found:
        raise ValueError(f"{path} has no row with {name} and {spread}")
    return found


def _widening(row: dict[str, Any]) -> float:
    """How much farther than its quartiles a row of few rounds must be from another."""
    rounds = row.get("rounds", ENOUGH)
    known = isinstance(rounds, int) and not isinstance(rounds, bool) and rounds > 0
    return max(1.0, ENOUGH / rounds) if known else 1.0


def _change(key: Key, old: Measured, new: Measured) -> Change:
    low, high = new.low / old.high, new.high / old.low
    verdict = "slower" if low > 1 else "faster" if high < 1 else "same"
    return Change(dict(key), old.shown, new.shown, new.cost / old.cost, (low, high), verdict)


def _unrest(by: By, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What says that the machine was not in one state, of times: dense ones should not change."""
    if by != "time":
        return []
    dense: list[dict[Key, float]] = []
    for result in (old, new):
        rows = [row for section in SECTIONS for row in result.get(section, [])]
        dense.append(
            {
                tuple((k, row[k]) for k in KEYS if k in row): row["dense_ms"]
                for row in rows
                if isinstance(row.get("dense_ms"), (int, float)) and row["dense_ms"] > 0
            }
        )
    ratios = [dense[1][key] / dense[0][key] for key in dense[0] if key in dense[1]]
    if not ratios or 1 / DRIFT < (ratio := statistics.median(ratios)) < DRIFT:
        return []
    return [
        f"the machine's state differs: dense layers take {ratio:.2f} times as long (median), so do "
        "not believe these verdicts; --by speedup compares each row with its dense rival"
    ]


def _words(key: Key) -> str:
    return ", ".join(f"{name} {value}" for name, value in key)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What besides the code may have changed the times."""
    machines = [result.get("machine") or {} for result in (old, new)]
    if not all(machines):
        return ["a file does not say which machine it was measured on"]

    def told(machine: dict) -> dict[str, Any]:
        versions = {f"version of {k}": v for k, v in machine.get("versions", {}).items()}
        versions.pop("version of tetris", None)  # comparing those is what this is for
        return {k: machine.get(k) for k in ("cpu", "cores", "system", "isas")} | versions

    before, now = map(told, machines)
    return [
        f"{name} differs: {before.get(name)} and {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
