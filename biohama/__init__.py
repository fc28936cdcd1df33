"""BioHama: a router over generic memory primitives learns from short examples which to use, and extrapolates."""

from .attention import SparseAttention
from .competition import Competition
from .config import BioHamaConfig
from .executive import Executive
from .hebbian import HebbianMemory
from .message_passing import MessagePassing
from .model import BioHamaModel, Control, Phase, Trace
from .objective import training_loss
from .recurrence import State
from .router import Router
from .working_memory import WorkingMemory

__version__ = "0.1.0"

__all__ = [
    "BioHamaConfig",
    "BioHamaModel",
    "Competition",
    "Control",
    "Executive",
    "HebbianMemory",
    "MessagePassing",
    "Phase",
    "Router",
    "SparseAttention",
    "State",
    "Trace",
    "WorkingMemory",
    "training_loss",
]
