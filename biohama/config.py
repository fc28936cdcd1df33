"""Every size of a BioHama, checked once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

INFORMED = 2  # nodes that know something of the stream before messages: the senses, the executive
MODULES = ("forward", "backward", "stay", "oldest", "newest", "compete", "hebb", "percept")
BACKENDS = ("auto", "triton", "reference", "dense")


@dataclass(frozen=True)
class BioHamaConfig:
    """Sizes of a BioHama, and switches that take a part out for an ablation. The default has 0.71 M parameters.

    vocab_size: V, number of tokens.
    d_model: D, width of a token's embedding and of a slot's value.
    d_hidden: width of the executive GRU.
    d_node: width of a node that exchanges messages; a multiple of n_heads.
    d_cue: width of the Hebbian memory's cue code, of which cue_active are nonzero.
    n_heads: heads of the attention among nodes.
    n_senders: nodes that send in a round of messages: the senses, the executive, and the most salient others.
    n_rounds: rounds of messages; 0: none, so that nothing of the input reaches router and gates.
    n_slots: longest stream in tokens; every token takes a slot.
    read_width: slots that a read may combine; 0: all.
    modules: which modules propose addresses, of MODULES.
    threshold: router weights below it are cut and the rest renormalised; 0: a plain softmax.
    winner_take_all: modules that look by content propose one slot, not a mixture.
    tied_cue: one map makes the cue that is stored and the cue that is asked with.
    inhibition: the competing queue does not return to a slot it has consumed.
    backend: which implementation of the operations to use, see bio_kernels.
    """

    vocab_size: int = 100
    d_model: int = 192
    d_hidden: int = 296
    d_node: int = 96
    d_cue: int = 512
    cue_active: int = 16
    n_heads: int = 1
    n_senders: int = 4
    n_rounds: int = 1
    n_slots: int = 1024
    read_width: int = 8
    modules: tuple[str, ...] = MODULES
    threshold: float = 0.1
    winner_take_all: bool = True
    tied_cue: bool = True
    inhibition: bool = True
    backend: str = "auto"

    @classmethod
    def tiny(cls, **changes: Any) -> BioHamaConfig:
        """About 60 thousand parameters."""
        sizes = {"d_model": 64, "d_hidden": 64, "d_node": 32, "d_cue": 128}
        return cls(**{**sizes, **changes})

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "d_hidden", "d_node", "d_cue", "cue_active", "n_heads", "n_slots"):
            self._check_int(name, 1)
        for name in ("n_rounds", "read_width"):
            self._check_int(name, 0)
        object.__setattr__(self, "modules", self._modules())
        self._check_int("n_senders", INFORMED, self.n_nodes, "the number of nodes, len(modules) + 4")
        self._check_int("cue_active", 1, self.d_cue - 1, "d_cue - 1")
        if self.d_node % self.n_heads:
            raise ValueError(f"d_node must be a multiple of n_heads={self.n_heads}, got {self.d_node}")
        if type(self.threshold) not in (int, float) or not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be a number with 0 <= threshold < 1, got {self.threshold!r}")
        for name in ("winner_take_all", "tied_cue", "inhibition"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {self.backend!r}")

    @property
    def n_nodes(self) -> int:
        """Nodes that exchange messages: of each module, the senses, the executive, and the gates content and own."""
        return len(self.modules) + 4

    def _modules(self) -> tuple[str, ...]:
        names = self.modules
        if not isinstance(names, (tuple, list)) or not names or not all(type(name) is str for name in names):
            raise ValueError(f"modules must be names out of {', '.join(MODULES)}, got {names!r}")
        for name in names:
            if name not in MODULES or list(names).count(name) > 1:
                raise ValueError(f"modules must be different names out of {', '.join(MODULES)}, got {name!r}")
        if not set(names) - {"forward", "backward"}:
            raise ValueError(
                f"modules must have one that finds a slot by itself, got only {', '.join(names)}: nothing would be read"
            )
        return tuple(name for name in MODULES if name in names)  # one order, whatever was given

    def _check_int(self, name: str, low: int, high: int | None = None, what: str = "") -> None:
        value = getattr(self, name)
        allowed = f"an integer >= {low}" if high is None else f"an integer in {low}..{high} ({what})"
        if type(value) is not int or value < low or (high is not None and value > high):
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
