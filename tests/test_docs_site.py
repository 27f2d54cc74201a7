"""What tools/docs_links.py and tools/docs_docstrings.py do to a small site of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is in the extra tetris[docs]")

TOOLS = Path(__file__).parent.parent / "tools"
CONFIG = f"""
site_name: small
site_dir: site
use_directory_urls: false
hooks: [{TOOLS / "docs_links.py"}]
plugins: []
validation:
  links: {{anchors: warn, not_found: warn, unrecognized_links: warn}}
"""


def build(folder):
    """Builds what lies in a folder; (status, what mkdocs said)."""
    (folder / "mkdocs.yml").write_text(CONFIG)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path):
    """A repository with two pages, results, and a picture that only these show."""
    (tmp_path / "docs" / "api").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "docs" / "index.md").write_text(
        "# Start\n\n[r](../results/r.md#all) [a](api/a.md)\n"
    )
    (tmp_path / "docs" / "api" / "a.md").write_text("# A\n\n[c](../../code.py)\n")
    (tmp_path / "results" / "r.md").write_text(
        "# R\n\n## All\n\n![p](p.png) [s](../docs/index.md)\n"
    )
    (tmp_path / "results" / "p.png").write_bytes(b"picture")
    (tmp_path / "code.py").write_text("x = 1\n")
    return tmp_path


def test_links_into_the_repository_work_on_the_site(folder):
    status, said = build(folder)
    assert status == 0, said
    site = folder / "site"
    assert 'href="repository/results/r.html#all"' in (site / "index.html").read_text()
    assert 'href="../repository/code.py"' in (site / "api" / "a.html").read_text()
    assert (site / "repository" / "code.py").read_text() == "x = 1\n"
    results = (site / "repository" / "results" / "r.html").read_text()
    assert 'href="../../index.html"' in results
    assert 'src="p.png"' in results
    assert (site / "repository" / "results" / "p.png").read_bytes() == b"picture"


@pytest.mark.parametrize(
    "link",
    ["../none.md", "none.md", "../results/r.md#none", "api/a.md#none", "../results", "../../x.md"],
)
def test_a_link_that_leads_nowhere_fails(folder, link):
    (folder / "docs" / "index.md").write_text(f"# Start\n\n[x]({link})\n")
    status, said = build(folder)
    assert status != 0
    assert "strict" in said


def test_docstrings_become_markdown(tmp_path):
    griffe = pytest.importorskip("griffe")
    text = '"""See :func:`a.b`.\n\n    Example:\n        >>> 1\n    """'
    (tmp_path / "small.py").write_text(f"def call():\n    {text}\n")
    extensions = griffe.load_extensions(str(TOOLS / "docs_docstrings.py"))
    module = griffe.load("small", search_paths=[tmp_path], extensions=extensions)
    sections = module["call"].docstring.parse("google")
    assert sections[0].value == "See `a.b`."
    assert sections[1].kind.value == "examples"
