"""The recurrent form of BioHama: one token after another, with the same result as the parallel form."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .addresses import corrected, first_slot, newest, oldest, shifted, winner
from .working_memory import FLOOR

if TYPE_CHECKING:
    from .model import BioHamaModel, Phase

_CAPACITY = 64  # slots at the start; doubled when they are full


class State(NamedTuple):
    """What a stream has left behind after ``length`` tokens; C slots are allocated, unwritten ones are zero.

    h: (B, H), the executive's. x: (B, D), the last token's embedding. answers: (B, C + 1, V), what each slot would say.
    drive, content, room: (B, C). trace: (B, cue, C), the Hebbian memory. address, queue: (B, C + 1), the last mixed
    address and the competing queue's last proposal.
    """

    length: int
    h: Tensor
    x: Tensor
    answers: Tensor
    drive: Tensor
    content: Tensor
    room: Tensor
    trace: Tensor
    address: Tensor
    queue: Tensor


def start(model: BioHamaModel, batch_size: int) -> State:
    """The state before the first token. Raises: ValueError if batch_size is not a positive integer."""
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
    config, weight = model.config, model.embedding.weight
    c = min(_CAPACITY, config.n_slots)
    with torch.no_grad():
        answers = weight.new_zeros(batch_size, c + 1, config.vocab_size)
        answers[:, -1] = model.decode(model.memory.null)
        drive, content, room = (weight.new_zeros(batch_size, c) for _ in range(3))
        address = F.pad(first_slot(batch_size, c, weight), (0, 1))
        return State(
            0,
            model.executive.start(batch_size),
            weight.new_zeros(batch_size, config.d_model),
            answers,
            drive,
            content,
            room,
            model.hebbian.start(batch_size, c),
            address,
            torch.zeros_like(address),
        )


def grown(state: State, n_slots: int) -> State:
    """The state with twice the slots, at most n_slots."""
    more = min(2 * state.drive.shape[1], n_slots) - state.drive.shape[1]

    def before_null(tensor: Tensor, dim: int) -> Tensor:
        slots, null = tensor.split([tensor.shape[dim] - 1, 1], dim)
        blank = slots.new_zeros([more if i == dim else n for i, n in enumerate(slots.shape)])
        return torch.cat([slots, blank, null], dim)

    return state._replace(
        answers=before_null(state.answers, 1),
        address=before_null(state.address, 1),
        queue=before_null(state.queue, 1),
        **{name: F.pad(getattr(state, name), (0, more)) for name in ("drive", "content", "room", "trace")},
    )


def step(model: BioHamaModel, tokens: Tensor, state: State, phase: Phase) -> tuple[Tensor, State]:
    """Log-probabilities (B, V) after tokens (B,), and the next state; slots are written in place."""
    config, t = model.config, state.length
    if t == state.drive.shape[1]:
        state = grown(state, config.n_slots)
    x = model.embedding(tokens)
    h = model.executive.step(x, state.h, (model.executive.event(x) > 0).to(x.dtype))
    control = model.control(x, h, phase)
    own = control.own
    heard = state.answers[:, :-1].gather(2, tokens.view(-1, 1, 1).expand(-1, state.drive.shape[1], 1)).squeeze(2)
    last, room = state.address[:, :-1], state.room
    if t:
        last = corrected(last, heard, own)
        room = model.competition.inhibit(room, state.queue[:, :-1], heard, own, config.winner_take_all)
    state.answers[:, t] = model.decode(model.memory.write(x.unsqueeze(1))[:, 0])
    state.content[:, t] = control.content
    state.drive[:, t] = model.competition.drive(x, control.content)
    room[:, t] = 1
    if t:
        model.hebbian.write_(state.trace, t, state.x)
    queue = model.competition.propose(state.drive, room, phase.focus)
    address = mix(model, model.router.choose(control.router_logit, config.threshold), x, last, queue, state)
    logits = (model.memory.read_step(address, state.answers) + FLOOR).log()
    return logits, state._replace(length=t + 1, h=h, x=x, room=room, address=address, queue=queue)


def mix(model: BioHamaModel, router: Tensor, x: Tensor, last: Tensor, queue: Tensor, state: State) -> Tensor:
    """(B, C + 1): the modules' addresses weighted by the router (B, M); those that nobody listens to are not made."""
    t, slots = state.length, last.shape[1]
    look = {
        "forward": lambda: shifted(last, 1) if t else torch.zeros_like(last),
        "backward": lambda: shifted(last, -1),
        "stay": lambda: last,
        "oldest": lambda: oldest(state.content),
        "newest": lambda: newest(state.content),
        "compete": lambda: queue,
        "hebb": lambda: model.hebbian.read(state.trace, x),
        "percept": lambda: F.one_hot(torch.full_like(router[:, 0], t, dtype=torch.int64), slots).to(last.dtype),
    }
    mixed = torch.zeros_like(queue)
    for m, name in enumerate(model.config.modules):
        if bool((router[:, m] > 0).any()):
            address = look[name]()
            if name in ("oldest", "newest", "compete", "hebb") and model.config.winner_take_all:
                address = winner(F.pad(address, (0, slots + 1 - address.shape[1])))
            mixed += router[:, m : m + 1] * F.pad(address, (0, slots + 1 - address.shape[1]))
    return mixed
