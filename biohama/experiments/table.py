"""The report's rows as text, and what they say about the acceptance line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LINES = {"train": 0.95, "id": 0.90, "ood": 0.70}  # what a median Seq-Acc must exceed
MARGIN = 0.20  # what it must be above the best baseline on "hard"


def acceptance(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each task, BioHama and criterion: value (median over seeds), line, met. Without baselines none for "hard"."""
    found = []
    for task, name in dict.fromkeys((row["task"], row["model"]) for row in rows):
        if not name.startswith("biohama"):
            continue
        for split, line in LINES.items():
            value = _value(rows, task, name, split)
            if value is not None:
                found.append(_criterion(task, name, split, value, line, value > line))
        others = [r["model"] for r in rows if r["task"] == task and not r["model"].startswith("biohama")]
        rivals = [v for other in others if (v := _value(rows, task, other, "hard")) is not None]
        value = _value(rows, task, name, "hard")
        if rivals and value is not None:
            line = max(rivals) + MARGIN
            found.append(_criterion(task, name, "hard", value, line, value >= line))
    return found


def _value(rows: Sequence[dict[str, Any]], task: str, model: str, split: str) -> float | None:
    same = (r["seq_acc"] for r in rows if (r["task"], r["model"], r["split"]) == (task, model, split))
    return next(same, None)


def _criterion(task: str, model: str, split: str, value: float, line: float, met: bool) -> dict[str, Any]:
    return {"task": task, "model": model, "split": split, "value": value, "line": line, "met": met}


def markdown(rows: Sequence[dict[str, Any]], pictures: Sequence[Path]) -> str:
    """The report as Markdown."""
    lines = ["# Experiments", ""]
    lines += ["Seq-Acc in free running: the share of sequences without an error. Median over seeds (minimum).", ""]
    for task in dict.fromkeys(row["task"] for row in rows):
        lines += [f"## {task}", "", *_table([row for row in rows if row["task"] == task]), ""]
        lines += [f"![{file.stem}]({file.as_posix()})" for file in pictures if file.name.startswith(f"{task}-")]
        lines += [""]
    criteria = acceptance(rows)
    if criteria:
        lines += [
            "## Against the acceptance line",
            "",
            "| task | model | split | median | line | |",
            "|---|---|---|---|---|---|",
        ]
        for c in criteria:
            sign, met = ("≥" if c["split"] == "hard" else ">"), ("met" if c["met"] else "**not met**")
            lines.append(
                f"| {c['task']} | {c['model']} | {c['split']} | {c['value']:.3f} | {sign} {c['line']:.3f} | {met} |"
            )
        lines += [""]
        if any(c["split"] == "hard" for c in criteria):
            lines += [f"The line of hard is the best baseline of the same task + {MARGIN:.2f}.", ""]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    splits = list(dict.fromkeys(row["split"] for row in rows))
    head = ["model", "parameters", "steps", "seconds", "seeds", *splits]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = {row["split"]: row for row in rows if row["model"] == name}
        first = next(iter(own.values()))
        cells = [name, f"{first['parameters']:,.0f}", f"{first['steps']:.0f}", f"{first['train_seconds']:.0f}"]
        cells += [str(len(first["seeds"])), *(_cell(own.get(split)) for split in splits)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["seq_acc"] is None:
        return f"{row['seq_acc_teacher_forced']:.3f} ({row['seq_acc_teacher_forced_worst']:.3f}), teacher-forced"
    return f"{row['seq_acc']:.3f} ({row['seq_acc_worst']:.3f})"
