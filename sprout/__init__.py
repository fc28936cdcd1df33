"""SPROUT: the whole input becomes one sparse pattern over a fixed pool of neurons, which settles and is decoded."""

from .config import SproutConfig
from .decoder import OutputDecoder
from .encoder import Activation, InputToActivation
from .interaction import NeuronInteraction
from .model import BrainLikeSprout, Settled, create_brain_like_sprout
from .pattern import ActivationPattern, gate_change, jaccard, silent_neurons
from .pool import GlobalNeuronPool, Wiring

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "ActivationPattern",
    "BrainLikeSprout",
    "GlobalNeuronPool",
    "InputToActivation",
    "NeuronInteraction",
    "OutputDecoder",
    "Settled",
    "SproutConfig",
    "Wiring",
    "create_brain_like_sprout",
    "gate_change",
    "jaccard",
    "silent_neurons",
]
