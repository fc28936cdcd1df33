"""BioHama: a stream of tokens -> memory; modules propose addresses, a router mixes them, what is read is the answer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .addresses import newest, oldest, shifted, winner, written
from .competition import Competition
from .config import BioHamaConfig
from .executive import Executive
from .hebbian import HebbianMemory
from .message_passing import MessagePassing
from .router import Router
from .working_memory import WorkingMemory

POINTERS = ("forward", "backward", "stay")  # they move the last address; all others propose one of their own


class Phase(NamedTuple):
    """How soft the model is; the default is how it is used, training begins softer (see ``objective``).

    floor: share of the router's weight that is spread evenly. drop: probability that a module is not available to a sample.
    threshold: the router's; None: the config's. hard: one slot wins where config.winner_take_all. binary: consume is 0 or 1.
    """

    floor: float = 0.0
    drop: float = 0.0
    threshold: float | None = None
    hard: bool = True
    binary: bool = True
    wake: bool = True
    sharp: float = 30.0


class Control(NamedTuple):
    """What the nodes decide in every step: router_logit (..., M); content and own (...) in 0..1.

    content: how much a slot counts as content. own: how surely the token of this step is the model's last answer.
    """

    router_logit: Tensor
    content: Tensor
    own: Tensor


class Trace(NamedTuple):
    """All that happened in a stream.

    logits: (B, T, V), log-probabilities. router: (B, T, M), the weights. router_logit: (B, T, M).
    proposals: (B, T, M, S + 1), the modules' addresses over S = T slots and the null slot, before winners take all.
    address: (B, T, S + 1), mixed. answers: (B, S + 1, V), the probabilities that each slot alone would give.
    names: the M modules.
    """

    logits: Tensor
    router: Tensor
    router_logit: Tensor
    proposals: Tensor
    address: Tensor
    answers: Tensor
    names: tuple[str, ...]
    control: Control
    event: Tensor


class BioHamaModel(nn.Module):
    """tokens (B, T) -> logits (B, T, V), causal. The output sees only what was read from memory.

    x = E[token];  h = GRU(x);  nodes = [W_s x; W_e h; one of each module; write gate; erase gate] + identity
    nodes exchange messages; the router weighs the modules by their nodes; the address is the weighted sum of proposals:
    forward, backward, stay: the last address moved by +1, -1, 0      oldest, newest: first and last content slot
    compete: Competition      hebb: HebbianMemory      percept: the current slot
    logits = W LayerNorm(read(address))
    """

    def __init__(self, config: BioHamaConfig) -> None:
        super().__init__()
        self.config, d, n = config, config.d_model, config.d_node
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.executive = Executive(d, config.d_hidden)
        self.sense = nn.Linear(d, n, bias=False)
        self.report = nn.Linear(config.d_hidden, n, bias=False)
        self.identity = nn.Parameter(torch.randn(config.n_nodes, n) * 0.5)
        self.messages = MessagePassing(
            config.n_nodes, n, config.n_senders, config.n_rounds, config.n_heads, config.backend
        )
        with torch.no_grad():  # whoever does not send learns nothing: the two that know something begin as senders
            self.messages.attention.salience_bias[:2] = 2.0
        self.router = Router(len(config.modules), n, config.threshold)
        self.content = nn.Linear(n, 1)
        self.own = nn.Linear(n, 1)
        self.memory = WorkingMemory(d, d, config.read_width, config.backend)
        self.competition = Competition(d, config.inhibition)
        self.hebbian = HebbianMemory(d, config.d_cue, config.cue_active, config.tied_cue, config.backend)
        self.log_scale = nn.Parameter(torch.tensor(-0.7))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) int64 in 0..vocab_size-1, 1 <= T <= n_slots.

        [:, t] depends on tokens[:, :t+1] alone. Raises: TypeError, ValueError as ``check``. Gradients: every parameter
        that the configuration uses. Determinism: bitwise.
        """
        return self.trace(tokens).logits

    def decode(self, read: Tensor) -> Tensor:
        """Logits (..., V) of what was read (..., D)."""
        scale = self.log_scale.exp() * self.config.d_model**-0.5
        return F.linear(read * scale, self.embedding.weight, self.bias)

    def control(self, x: Tensor, h: Tensor) -> Control:
        """What the nodes decide, from x (..., D) and the executive's h (..., d_hidden)."""
        m = len(self.config.modules)
        nodes = self.identity.expand(*x.shape[:-1], -1, -1)
        heard = torch.stack([self.sense(x), self.report(h)], -2)
        nodes = torch.cat([nodes[..., :2, :] + heard, nodes[..., 2:, :]], -2)
        nodes = self.messages(nodes.flatten(0, -3)).view(nodes.shape)
        return Control(
            self.router.logits(nodes[..., 2 : m + 2, :]),
            self.content(nodes[..., m + 2, :]).squeeze(-1).sigmoid(),
            self.own(nodes[..., m + 3, :]).squeeze(-1).sigmoid(),
        )

    def trace(self, tokens: Tensor, phase: Phase | None = None) -> Trace:
        """All that happens in the stream; arguments and errors as ``forward``; phase None: as the model is used."""
        check(tokens, self.config)
        phase = phase or Phase()
        x = self.embedding(tokens)
        event = self.executive.event(x)
        control = self.control(x, self.executive(x, _binary(event) if phase.wake else event))
        if phase.binary:
            control = control._replace(own=_binary(control.own))
        answers = self.decode(self.memory.write(x)).softmax(-1)
        heard = answers[:, :-1].detach().gather(2, tokens.unsqueeze(1).expand(-1, tokens.shape[1], -1)).transpose(1, 2)
        router = self._route(control.router_logit, phase)
        soft = self._proposals(x, control, heard, phase)
        own = [winner(p) if phase.hard and self.config.winner_take_all else p for p in soft]
        address, before = self._follow(router, own, heard, control.own)
        moves = [self._move(name, before, 1.0) for name in self.config.modules if name in POINTERS]
        if "forward" in self.config.modules:  # there is no slot 1 yet in step 0
            moves[0] = torch.cat([torch.zeros_like(moves[0][:, :1]), moves[0][:, 1:]], 1)
        proposals = torch.stack([*moves, *soft], 2)
        logits = (self.memory.read(address, answers) + 1e-5).log()
        return Trace(logits, router, control.router_logit, proposals, address, answers, self.config.modules, control, event)

    def _route(self, logit: Tensor, phase: Phase) -> Tensor:
        if phase.drop > 0:
            lost = torch.rand(len(logit), 1, logit.shape[-1], device=logit.device) < phase.drop
            lost &= ~lost.all(-1, keepdim=True)
            logit = logit.masked_fill(lost, float("-inf"))
        return self.router.choose(logit, _or(phase.threshold, self.config.threshold), phase.floor)

    def _proposals(self, x: Tensor, control: Control, heard: Tensor, phase: Phase) -> list[Tensor]:
        """(B, T, S + 1) of every module that is no pointer, in the order of config.modules."""
        length, found = x.shape[1], []
        for name in self.config.modules:
            if name == "compete":
                found.append(self.competition(x, control.content, control.own, heard, phase.hard, phase.sharp))
            elif name == "percept":
                found.append(torch.eye(length, length + 1, device=x.device).expand(len(x), -1, -1))
            elif name == "oldest":
                found.append(F.pad(oldest(control.content).unsqueeze(1) * written(length, x.device), (0, 1)))
            elif name == "newest":
                found.append(F.pad(newest(control.content), (0, 1)))
            elif name == "hebb":
                found.append(F.pad(self.hebbian(x), (0, 1)))
        return found

    def _follow(self, router: Tensor, own: list[Tensor], heard: Tensor, echo: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, S + 1), the mixed address of every step, and (B, T, S), where the pointers started from.

        Only this depends on the step before: a token that is the model's own answer tells where it had looked.
        """
        names = self.config.modules
        moving = [m for m, name in enumerate(names) if name in POINTERS]
        still = [m for m, name in enumerate(names) if name not in POINTERS]
        base = torch.zeros(*heard.shape[:2], heard.shape[1] + 1, device=heard.device)
        if own:
            base = torch.einsum("btm,mbts->bts", router[..., still], torch.stack(own))
        weight = router[..., moving].unsqueeze(-1).unbind(1)
        last, addresses, starts = _first_slot(base[:, 0, :-1]), [], []
        for t, here in enumerate(base.unbind(1)):
            if t:
                last = corrected(last, heard[:, t], echo[:, t])
            starts.append(last)
            for j, m in enumerate(moving):
                move = self._move(names[m], last, weight[t][:, j])
                here = here + (move if t or names[m] != "forward" else 0 * move)
            last = here[:, :-1]
            addresses.append(here)
        return torch.stack(addresses, 1), torch.stack(starts, 1)

    @staticmethod
    def _move(name: str, address: Tensor, weight: Tensor | float) -> Tensor:
        """address (..., S) moved as the pointer says, times weight, with an empty null slot."""
        by = {"forward": 1, "backward": -1}.get(name, 0)
        moved = shifted(address, by) if by else address
        return F.pad(moved * weight, (0, 1))


def corrected(address: Tensor, heard: Tensor, own: Tensor) -> Tensor:
    """address (B, S) in the light of the token that followed, heard (B, S) = P(token | slot), as far as own (B,)."""
    fits = address.detach() * (heard + 1e-3)  # what was heard is a fact: no gradient through it
    fits = fits / (fits.sum(1, keepdim=True) + 1e-6)
    return torch.lerp(address, fits, own.unsqueeze(1))


def _first_slot(like: Tensor) -> Tensor:
    """The address before the first step: slot 0."""
    first = torch.zeros_like(like)
    first[..., 0] = 1
    return first


def _binary(gate: Tensor) -> Tensor:
    return (gate > 0.5).to(gate.dtype) + gate - gate.detach()


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def check(tokens: Tensor, config: BioHamaConfig) -> None:
    """Refuses what the model cannot read. Raises: TypeError for a wrong dtype; ValueError for a wrong shape or symbol."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be an int64 tensor, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be (B, T) with B >= 1 and T >= 1, got {tuple(tokens.shape)}")
    if tokens.shape[1] > config.n_slots:
        raise ValueError(f"tokens must be at most n_slots={config.n_slots} long, got T={tokens.shape[1]}")
    look = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
        raise ValueError(
            f"tokens must be in 0..vocab_size-1={config.vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}"
        )
