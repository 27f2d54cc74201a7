"""Examples in docstrings and Python in the pages run; what pages say of code is compared."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import tetris
from doc_names import NOT_RUN, SETUPS, names

ROOT = Path(__file__).parent.parent


def examples():
    """Every docstring of the package that holds ``>>>``, by its full name."""
    finder = doctest.DocTestFinder()
    found = {}
    for info in [None, *pkgutil.walk_packages(tetris.__path__, "tetris.")]:
        name = "tetris" if info is None else info.name
        if name.endswith(("__main__", "._C")):
            continue
        module = importlib.import_module(name)
        for test in finder.find(module, name):
            if test.examples:
                found[test.name] = (test, module)
    return found


EXAMPLES = examples()


class Shown(doctest.OutputChecker):
    """Output counts where the example shows it: many print a report whose text is not the point."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - NOT_RUN.keys()))
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test, module = EXAMPLES[name]
    test.globs = names(name, module)
    complaints = []
    runner = doctest.DocTestRunner(Shown(), optionflags=doctest.FAIL_FAST)
    runner.run(test, out=complaints.append)
    assert not complaints, "".join(complaints)


def test_namespaces_belong_to_examples():
    assert SETUPS.keys() <= EXAMPLES.keys()
    assert NOT_RUN.keys() <= EXAMPLES.keys()
