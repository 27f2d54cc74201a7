"""Examples in docstrings and Python in the pages run; what pages say of code is compared."""

import doctest
import importlib
import inspect
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def in_a_hurry(tmp_path, monkeypatch, request, threads):
    """Writes files elsewhere, and searches for a moment where the default is seconds.

    What measures does so on one thread: several wait for each other, on a busy machine by whole
    time slices, against which no sparsity helps.
    """
    monkeypatch.chdir(tmp_path)
    if "Latency" in request.node.name:
        threads(1)
    if "default_budget" not in request.node.name:  # which shows the default
        monkeypatch.setattr(tetris.reorder, "default_budget", lambda shape, block: 0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # tiny layers keep more than was asked for
@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - NOT_RUN.keys()))
def test_example(name):
    test, module = EXAMPLES[name]
    test.globs = names(name, module)
    complaints = []
    runner = doctest.DocTestRunner(Shown(), optionflags=doctest.FAIL_FAST)
    runner.run(test, out=complaints.append)
    assert not complaints, "".join(complaints)


def test_namespaces_belong_to_examples():
    assert SETUPS.keys() <= EXAMPLES.keys()
    assert NOT_RUN.keys() <= EXAMPLES.keys()


PAGES = {
    str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
}
# Python that is shown, hidden preparation in a comment, the reason why a block does not run.
PIECES = re.compile(
    r"<!-- run first\n(?P<hidden>.*?)-->"
    r"|(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?```python\n(?P<shown>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


def pieces(path):
    """(line, code) of what runs, in the order of the page."""
    text = path.read_text()
    for found in PIECES.finditer(text):
        if not found["reason"]:
            group = "hidden" if found["hidden"] is not None else "shown"
            yield text.count("\n", 0, found.start(group)), found[group]


def training(scope, said):
    assert "75% removed" in said
    assert scope["accuracy"](scope["dense"]) > 0.5
    assert Path("sparse.safetensors").exists()


#: What must be seen after a page has run: names -> values, and what it printed.
SEEN = {"docs/training.md": training}
#: Pages that may warn; readers who copy from others must not see a warning.
MAY_WARN = {"docs/methods.md": "VR-PGE's block is large for a network that is trained in a moment"}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize("page", sorted(p for p in PAGES if any(pieces(PAGES[p]))))
def test_page_runs_from_top_to_bottom(page, capsys):
    torch.manual_seed(0)
    if page in MAY_WARN:
        warnings.simplefilter("ignore", UserWarning)  # pytest restores the filters
    scope = {"__name__": "page"}
    for line, code in pieces(PAGES[page]):
        exec(compile("\n" * line + code, page, "exec"), scope)
    if page in SEEN:
        SEEN[page](scope, capsys.readouterr().out)


def test_what_does_not_run_says_why(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- run first\nx = 1\n-->\n```python\ny = x\n```\n"
        "<!-- not run: needs a GPU -->\n```python\nz\n```\n```sh\nls\n```\n"
    )
    assert list(pieces(page)) == [(1, "x = 1\n"), (4, "y = x\n")]


def test_ops_page_shows_the_registered_schemas():
    registered = {
        str(getattr(torch.ops.tetris, name.removeprefix("tetris::")).default._schema)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tetris::") and "." not in name
    }
    shown = re.findall(r"^tetris::.*$", PAGES["docs/ops.md"].read_text(), re.MULTILINE)
    assert len(registered) == 9
    assert sorted(shown) == sorted(registered)


def public_names():
    """Full names of what ``import tetris`` offers, its documented packages included."""
    for package in (tetris, tetris.prune, tetris.bayes):
        for name, value in vars(package).items():
            if not name.startswith("_") and not inspect.ismodule(value):
                yield f"{package.__name__}.{name}"
    for package in (tetris.analysis, tetris.cost):
        for name in package.__all__:
            if not hasattr(tetris, name):
                yield f"{package.__name__}.{name}"
    for name, value in vars(tetris.ops).items():
        if inspect.isfunction(value) and name.startswith("bs"):
            yield f"tetris.ops.{name}"


def test_everything_public_is_in_the_reference():
    shown = set()
    for page, path in PAGES.items():
        if page.startswith("docs/api/"):
            shown |= set(re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE))
    left_out = {"tetris.torch", "tetris.prune.SparsifyReport"}  # shown as tetris.SparsifyReport
    assert set(public_names()) - left_out <= shown
    for name in shown:
        pkgutil.resolve_name(name)


ARGUMENT = re.compile(r"^ {4}\*{0,2}(\w+): ", re.MULTILINE)


@pytest.mark.parametrize("name", sorted(public_names()))
def test_documented_arguments_exist(name):
    value = pkgutil.resolve_name(name)
    sections = re.split(r"^(\w[\w ]*):$", inspect.getdoc(value) or "", flags=re.MULTILINE)
    documented = {
        argument
        for title, body in zip(sections[1::2], sections[2::2], strict=True)
        if title in ("Args", "Keyword Args")
        for argument in ARGUMENT.findall(body)
    }
    if documented:
        # A signature shows the fields of **settings in its place.
        assert documented - {"settings"} <= inspect.signature(value).parameters.keys()


def test_the_picture_of_blocks_is_drawn_from_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    from benchmarks import blocks

    points = blocks.demo_points((ROOT / "benchmarks" / "results" / "demo.md").read_text())
    assert {"dense", "narrow", "1x1", "4x1", "16x16"} <= points.keys()
    assert [removed for *_, removed in points["4x1"]] == ["90%", "95%", "98%"]
    blocks.main(["--out", str(tmp_path / "blocks.png")])
    assert (tmp_path / "blocks.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no table of the demo"):
        blocks.demo_points("| a | b |")


def test_asks_name_what_exists():
    text = PAGES["docs/asks.md"].read_text()
    named = re.findall(r"`((?:tests|benchmarks|tools|examples)/[^`\s]+|setup\.py)`", text)
    assert len(named) > 60
    for name in named:
        file, _, test = name.partition("::")
        assert (ROOT / file).is_file(), name
        assert not test or f"\ndef {test}(" in (ROOT / file).read_text(), name


def test_every_ask_is_answered_and_names_its_evidence():
    text = PAGES["docs/asks.md"].read_text()
    asks = re.split(r"^## (\d+)\. .*$", text, flags=re.MULTILINE)
    assert [int(number) for number in asks[1::2]] == list(range(1, 16))
    for answer in asks[2::2]:
        assert re.match(r"\s+\*\*(Yes|Partly|Not yet)\b", answer), answer
        assert re.search(r"^\* .*`", answer, re.MULTILINE), answer
        assert re.search(r"^Asked in .*#\d+", answer, re.MULTILINE), answer
