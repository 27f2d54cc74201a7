"""Build tetris/_C with CMake and Ninja; all metadata is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def note_of(extension: str) -> str:
    """Where the torch that an extension is for is noted: tetris.torch_version."""
    return os.path.splitext(extension)[0] + ".torch"


class CMakeBuild(build_ext):
    """Configure and build with CMake, in a folder that is kept so that rebuilds are incremental."""

    def run(self) -> None:
        """Build, and note beside the extension which torch it is for."""
        super().run()
        import torch  # the build needed it, too

        for ext in self.extensions:  # in the sources by now, if this is an editable install
            Path(note_of(self.get_ext_fullpath(ext.name))).write_text(torch.__version__ + "\n")

    def get_outputs(self) -> list[str]:
        """List the note, too."""
        outputs = super().get_outputs()
        return sorted({*outputs, *map(note_of, outputs)})

    def get_output_mapping(self) -> dict[str, str]:
        """Map the note, too: a strict editable install links nothing else."""
        mapping = super().get_output_mapping()
        return mapping | {note_of(built): note_of(kept) for built, kept in mapping.items()}

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension and put it where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder per interpreter: torch's headers and the module's suffix differ between them.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DTETRIS_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DTETRIS_CUDA={os.environ.get('TETRIS_CUDA', 'AUTO')}",
            *os.environ.get("TETRIS_CMAKE_ARGS", "").split(),
            str(ROOT),
        ]
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--target", "_C"], cwd=build, check=True)


setup(ext_modules=[Extension("tetris._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
