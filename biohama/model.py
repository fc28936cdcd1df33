"""BioHama: a stream of tokens -> memory; modules propose addresses, a router mixes them, what is read is the answer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .addresses import corrected, first_slot, newest_so_far, oldest, shifted, winner
from .competition import EXCLUDED, FOCUS, Competition
from .config import INFORMED, BioHamaConfig
from .executive import Executive
from .hebbian import HebbianMemory
from .message_passing import MessagePassing
from .recurrence import State, start, step
from .router import Router
from .working_memory import FLOOR, WorkingMemory

POINTERS = {"forward": 1, "backward": -1, "stay": 0}  # modules that move the last address, and by how much


class Phase(NamedTuple):
    """How soft the model is. The default is how it is used; most of the training is softer (see ``objective``).

    floor: share of the router's weight that is spread evenly. drop: probability that a sample lacks a module.
    threshold: the router's; None: the config's. hard: winners take all, where config.winner_take_all.
    decided: events, content and ``own`` are 0 or 1. noise, content_noise: if not decided, how much logistic noise the
    logits of events and ``own``, and those of content, get, which are also multiplied by 1 + that.
    excluded: drive that a slot without content loses. focus: of the queue.
    """

    floor: float = 0.0
    drop: float = 0.0
    threshold: float | None = None
    hard: bool = True
    decided: bool = True
    noise: float = 0.0
    content_noise: float = 0.0
    excluded: float = EXCLUDED
    focus: float = FOCUS


class Control(NamedTuple):
    """What the nodes decide in every step.

    router_logit: (..., M). content: (...) in 0..1, whether a slot counts as content. own: (...) in 0..1, whether the
    token of this step is the model's last answer; own_logit: (...).
    """

    router_logit: Tensor
    content: Tensor
    own: Tensor
    own_logit: Tensor


class Trace(NamedTuple):
    """All that happened in a stream.

    logits: (B, T, V), log-probabilities. router: (B, T, M), the weights. control: what the nodes decided.
    event_logit: (B, T), of the gates that wake the executive.
    proposals: (B, T, M, S + 1), the modules' addresses over S = T slots and the null slot, before winners take all.
    address: (B, T, S + 1), mixed. answers: (B, S + 1, V), the probabilities that each slot alone would give.
    names: the M modules.
    """

    logits: Tensor
    router: Tensor
    control: Control
    event_logit: Tensor
    proposals: Tensor
    address: Tensor
    answers: Tensor
    names: tuple[str, ...]


class BioHamaModel(nn.Module):
    """tokens (B, T) -> logits (B, T, V), causal. The output sees only what was read from memory.

    x = E[token];  h = Executive(x);  nodes = [W_s x; W_e h; one of each module; content gate; own gate] + identity
    nodes exchange messages (the first two always send); the router weighs the modules by their nodes
    the address is the weighted sum of the modules' proposals:
    forward, backward, stay: the last address moved by +1, -1, 0      oldest, newest: first and last content slot
    compete: Competition      hebb: HebbianMemory      percept: the current slot
    logits = log sum_i address_i softmax(scale E (x_i + W x_i) + bias):  what the slots would say, mixed

    A slot says what it holds (the embedding is shared with the output), so that modules are told apart by where they
    look and not by what the decoder makes of it. ``forward`` (parallel) and ``step`` (one token) are the same function.
    float32 or float64; not under autocast.
    """

    def __init__(self, config: BioHamaConfig) -> None:
        super().__init__()
        self.config, d, n = config, config.d_model, config.d_node
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.executive = Executive(d, config.d_hidden)
        self.sense = nn.Linear(d, n, bias=False)
        self.report = nn.Linear(config.d_hidden, n, bias=False)
        self.identity = nn.Parameter(torch.randn(config.n_nodes, n) * 0.5)
        sizes = (config.n_nodes, n, config.n_senders, config.n_rounds, config.n_heads, config.backend)
        self.messages = MessagePassing(*sizes, always=INFORMED)
        with torch.no_grad():
            self.messages.attention.salience_bias[:INFORMED] = 2.0
        self.router = Router(len(config.modules), n, config.threshold)
        self.content = nn.Linear(n, 1)
        self.own = nn.Linear(n, 1)
        self.memory = WorkingMemory(d, config.read_width, config.backend)
        self.competition = Competition(d, config.inhibition)
        self.hebbian = HebbianMemory(d, config.d_cue, config.cue_active, config.tied_cue, config.backend)
        self.log_scale = nn.Parameter(torch.tensor(-0.7))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of tokens (B, T) int64 in 0..vocab_size-1, 1 <= T <= n_slots.

        They sum to what the address weighs, 1 where something was found, and log 0.00001 is the least that is said.

        [:, t] depends on tokens[:, :t+1] alone. Raises: TypeError, ValueError as ``check``. Gradients: parameters, of
        the choices that are made without gradient none (``objective`` trains a softer ``trace``).
        Determinism: bitwise on a CPU; on a GPU torch's running sums and the gradients of its gathers are not, and its
        deterministic mode refuses the former.
        """
        return self.trace(tokens).logits

    def start(self, batch_size: int) -> State:
        """The state before the first token; see ``step``."""
        return start(self, batch_size)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Log-probabilities (B, V) after tokens (B,), and the next state; the state given may not be used again.

        Equal to ``forward`` position by position, to rounding. Raises: as ``check``; ValueError for another batch size.
        """
        if not isinstance(tokens, Tensor) or tokens.shape != state.h.shape[:1]:
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"tokens must be a tensor of shape (B,) = ({len(state.h)},) as the state, got {got}")
        check(tokens.unsqueeze(-1), self.config, state.length)
        return step(self, tokens, state, Phase())

    def decode(self, value: Tensor) -> Tensor:
        """What slots that hold value (..., D) would say: probabilities (..., V)."""
        scale = self.log_scale.exp() * self.config.d_model**-0.5
        return F.linear(value * scale, self.embedding.weight, self.bias).softmax(-1)

    def control(self, x: Tensor, h: Tensor, phase: Phase) -> Control:
        """What the nodes decide, from x (..., D) and the executive's h (..., d_hidden)."""
        m = len(self.config.modules)
        heard = torch.stack([self.sense(x), self.report(h)], -2)
        nodes = self.identity.expand(*x.shape[:-1], -1, -1)
        nodes = torch.cat([nodes[..., :2, :] + heard, nodes[..., 2:, :]], -2)
        nodes = self.messages(nodes.flatten(0, -3)).view(nodes.shape)
        content, own = (gate(nodes[..., m + 2 + i, :]).squeeze(-1) for i, gate in enumerate((self.content, self.own)))
        return Control(
            self.router.logits(nodes[..., 2 : m + 2, :]),
            opened(content, phase._replace(noise=phase.content_noise)),
            opened(own, phase),
            own,
        )

    def trace(self, tokens: Tensor, phase: Phase | None = None) -> Trace:
        """All that happens in the stream; arguments and errors as ``forward``; phase None: as the model is used."""
        check(tokens, self.config)
        phase = phase or Phase()
        x = self.embedding(tokens)
        event = self.executive.event(x)
        control = self.control(x, self.executive(x, opened(event, phase)), phase)
        answers = self.decode(self.memory.write(x))
        heard = answers[:, :-1].detach().gather(2, tokens.unsqueeze(1).expand(-1, tokens.shape[1], -1)).transpose(1, 2)
        router = self._route(control.router_logit, phase)
        soft = self._look(x, control.content, control.own, heard, phase)
        chosen = [winner(p) for p in soft] if phase.hard and self.config.winner_take_all else soft
        address, before = self._follow(router, chosen, heard, control.own)
        proposals = torch.stack([*self._moves(before), *soft], 2)
        logits = (self.memory.read(address, answers) + FLOOR).log()
        return Trace(logits, router, control, event, proposals, address, answers, self.config.modules)

    def _route(self, logit: Tensor, phase: Phase) -> Tensor:
        if phase.drop > 0:
            lost = torch.rand(len(logit), 1, logit.shape[-1], device=logit.device) < phase.drop
            logit = logit.masked_fill(lost & ~lost.all(-1, keepdim=True), float("-inf"))
        threshold = self.config.threshold if phase.threshold is None else phase.threshold
        return self.router.choose(logit, threshold, phase.floor)

    def _look(self, x: Tensor, content: Tensor, own: Tensor, heard: Tensor, phase: Phase) -> list[Tensor]:
        """(B, T, S + 1) of every module that is no pointer, in the order of config.modules."""
        length = x.shape[1]
        hard = phase.hard and self.config.winner_take_all
        look = {
            "oldest": lambda: oldest(content).unsqueeze(1).expand(-1, length, -1).tril(),
            "newest": lambda: newest_so_far(content),
            "compete": lambda: self.competition(x, content, own, heard, hard, phase.excluded, phase.focus),
            "hebb": lambda: self.hebbian(x),
            "percept": lambda: torch.eye(length, device=x.device, dtype=x.dtype).expand(len(x), -1, -1),
        }
        found = [look[name]() for name in self.config.modules if name in look]
        return [F.pad(address, (0, length + 1 - address.shape[-1])) for address in found]

    def _moves(self, before: Tensor) -> list[Tensor]:
        """(B, T, S + 1) of every pointer, from where it started, before (B, T, S)."""
        moves = []
        for by in (POINTERS[name] for name in self.config.modules if name in POINTERS):
            move = shifted(before, by)
            if by > 0:  # there is no slot 1 yet in step 0
                move = torch.cat([torch.zeros_like(move[:, :1]), move[:, 1:]], 1)
            moves.append(F.pad(move, (0, 1)))
        return moves

    def _follow(self, router: Tensor, chosen: list[Tensor], heard: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, S + 1), the mixed address of every step, and (B, T, S), where the pointers started from.

        Only this depends on the step before: a token that is the model's own answer tells where it had looked.
        """
        pointers = [POINTERS[name] for name in self.config.modules if name in POINTERS]
        n, (b, length) = len(pointers), own.shape
        mixed = heard.new_zeros(b, length, length + 1)
        if chosen:
            mixed = torch.einsum("btm,mbts->bts", router[..., n:], torch.stack(chosen))
        weights = router[..., :n].unsqueeze(-1).unbind(1)
        last, addresses, starts = first_slot(b, length, mixed), [], []
        for t, (here, null) in enumerate(zip(mixed[..., :-1].unbind(1), mixed[..., -1:].unbind(1), strict=True)):
            if t:
                last = corrected(last, heard[:, t], own[:, t])
            starts.append(last)
            for m, by in enumerate(pointers):
                if t or by <= 0:
                    here = here + weights[t][:, m] * shifted(last, by)
            addresses.append(torch.cat([here, null], 1))
            last = here
        return torch.stack(addresses, 1), torch.stack(starts, 1)

    def extra_repr(self) -> str:
        return f"vocab_size={self.config.vocab_size}, modules={', '.join(self.config.modules)}"


def opened(logit: Tensor, phase: Phase) -> Tensor:
    """A gate (...) of its logit (...): all or none in use; in training a binary concrete variable, soft and noisy, so
    that only a gate that is sure of itself passes on what it should. Source: Maddison, Mnih, Teh 2017."""
    if phase.decided:
        return (logit > 0).to(logit.dtype)
    if phase.noise > 0:
        uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
        logit = logit + phase.noise * uniform.logit()
    return (logit * (1 + phase.noise)).sigmoid()


def check(tokens: Tensor, config: BioHamaConfig, before: int = 0) -> None:
    """Refuses what the model cannot read: tokens (B, T) after the ``before`` that it has read already.

    Raises: TypeError for a wrong dtype; ValueError for a wrong shape, more than n_slots tokens in all, and, on CPU
        tensors outside torch.compile, for a symbol outside the vocabulary.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be an int64 tensor, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be (B, T) with B >= 1 and T >= 1, got {tuple(tokens.shape)}")
    if before + tokens.shape[1] > config.n_slots:
        raise ValueError(f"tokens must be at most n_slots={config.n_slots} long, got {before + tokens.shape[1]}")
    look = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
        raise ValueError(
            f"tokens must be in 0..vocab_size-1={config.vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}"
        )
