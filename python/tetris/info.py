"""What this build is and what it runs on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from . import _C, tuning
from .environment import problems


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
        cuda_targets: GPUs that they are compiled for, empty without; newer ones compile the last
            (PTX) when a kernel is first used.
        cuda_why: Why this build has CUDA kernels, or none.
        gpu: Name and compute capability of the current GPU, None without.
        forced_cuda_kernel: Kernel forced by ``TETRIS_CUDA_KERNEL``, None if unset.
        tuned: Problems measured by ``tetris tune`` for each device.
        problems: What is wrong with ``TETRIS_*`` environment variables, a sentence each.

    Example:
        >>> found = tetris.info()
        >>> found.isa_in_use in found.isas_supported
        True
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
    cuda_targets: tuple[str, ...]
    cuda_why: str
    gpu: str | None
    forced_cuda_kernel: str | None
    tuned: dict[str, int]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        rows = [
            ("tetris", self.version),
            ("torch", self.torch),
            ("CPU kernels", f"{self.isa_in_use} in use; built: {', '.join(self.isas_built)}; "
                            f"this CPU runs: {', '.join(self.isas_supported)}"),
            ("TETRIS_CPU_ISA", self.forced_isa or "not set"),
            ("last kernel", self.last_kernel or "none yet"),
            ("threads", str(self.threads)),
            ("CUDA kernels", f"yes: {', '.join(self.cuda_targets)}" if self.cuda
                             else f"no: {self.cuda_why}"),
        ]  # fmt: skip
        if self.cuda:
            rows += [
                ("GPU", self.gpu or "none seen"),
                ("TETRIS_CUDA_KERNEL", self.forced_cuda_kernel or "not set"),
                ("tuned", ", ".join(f"{n} problems on {d}" for d, n in self.tuned.items()) or "no"),
            ]
        rows += [("wrong", problem) for problem in self.problems]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


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
        cuda=_C.cuda_built(),
        cuda_targets=tuple(_C.cuda_targets()),
        cuda_why=_C.cuda_why(),
        gpu=_gpu(),
        forced_cuda_kernel=os.environ.get("TETRIS_CUDA_KERNEL"),
        tuned={device: len(table) for device, table in tuning.loaded.items()},
        problems=problems(os.environ),
    )


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} ({major}.{minor})"
