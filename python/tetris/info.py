"""What this build is and what it runs on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from . import _C


@dataclass(frozen=True)
class Info:
    """Build and machine; ``print`` it.

    Attributes:
        version: Of this library.
        torch: Of torch.
        isa_in_use: Instruction set the CPU kernels run on.
        isas_built: Instruction sets in this build, best first.
        isas_supported: Those this CPU can run.
        forced_isa: Environment variable ``TETRIS_CPU_ISA``, None if unset.
        last_kernel: Kernel that this thread's last op call ran, None before the first.
        threads: Threads of torch, which the kernels use; see ``torch.set_num_threads``.
        cuda: This build has CUDA kernels.
    """

    version: str
    torch: str
    isa_in_use: str
    isas_built: tuple[str, ...]
    isas_supported: tuple[str, ...]
    forced_isa: str | None
    last_kernel: str | None
    threads: int
    cuda: bool

    def __str__(self) -> str:
        rows = [
            ("tetris", self.version),
            ("torch", self.torch),
            ("CPU kernels", f"{self.isa_in_use} in use; built: {', '.join(self.isas_built)}; "
                            f"this CPU runs: {', '.join(self.isas_supported)}"),
            ("TETRIS_CPU_ISA", self.forced_isa or "not set"),
            ("last kernel", self.last_kernel or "none yet"),
            ("threads", str(self.threads)),
            ("CUDA kernels", "yes" if self.cuda else "no"),
        ]  # fmt: skip
        return "\n".join(f"{name:<15} {value}" for name, value in rows)


def info() -> Info:
    """Describe the build, the CPU and the kernels in use.

    Example:
        >>> print(tetris.info())
    """
    return Info(
        version=_C.version,
        torch=torch.__version__,
        isa_in_use=_C.isa_in_use(),
        isas_built=tuple(_C.isas_built()),
        isas_supported=tuple(_C.isas_supported()),
        forced_isa=os.environ.get("TETRIS_CPU_ISA"),
        last_kernel=_C.last_kernel() or None,
        threads=torch.get_num_threads(),
        cuda=False,
    )
