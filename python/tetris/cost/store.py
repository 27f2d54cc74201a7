"""Where the cost model of this machine is kept, and what is used when there is none.

One file for each instruction set, in the folder of :mod:`tetris.tuning`. It names processor,
instruction set and version of this library; a file of others, or one that cannot be read, is
ignored with a warning. Then, and where nothing was calibrated, the model that comes with the
library is used, which was calibrated on another machine with the same instruction set.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

from .. import _C, tuning
from ..machine import cpu_model
from ..warn import warn
from .features import TILES
from .model import CostModel


def path() -> Path:
    """The file of the instruction set in use."""
    return tuning.folder() / f"cpu-{_C.isa_in_use()}.json"


def save(model: CostModel) -> Path:
    """Keep a model for later runs on this machine; its path."""
    return tuning.write_whole(path(), model.to_json())


def default(isa: str | None = None) -> CostModel:
    """The model that comes with the library.

    Args:
        isa: Instruction set of the kernels; by default the one in use.

    Raises:
        ValueError: there is no such instruction set.

    Example:
        >>> default("avx2").isa
        'avx2'
    """
    isa = _C.isa_in_use() if isa is None else isa
    if isa not in TILES:
        raise ValueError(f"tetris.cost: there is no instruction set {isa!r} ({', '.join(TILES)})")
    text = resources.files("tetris.cost").joinpath(f"default-{isa}.json").read_text("utf-8")
    found = CostModel.from_json(text, "")
    return replace(
        found,
        source="not calibrated here (run `tetris calibrate`): the library's own figures, measured "
        f"on {found.cpu} with {found.isa}",
    )


def load() -> CostModel:
    """The model of this machine if there is one, else :func:`default`.

    Warns:
        UserWarning: there is a file, which is of no use.

    Example:
        >>> model = tetris.cost.load()
        >>> print(model)  # where its figures are from
    """
    file = path()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return default()
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(file, f"it cannot be read ({error})")
    try:
        found = CostModel.from_json(text, f"calibrated on this machine ({file})")
    except ValueError as error:
        return _ignored(file, f"it is no file of `tetris calibrate` ({error})")
    for what, its, here in (
        ("processor", found.cpu, cpu_model()),
        ("instruction set", found.isa, _C.isa_in_use()),
        ("version of tetris", found.version, _C.version),
    ):
        if its != here:
            return _ignored(file, f"it is of another {what}: {its} (here: {here})")
    return found


def _ignored(file: Path, why: str) -> CostModel:
    warn(f"tetris: ignoring {file}: {why}; run `tetris calibrate` again")
    return default()
