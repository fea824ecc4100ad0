"""What the pages take from elsewhere when the site is built: the README, its sections, the script that draws."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MERMAID = Path(sys.prefix) / "mermaid.min.js"  # where `make docs` puts it


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The front page is the README; the script is a file of the site, which asks no server."""
    files.append(File.generated(config, "index.md", content=linked(README.read_text())))
    if MERMAID.exists():
        files.append(File.generated(config, "mermaid.min.js", abs_src_path=str(MERMAID)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """A fact that the README says stands in the README: a page names the section."""
    return re.sub(r"^<!-- README: (.*) -->$", lambda found: linked(section(found[1])), markdown, flags=re.MULTILINE)


def section(heading: str) -> str:
    """What the README says below a heading."""
    found = sections(README.read_text())
    if heading not in found:
        raise LookupError(f"the README has no section called {heading!r}")
    return found[heading]


def sections(text: str) -> dict[str, str]:
    """What a page says, by its headings."""
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def linked(text: str) -> str:
    """Links of the README, from where the pages are."""
    return text.replace("](examples/", "](")
