"""One HTML page that needs nothing but itself: pictures inside it, no script, light and dark, wide and narrow."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #595959; --paper: #fff; --line: #d5d5d5; --panel: #f5f5f5 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --soft: #b3b3b3; --paper: #16181b; --line: #3a3e44; --panel: #202329 }
}
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif }
h1 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem }
p, li { max-width: 46rem } .soft { color: var(--soft) }
.wide { overflow-x: auto; margin: 1rem 0 }
figure { margin: 1rem 0 } figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem }
figure img { display: block; width: 100%; min-width: 40rem; height: auto; background: #fff; border-radius: 4px }
table { border-collapse: collapse; font-size: .92rem } th { font-weight: 600 }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.note { background: var(--panel); border-left: 4px solid #e69f00; padding: .6rem 1rem; max-width: 44rem }
.text { background: #fafafa; color: #1b1b1b; padding: .5rem .7rem; font: .9rem/1.7 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 4px }
.text b { font-weight: inherit; border-radius: 2px } code { font-size: .9em }
"""


def page(title: str, body: Iterable[str]) -> str:
    """The whole document. Args: title, plain text; body, pieces of HTML in order."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """A section begins."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """Plain text. Args: kind, "" or one of the page's classes: "soft", "note"."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def picture(path: Path, alt: str, caption: str) -> str:
    """A PNG file inside the page; on a narrow screen it scrolls sideways instead of shrinking out of sight."""
    data = b64encode(path.read_bytes()).decode()
    return (
        f'<figure><div class="wide" tabindex="0"><img src="data:image/png;base64,{data}" alt="{escape(alt)}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows of plain values; numbers stand to the right."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for row in rows:
        cells = (f'<td class="number">{v}</td>' if _is_number(v) else f"<td>{escape(str(v))}</td>" for v in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def coloured(text: str, strength: np.ndarray) -> str:
    """A text whose background tells a number per character: strength (len(text),) in [0, 1], 0 for none."""
    pieces, begin = [], 0
    levels = np.round(strength * 8).astype(int)
    changes = [*(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(text)]
    for end in changes:
        shown = escape(text[begin:end].replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"))
        level = levels[begin] if begin < len(levels) else 0
        pieces.append(f'<b style="background:rgba(230,159,0,{level / 10:.1f})">{shown}</b>' if level else shown)
        begin = end
    return f'<div class="text">{"".join(pieces)}</div>'


def _is_number(value: object) -> bool:
    return isinstance(value, str) and value.lstrip("+-").translate(str.maketrans("", "", ",.% ")).isdigit()
