"""How well a pool in groups finds the neurons that it would find if it looked at all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import BrainLikeSprout

_SCORES = 2**26  # values of all neurons' scores that are made at once: 256 MiB in float32


@torch.no_grad()
def selection_recall(
    model: BrainLikeSprout, tokens: Tensor, attention_mask: Tensor | None = None, *, all_positions: bool = False
) -> Tensor:
    """The share of the initial_sparsity neurons with the highest scores of all that lie in the groups chosen.

    Args: model with active_groups > 0; the others as in ``BrainLikeSprout.forward``.
    Returns: (B,) float64 in [0, 1]; with all_positions (B * T,). Cost: of the whole pool, some samples at a time.
    Raises: as ``forward``; ValueError for a model without groups. Gradients: none. Determinism: bitwise.
    """
    config, pool = model.config, model.pool
    if not config.active_groups:
        raise ValueError("model must have active_groups > 0, got 0: a flat pool looks at all neurons")
    z = model.encoder.read(tokens, attention_mask, all_positions=all_positions).flatten(0, -2)
    shares = []
    for some in z.split(max(1, _SCORES // config.n_neurons)):
        page, best = pool.page(some), pool.score(some).topk(config.initial_sparsity, dim=1).indices
        place = torch.searchsorted(page.groups, best // config.block_size).clamp(max=len(page.groups) - 1)
        own = page.score.unflatten(1, (len(page.groups), -1))[..., 0] > float("-inf")
        found = (page.groups[place] == best // config.block_size) & own.gather(1, place)
        shares.append(found.double().mean(1))
    return torch.cat(shares)
