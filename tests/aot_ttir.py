"""Finds addresses whose products wrap in 32 bits, in the text of a kernel's Triton IR (after inlining).

``narrow_products`` follows every offset added to a large tensor's pointer back to its sources and bounds each 32-bit
multiplication on the way by interval arithmetic, from the values that the launch passed: program ids by the grid, size
arguments exactly, ranges and constants as they stand, and a loaded value by nothing, so that a neuron's index times a
row length passes in 64 bits only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_RESULT = re.compile(r"^(%[\w$.-]+)(?::(\d+))? = (.*)$")
_ARGUMENT = re.compile(r"(%[\w$.-]+): (!tt\.ptr<[^>]*>|!?[\w.<>]+)")
_SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi", "arith.extui")
_INT32 = (-(2**31), 2**31 - 1)
_ANY = (-(2**63), 2**63 - 1)
Interval = tuple[int, int]


@dataclass
class _Node:
    """One SSA value: the operation that made it, the values it came from, and the line it stands on."""

    op: str
    text: str = ""
    sources: list[int] = field(default_factory=list)


@dataclass
class _Region:
    """An open region: the names it defines, and where its yields go (results and loop-carried arguments)."""

    results: list[int]
    carried: list[int]
    names: dict[str, int] = field(default_factory=dict)


class _Graph:
    """Data flow of one ``tt.func``. MLIR may use a name again in a sibling region, hence the stack of scopes."""

    def __init__(self, ttir: str) -> None:
        self.nodes: list[_Node] = []
        self.arguments: dict[str, int] = {}
        self.scopes = [_Region([], [])]
        for line in ttir.splitlines():
            text = re.sub(r"\s*loc\(.*?\)+$", "", line.strip())
            if text and not text.startswith(("#", "module")):
                self._read(text)

    def _new(self, name: str, op: str, text: str = "", sources: list[int] | None = None) -> int:
        self.nodes.append(_Node(op, text, list(sources or [])))
        self.scopes[-1].names[name] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def _find(self, text: str) -> list[int]:
        """The values named in a piece of text, innermost scope first."""
        found = []
        for name in _VALUE.findall(text):
            for candidate in (name, name.split("#")[0]):
                scope = next((s for s in reversed(self.scopes) if candidate in s.names), None)
                if scope is not None:
                    found.append(scope.names[candidate])
                    break
        return found

    def _read(self, text: str) -> None:
        if text.startswith("tt.func"):
            for name, kind in _ARGUMENT.findall(re.sub(r"loc\([^()]*(\(#\w+\))?\)", "", text)):
                self.arguments[name[1:]] = self._new(name, "pointer" if "ptr" in kind else "argument", text)
        elif text.startswith("}"):
            region = self.scopes.pop() if len(self.scopes) > 1 else self.scopes[0]
            if text.endswith("{"):  # } else {   and   } do {
                self.scopes.append(_Region(region.results, region.carried))
        elif text.startswith(("scf.yield", "scf.condition")):
            values = self._find(text.partition(")")[2] if text.startswith("scf.condition") else text.split(" : ")[0])
            for target in (self.scopes[-1].results, self.scopes[-1].carried):
                for node, value in zip(target, values, strict=False):
                    self.nodes[node].sources.append(value)
        elif text.startswith("^"):  # arguments of the second region of scf.while: any of its results may arrive there
            for name in _VALUE.findall(text):
                self._new(name, "block", text, self.scopes[-1].results)
        else:
            self._operation(text)

    def _operation(self, text: str) -> None:
        match = _RESULT.match(text)
        name, number, body = match.groups() if match else ("", None, text)
        op = body.split(" ")[0].split("(")[0].strip('"')
        head = body if op.startswith("scf.") else body.split(" : ")[0]
        initial = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", head) if op in ("scf.for", "scf.while") else []
        counter = re.search(r"scf\.for (?:unsigned )?(%[\w$.-]+) =", body)
        if counter:
            initial = [pair for pair in initial if pair[0] != counter.group(1)]
        start = [self._find(value) for _, value in initial]
        sources = [] if op.startswith("scf.") else self._find(head)
        parts = [f"{name}#{i}" for i in range(int(number))] if number else [name] * bool(name)
        results = [self._new(part, op, text, sources) for part in parts]
        if text.endswith("{"):
            self.scopes.append(_Region(results, []))
            if counter:
                bounds = body.partition(" = ")[2].split(" step ")[0]
                self._new(counter.group(1), "counter", text, self._find(bounds))
            for (carried, _), value in zip(initial, start, strict=True):
                self.scopes[-1].carried.append(self._new(carried, op, text, value))
            for result, value in zip(results, start, strict=False):
                self.nodes[result].sources.extend(value)

    def walk(self, start: list[int]) -> Iterator[int]:
        """The values that ``start`` is computed from; a loaded value is a source, whatever its address was made of."""
        seen: set[int] = set()
        todo = list(start)
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                yield node
                sources = self.nodes[node].sources
                if self.nodes[node].op == "arith.select":
                    sources = sources[1:]  # the condition chooses between addresses, it is not part of one
                if self.nodes[node].op != "tt.load":
                    todo.extend(sources)


@dataclass
class Probe:
    """One launch: the pointers with 2**31 elements and more, its integer arguments and its grid."""

    large: list[str]
    values: dict[str, int]
    grid: tuple[int, ...]


class _Bounds:
    """Intervals of a graph's integers under one probe; what is not understood may be anything."""

    def __init__(self, graph: _Graph, probe: Probe) -> None:
        self.graph = graph
        self.known: dict[int, Interval] = {}
        for name, value in probe.values.items():
            if name in graph.arguments:
                self.known[graph.arguments[name]] = (value, value)
        self.grid = dict(zip("xyz", probe.grid, strict=False))

    def of(self, node: int) -> Interval:
        if node not in self.known:
            self.known[node] = _ANY  # what a loop carries depends on itself
            self.known[node] = self._computed(self.graph.nodes[node])
        return self.known[node]

    def _computed(self, node: _Node) -> Interval:
        if node.op == "arith.constant":
            value = re.search(r"constant (?:dense<)?(-?\d+)>? :", node.text)
            return (int(value.group(1)),) * 2 if value else _ANY
        if node.op == "tt.get_program_id":
            return 0, self.grid.get(node.text.split("tt.get_program_id ")[1][0], 1) - 1
        if node.op == "tt.make_range":
            first, end = (int(re.search(rf"{key} = (\d+)", node.text).group(1)) for key in ("start", "end"))
            return first, end - 1
        sides = [self.of(source) for source in node.sources]
        if node.op in _SAME or node.op == "arith.trunci":
            return sides[0]
        if node.op in ("counter", "arith.select"):
            sides = sides[-2:]
            return min(low for low, _ in sides), max(high for _, high in sides)
        return self._binary(node.op, *sides) if len(sides) == 2 else _ANY

    @staticmethod
    def _binary(op: str, left: Interval, right: Interval) -> Interval:
        ends = [(a, b) for a in left for b in right]
        match op:
            case "arith.addi":
                return left[0] + right[0], left[1] + right[1]
            case "arith.subi":
                return left[0] - right[1], left[1] - right[0]
            case "arith.muli":
                products = [a * b for a, b in ends]
                return min(products), max(products)
            case "arith.minsi" | "arith.maxsi":
                choose = min if op == "arith.minsi" else max
                return choose(left[0], right[0]), choose(left[1], right[1])
            case "arith.divsi" if right[0] > 0:
                quotients = [abs(a) // b * (-1 if a < 0 else 1) for a, b in ends]
                return min(quotients), max(quotients)
            case "arith.remsi" if right[0] > 0:
                return (0 if left[0] >= 0 else 1 - right[1]), min(right[1] - 1, max(left[1], 0))
        return _ANY


def _is_narrow(text: str) -> bool:
    return re.search(r"(\bi|xi)32>?$", text) is not None


def narrow_products(ttir: str, probe: Probe) -> list[str]:
    """Lines of ``ttir`` whose 32-bit product can wrap on the way to an address in one of the probe's large tensors."""
    graph = _Graph(ttir)
    bounds = _Bounds(graph, probe)
    pointers = {graph.arguments[name] for name in probe.large if name in graph.arguments}
    found: set[str] = set()
    for node in graph.nodes:
        if node.op != "tt.addptr" or not pointers.intersection(graph.walk(node.sources[:1])):
            continue
        for value in graph.walk(node.sources[1:]):
            product = graph.nodes[value]
            if product.op == "arith.muli" and _is_narrow(product.text):
                low, high = bounds.of(value)
                if low < _INT32[0] or high > _INT32[1]:
                    found.add(product.text)
    return sorted(found)
