"""Every page of the built site in headless Chromium: `browse.py site` fails if one complains, or links to nothing."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=8000"]


class Page(HTMLParser):
    """What a page points at, and what can be pointed at in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Links, images, scripts and anchors."""
        found = dict(attrs)
        self.targets |= {found[name] or "" for name in ("href", "src") if name in found}
        self.anchors |= {found[name] or "" for name in ("id", "name") if name in found}


class Quiet(SimpleHTTPRequestHandler):
    """A server that says nothing."""

    def log_message(self, *_: object) -> None:
        """Not that either."""


def browse(site: Path) -> list[str]:
    """What is wrong with the pages: what the console said, diagrams that were not drawn, links to nothing."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}/"
    try:
        pages = {name: rendered(root, name) for name in names(site)}
        return [wrong for name in pages for wrong in [*pages[name][1], *broken(site, root, name, pages)]]
    finally:
        server.shutdown()
        server.server_close()


def names(site: Path) -> list[str]:
    """The pages, but for the one that says that there is none."""
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")


def rendered(root: str, name: str) -> tuple[Page, list[str]]:
    """The page after its scripts have run, and what was wrong with it."""
    with tempfile.TemporaryDirectory() as profile:
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", root + name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    wrong = [f"{name}: {said}" for said in re.findall(r"CONSOLE[:(].*", done.stderr)]
    if '<pre class="mermaid">' in done.stdout:
        wrong.append(f"{name}: a diagram was not drawn")
    return Page(done.stdout), wrong


def broken(site: Path, root: str, name: str, pages: dict[str, tuple[Page, list[str]]]) -> list[str]:
    """Where the page points at nothing, or at another server."""
    wrong = []
    for target in sorted(pages[name][0].targets):
        url = urlparse(urljoin(root + name, target))
        if url.scheme == "data":
            continue
        path = unquote(url.path).lstrip("/") or "index.html"
        if not url.geturl().startswith(root):
            wrong.append(f"{name}: {target} is on another server")
        elif not (site / path).is_file():
            wrong.append(f"{name}: {target} is not there")
        elif path in pages and unquote(url.fragment) not in pages[path][0].anchors:
            wrong.append(f"{name}: {target} has no such anchor")
    return wrong


if __name__ == "__main__":
    if CHROMIUM is None:
        sys.exit("the pages were not looked at: there is no chromium here")
    sys.exit("\n".join(browse(Path(sys.argv[1]))) or None)
