"""BioHama: a router over generic memory primitives. Not built yet in this version; asking for it says so."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in ("BioHamaModel", "BioHamaConfig"):
        raise NotImplementedError(f"biohama.{name} is not built yet in version {__version__}; see CHANGELOG.md")
    raise AttributeError(f"module 'biohama' has no attribute {name!r}")
