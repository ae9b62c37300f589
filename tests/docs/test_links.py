"""Every link, heading, path and module that README.md, docs/ and experiments/ name exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A path ends before punctuation that is not part of it; `MODEL` and `*` mark a name to fill in.
PATH = re.compile(r"(?<![\w./-])(?:dsv3|tests|benchmarks|conf|experiments)/[\w./*-]*[\w/*]")
MODULE = re.compile(r"(?<![\w./-])dsv3(?!\.json)(?:\.\w+)+")
COMMAND = re.compile(r"python -m (benchmarks\.\w+|tests(?:\.\w+)+)")
PLACEHOLDER = re.compile(r"\*|[A-Z]{3,}|group")


def without_examples(text: str) -> str:
    """Return a page without its examples: docs/extending.md adds files that are not there yet."""
    return re.sub(r"```(?:diff|python|yaml|text)\n.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_module_that_a_page_names_exists(page: Path) -> None:
    text = without_examples(page.read_text())
    missing = [
        path for path in PATH.findall(text) if not PLACEHOLDER.search(path) and not (ROOT / path).exists()
    ]
    missing += [name for name in MODULE.findall(text) if not resolves(name)]
    missing += [
        name for name in COMMAND.findall(text) if not (ROOT / f"{name.replace('.', '/')}.py").exists()
    ]
    assert not missing, f"{page.name} names what does not exist: {', '.join(missing)}"


def resolves(name: str) -> bool:
    """Return True if a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False
