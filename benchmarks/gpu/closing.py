"""What is printed last, in few lines, because of a long output only the end is seen."""

from __future__ import annotations

from collections import Counter

from .journal import CUT, ERROR, FAILED, LEFT_OUT, OK, Journal, Row

LINES, WIDTH = 60, 160
ORDER = (OK, FAILED, ERROR, CUT, LEFT_OUT)


def wrong(journal: Journal, checks: bool) -> dict[str, Row]:
    """Rows whose check failed; of a step that is nothing but checks also those that ended with an error."""
    bad = (FAILED, ERROR, CUT) if checks else (FAILED,)
    return {key: row for key, row in journal.rows.items() if row["status"] in bad}


def counts(journal: Journal) -> str:
    found = Counter(row["status"] for row in journal.rows.values())
    told = [f"{found[status]} {status}" for status in ORDER if found[status]]
    return f"{journal.step}: {'complete' if journal.complete else 'NOT COMPLETE'}, {', '.join(told) or 'nothing done'}"


def lines(journals: list[Journal]) -> list[str]:
    """At most LINES: a line a step, what failed, what else was not done, and then what the rows have to tell."""
    found = [counts(journal) for journal in journals]
    if any(journal.rehearsal for journal in journals):
        found.append("a rehearsal without a GPU: nothing was measured")
    rows = [(f"{j.step}: {key}", row) for j in journals for key, row in j.rows.items()]
    for status, mark in ((FAILED, "FAILED"), (ERROR, "error"), (CUT, "cut")):
        found += [f"{mark}  {key}: {row.get('message', '')}" for key, row in rows if row["status"] == status]
    reasons = Counter((key.split(":")[0], row["message"]) for key, row in rows if row["status"] == LEFT_OUT)
    found += [f"left out  {step}: {why} ({number} rows)" for (step, why), number in reasons.items()]
    for key, row in rows:
        said = [row["line"]] if "line" in row else []
        found += [f"{key}: {line}" for line in [*row.get("lines", []), *said]]
    if len(found) > LINES:
        found = [*found[: LINES - 1], f"... and {len(found) - LINES + 1} lines more: see the files"]
    return [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in found]
