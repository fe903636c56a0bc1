"""Every code block of the README and the docs runs."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path
from types import ModuleType

import pytest

import eqx_transformer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S
)


def blocks(page: Path) -> list[tuple[int, str, str | None]]:
    """Line, code and, where a block is not to be run, the reason."""
    text = page.read_text()
    return [
        (text[: match.start("code")].count("\n") + 1, match["code"], match["reason"])
        for match in BLOCK.finditer(text)
    ]


def run_page(page: Path) -> int:
    """Runs the blocks of a page in order, in one namespace."""
    namespace: dict[str, object] = {"__name__": "__docs__"}
    count = 0
    for line, code, reason in blocks(page):
        if reason is None:
            # Line numbers of an error are those of the page.
            source = "\n" * (line - 1) + code
            exec(compile(source, str(page), "exec"), namespace)
            count += 1
    return count


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
@pytest.mark.usefixtures("settings_of_a_user")
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_the_readme_has_a_program():
    assert [reason for _, _, reason in blocks(ROOT / "README.md")] == [None]


def test_a_broken_page_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as info:
        run_page(page)
    assert info.traceback[-1].lineno == 7


LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"


REFERENCE = re.compile(r"^::: (\S+)$", re.M)


def public_names() -> Iterator[str]:
    """All that can be imported without an underscore."""
    yield "eqx_transformer.filter_scan"
    yield "eqx_transformer.models.presets"
    for package in pkgutil.iter_modules(eqx_transformer.__path__, "eqx_transformer."):
        if package.ispkg:
            for name, value in vars(importlib.import_module(package.name)).items():
                if not name.startswith("_") and not isinstance(value, ModuleType):
                    yield f"{package.name}.{name}"


def test_the_reference_has_every_public_name_once():
    pages = (ROOT / "docs" / "api").glob("*.md")
    listed = [name for page in pages for name in REFERENCE.findall(page.read_text())]
    assert sorted(listed) == sorted(public_names())


def test_every_page_can_be_reached():
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    assert set(re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)) == pages


def test_tables_are_up_to_date():
    """Those that a script writes say what the code says today."""
    script = run_path(str(ROOT / "docs" / "scripts" / "implementation_table.py"))
    page = script["PAGE"].read_text()
    assert script["with_table"](page) == page
