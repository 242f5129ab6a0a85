"""Links of the documents lead somewhere, in a repository browser too."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import REPOSITORY

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])


def broken_links(page: Path) -> Iterator[str]:
    """Links of a page to files that do not exist, or to headings that the file does not have."""
    for link in re.findall(r"\]\(([^)\s]+)\)", _without_code(page)):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in _headings(target)):
            yield link


def _headings(page: Path) -> set[str]:
    """Anchors that a repository browser gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", _without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[good](page.md#one) [good](#one) [no file](other.md) [no heading](page.md#two)\n")

    assert list(broken_links(page)) == ["other.md", "page.md#two"]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_paths_of_the_repository_exist(page: Path) -> None:
    paths = re.findall(r"`((?:ssd_fast|dali_pipelines|kernels|docs|tests|configs)/[\w./]*)`", page.read_text("utf-8"))

    assert [path for path in paths if "NAME" not in path and not (REPOSITORY / path).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [page for page in DOCUMENTS if page.parent == REPOSITORY / "docs" and page.name != "index.md"]

    assert [page.name for page in pages if f"({page.name})" not in index] == []
    assert [page.name for page in pages if f"\n{page.stem}\n" not in index] == []  # in a toctree
