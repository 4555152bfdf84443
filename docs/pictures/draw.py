"""Draws the pictures of the concept pages: `python docs/pictures/draw.py` writes the SVG files beside it."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
CELL, ROW, GAP = 46, 30, 8
COLOURS = {
    "a": "#c7d7f5",
    "b": "#cdebc9",
    "c": "#f7dfb9",
    "shared": "#d9cdf0",
    "index": "#f3cfd6",
    "free": "#ffffff",
    "window": "#c7d7f5",
    "gone": "#eeeeee",
}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1a1a1a}"
    ".s{font-size:11px;fill:#555}.b{font-weight:600}"
    "rect{stroke:#555;stroke-width:1}.p{fill:#fff;stroke:none}.d{stroke-dasharray:4 3}"
    "path{stroke:#555;fill:none;stroke-width:1.4}"
)


class Picture:
    """Shapes on a white sheet; sizes in pixels."""

    def __init__(self, width: int, height: int, title: str):
        self.size, self.title, self.parts = (width, height), title, []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        kind: str = "",
        middle: bool = False,
    ) -> None:
        anchor = ' text-anchor="middle"' if middle else ""
        self.parts.append(
            f'<text class="{kind}" x="{x}" y="{y}"{anchor}>{escape(text)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        text: str,
        colour: str,
        width: float = CELL,
        dashed=False,
    ) -> None:
        kind = ' class="d"' if dashed else ""
        fill = COLOURS[colour]
        self.parts.append(
            f'<rect{kind} x="{x}" y="{y}" width="{width}" height="{ROW}" rx="3" fill="{fill}"/>'
        )
        self.text(x + width / 2, y + 20, text, middle=True)

    def boxes(
        self,
        x: float,
        y: float,
        cells: Iterable[tuple[str, str]],
        width: float = CELL,
    ) -> None:
        for nth, (text, colour) in enumerate(cells):
            self.box(x + nth * width, y, text, colour, width)

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.parts.append(
            f'<path d="M{x} {y} L{to_x} {to_y}" marker-end="url(#arrow)"/>'
        )

    def write(self, name: str) -> None:
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style>"
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" style="fill:#555"/></marker></defs>'
            f'<rect class="p" width="{width}" height="{height}"/>'
        )
        (HERE / name).write_text(
            head + "\n".join(self.parts) + "\n</svg>\n", encoding="utf-8"
        )


def pages() -> None:
    """A pool, the page table of three sequences, and the free stack."""
    picture = Picture(
        760, 258, "A pool of pages, a page table and the free stack"
    )
    picture.text(20, 28, "page table", "b")
    rows = [
        ("sequence 0", "10 tokens", ["3", "0", "5"], "a"),
        ("sequence 1", "4 tokens", ["2"], "b"),
        ("sequence 2", "6 tokens", ["7", "1"], "c"),
    ]
    for nth, (name, tokens, ids, colour) in enumerate(rows):
        y = 42 + nth * (ROW + GAP)
        picture.text(20, y + 14, name)
        picture.text(20, y + 27, tokens, "s")
        cells = [(page, colour) for page in ids] + [("", "free")] * (
            4 - len(ids)
        )
        picture.boxes(110, y, cells)
    picture.text(340, 28, "free stack", "b")
    picture.boxes(340, 42, [("4", "free"), ("6", "free")])
    picture.text(340, 92, "num_free = 2; the next page is 6", "s")
    picture.text(340, 128, "refcounts", "b")
    picture.boxes(340, 138, [(n, "free") for n in "11110101"], 34)
    picture.text(340, 184, "sequences that own each page", "s")
    picture.text(
        20, 206, "pool: K and V of all layers, 4 token slots a page", "b"
    )
    held = [
        ("0: t4-7", "a"),
        ("1: t4-5", "c"),
        ("2: t0-3", "b"),
        ("3: t0-3", "a"),
        ("4", "free"),
        ("5: t8-9", "a"),
        ("6", "free"),
        ("7: t0-3", "c"),
    ]
    picture.boxes(20, 214, held, 90)
    picture.write("pages.svg")


def fork() -> None:
    """A fork shares pages; the first write to a shared, partly filled page copies it."""
    picture = Picture(760, 236, "A fork, and copy-on-write")
    picture.text(20, 26, "after fork(cache, [0], [1])", "b")
    for nth in range(2):
        y = 40 + nth * (ROW + GAP)
        picture.text(20, y + 20, f"sequence {nth}")
        picture.boxes(
            110, y, [("3", "shared"), ("0", "shared"), ("5", "shared")]
        )
    picture.text(110, 132, "same pages, 2 owners each;", "s")
    picture.text(110, 147, "nothing was copied", "s")
    picture.arrow(290, 78, 390, 78)
    picture.text(340, 68, "both append", "s", middle=True)
    picture.text(420, 26, "after the next token of each", "b")
    last = [("5", "a"), ("6", "b")]
    for nth in range(2):
        y = 40 + nth * (ROW + GAP)
        picture.text(420, y + 20, f"sequence {nth}")
        picture.boxes(510, y, [("3", "shared"), ("0", "shared"), last[nth]])
    picture.text(
        420, 132, "full pages stay shared; page 5, partly filled, was", "s"
    )
    picture.text(
        420, 147, "copied to page 6 before sequence 1 wrote to it", "s"
    )
    picture.text(20, 182, "page 5", "b")
    picture.boxes(
        80, 164, [("t8", "a"), ("t9", "a"), ("x", "a"), ("", "free")]
    )
    picture.text(300, 182, "page 6", "b")
    picture.boxes(
        360, 164, [("t8", "b"), ("t9", "b"), ("y", "b"), ("", "free")]
    )
    picture.text(
        20, 222, "x and y are the new tokens of sequences 0 and 1", "s"
    )
    picture.write("fork.svg")


def groups() -> None:
    """Pages of layers with and without a window."""
    picture = Picture(760, 214, "Layers with a window release pages")
    picture.text(
        20, 26, "one sequence of 24 tokens, pages of 4, windows of 8", "b"
    )
    picture.text(20, 62, "group 0: full attention")
    picture.boxes(230, 42, [(n, "c") for n in ("8", "2", "5", "0", "9", "4")])
    picture.text(520, 62, "6 pages: every token", "s")
    picture.text(20, 110, "group 1: layers 0 to 3")
    old = [("free", "gone")] * 3
    picture.boxes(
        230, 90, [*old, ("3", "window"), ("6", "window"), ("1", "window")]
    )
    picture.text(520, 110, "3 pages: the window and what lies across", "s")
    picture.text(520, 125, "its edge; the others went back to the stack", "s")
    picture.text(
        20,
        162,
        "one pool, one free stack: a page serves whichever group takes it",
    )
    picture.boxes(
        230,
        172,
        [
            (f"{n}", "c" if n in (0, 2, 4, 5, 8, 9) else "free")
            for n in range(10)
        ],
    )
    for n in (1, 3, 6):
        picture.box(230 + n * CELL, 172, str(n), "window")
    picture.text(20, 192, "pages by id", "s")
    picture.write("groups.svg")


def prefixes() -> None:
    """The index keeps pages after their sequences are gone."""
    picture = Picture(760, 226, "The prefix cache")
    picture.text(
        20, 26, "recorded, then freed: the index alone owns the pages", "b"
    )
    picture.boxes(
        20,
        40,
        [
            ("You are a", "index"),
            ("helpful as", "index"),
            ("sistant. W", "index"),
        ],
        96,
    )
    picture.text(
        320,
        60,
        "pages 3, 0, 5: reclaimable, taken in LRU order when the stack is empty",
        "s",
    )
    picture.text(230, 106, "a new prompt", "b")
    cells = [
        ("You are a", "index"),
        ("helpful as", "index"),
        ("sistant. H", "free"),
        ("ow far is", "free"),
    ]
    picture.boxes(20, 118, cells, 96)
    picture.arrow(68, 112, 68, 74)
    picture.arrow(164, 112, 164, 74)
    picture.text(
        420, 130, "match_prefix compares tokens, whole pages only:", "s"
    )
    picture.text(420, 145, "8 tokens found, the rest is left to compute", "s")
    picture.text(20, 184, "its row of the page table", "b")
    picture.boxes(
        20, 194, [("3", "shared"), ("0", "shared"), ("7", "b"), ("2", "b")]
    )
    picture.text(
        220,
        214,
        "pages 3 and 0 are shared with the index; 7 and 2 are its own",
        "s",
    )
    picture.write("prefixes.svg")


def serving() -> None:
    """A step of the server, and what happens around it."""
    picture = Picture(760, 262, "A step of the server")
    picture.text(20, 26, "request table", "b")
    rows = [
        ("r7", "running", "a"),
        ("r8", "running", "b"),
        ("r9", "prefill", "c"),
        ("r10", "waiting", "free"),
    ]
    for nth, (name, phase, colour) in enumerate(rows):
        picture.box(20, 40 + nth * (ROW + 6), f"{name}  {phase}", colour, 120)
    picture.arrow(146, 100, 196, 100)
    picture.text(206, 26, "one compiled step", "b")
    steps = [
        ("schedule: admit, preempt, allot tokens", "free"),
        ("allocate pages for the step's tokens", "free"),
        ("model: append and attend in every layer", "index"),
        ("draw, verify proposals, truncate rejected ones", "free"),
        ("finish: record prefixes, free pages", "free"),
    ]
    for nth, (text, colour) in enumerate(steps):
        picture.box(206, 40 + nth * (ROW + 6), text, colour, 320)
    picture.arrow(532, 100, 580, 100)
    picture.text(590, 26, "tokens of the step", "b")
    picture.boxes(590, 40, [("r7", "a"), ("r8", "b")], 30)
    picture.box(650, 40, "r9: chunk", "c", 96)
    picture.text(590, 90, "one for each sample that", "s")
    picture.text(590, 105, "decodes, then prompts", "s")
    picture.text(
        206,
        240,
        "run(model, state, until): a while_loop of such steps; the host looks in between",
        "s",
    )
    picture.text(20, 208, "submit ->", "s")
    picture.text(20, 224, "take <- new tokens", "s")
    picture.write("serving.svg")


if __name__ == "__main__":
    for draw in (pages, fork, groups, prefixes, serving):
        draw()
