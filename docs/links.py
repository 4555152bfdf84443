"""Finds links of a built site that lead nowhere: `python -m docs.links site`.

mkdocs checks links between pages; this also checks what mkdocstrings, the theme and notebooks write, and
anchors. Links to other sites are not followed.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        values = dict(attrs)
        self.anchors |= {values.get("id") or "", values.get("name") or ""}
        for name in ("href", "src"):
            if link := values.get(name):
                self.links.append(link)


def dead_links(site: Path) -> list[str]:
    """`page: link` of each link that leads nowhere."""
    pages = {
        path: _Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("__"):
                continue
            target = unquote(parts.path)
            base = site if target.startswith("/") else path.parent
            to = (
                (base / target.lstrip("/")).resolve()
                if target
                else path.resolve()
            )
            to = to / "index.html" if to.is_dir() else to
            anchors = (
                pages[to].anchors
                if to in pages
                else {unquote(parts.fragment)}
            )
            if not to.exists() or unquote(parts.fragment) not in anchors:
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


def main() -> int:
    """Prints dead links; the exit status says whether there are any."""
    site = Path(sys.argv[1]).resolve()
    dead = dead_links(site)
    print(*dead, sep="\n", end="\n" * bool(dead))
    print(f"{len(list(site.rglob('*.html')))} pages, {len(dead)} dead links")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
