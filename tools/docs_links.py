"""mkdocs hook: pages link to files of the repository, and the site has these files, too.

``[results](../benchmarks/results/gemm.md)`` works where a repository is browsed. On the site such a
file lies below ``repository/``, as a page if it is Markdown, and its links are followed in turn.
A file that does not exist fails the build like any other broken link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ELSEWHERE = "repository/"
# the target of [text](target#anchor) and ![text](target), in the same file or none of ours left out
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside of docs/."""
    root = _root(config)
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        file = waiting.pop()
        for target in LINK.findall(file.content_string):
            path = _repository_path(file.src_uri, target)
            site = _site_path(path)
            outside = site.startswith(ELSEWHERE) and not path.startswith("..")
            if not outside or files.get_file_from_path(site) or not (root / path).is_file():
                continue
            added = File.generated(config, site, abs_src_path=str(root / path))
            files.append(added)
            if site.endswith(".md"):
                waiting.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at the places that :func:`on_files` gave to their targets."""
    source = page.file.src_uri

    def moved(match: re.Match) -> str:
        site = _site_path(_repository_path(source, match.group(1)))
        return posixpath.relpath(site, posixpath.dirname(source) or ".")

    return LINK.sub(moved, markdown)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent


def _repository_path(source: str, target: str) -> str:
    """Where in the repository a link of a site's page leads to."""
    page = source.removeprefix(ELSEWHERE) if source.startswith(ELSEWHERE) else f"docs/{source}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _site_path(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else ELSEWHERE + path
