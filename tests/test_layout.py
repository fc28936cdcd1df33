"""Who may import whom, and how long a file may be: the arrows of the architecture, read from the sources."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "bio_kernels"
LINES = 300
OURS = ("bio_kernels", "sprout", "biohama", "benchmarks", "tests")

TRITON_FILES = {  # kernel file -> what of ours it may import
    "_storage": {"_index"},
    "_segment": {"_index", "_storage"},
    "_pairs": {"_index", "_storage"},
    "_topk_select": {"_index", "_storage"},
    "_topk_gather": {"_index", "_storage", "_segment", "_topk_select"},
    "_weighted_rows": {"_index", "_storage", "_segment"},
    "_attention": {"_index", "_storage", "_pairs", "_attention_backward"},
    "_attention_backward": {"_index", "_storage", "_pairs", "_attention"},
    "_plasticity": {"_index", "_storage", "_pairs"},
}
TORCH_FILES = {
    "_index": set(),
    "_backend": set(),
    "block_sparse": {"_index"},
    "_checks": {"block_sparse", "_index", "_backend"},
    "dense": {"block_sparse", "_index"},
    "reference": {"_index"},
    "reference_pairs": {"_index", "reference"},
    "testing": {"block_sparse"},
    "_operator": {"_backend", "_index"},
    "_registration": {"_index", "_checks", "_operator", "reference", "reference_pairs"},
    "_autograd": {"_registration", "_operator", "_index", "reference"},
    "ops": {"_autograd", "_registration", "_checks", "dense", "block_sparse", "_backend", "_index"},
    "rewire": {"_checks", "block_sparse", "reference"},
    "__init__": {"_backend", "block_sparse", "ops", "rewire"},
}


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path, package: str) -> Iterator[tuple[str, str]]:
    """(module, name or "") of every import in a file, anywhere in it; relative ones are resolved within ``package``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def package_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "kernels" if KERNELS in path.parents else ROOT)
    return ".".join(relative.parts[:-1])


def siblings(path: Path) -> set[str]:
    """The files of bio_kernels that one of them imports."""
    found = set()
    for module, name in imports(path, "bio_kernels"):
        if module == "bio_kernels":
            found.add(name)
        elif module.startswith("bio_kernels."):
            found.add(module.split(".")[1])
    return found


def outside(path: Path) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(path, package_of(path))}


@pytest.mark.parametrize("path", sources(KERNELS), ids=lambda path: path.stem)
def test_bio_kernels(path: Path) -> None:
    allowed = {**TRITON_FILES, **TORCH_FILES}
    assert path.stem in allowed, "a new file: say here what it may import"
    assert siblings(path) <= allowed[path.stem], "an arrow that the architecture does not have"
    if path.stem not in TRITON_FILES:
        assert "triton" not in outside(path)
    assert not outside(path) & {
        "sprout",
        "biohama",
        "benchmarks",
        "tests",
        "numpy",
        "matplotlib",
        "hydra",
        "accelerate",
    }


def test_devices_are_asked_about_in_one_place() -> None:
    """Only _backend chooses by device; a kernel file may ask for its architecture, the index for its stream."""
    for path in sources(KERNELS):
        if path.stem not in ("_backend", "_storage", "_index"):
            assert "torch.cuda" not in path.read_text(encoding="utf8"), path.name


@pytest.mark.parametrize("path", sources(ROOT / "sprout", ROOT / "biohama"), ids=lambda p: str(p.relative_to(ROOT)))
def test_models_take_public_names_only(path: Path) -> None:
    public = _public_names()
    package = package_of(path)
    experiment = package.startswith("biohama.experiments")
    for module, name in imports(path, package):
        top = module.split(".")[0]
        if top == "bio_kernels":
            assert (module, name in {"", *public}) == ("bio_kernels", True), f"{module} {name} is not public"
        elif top in OURS and top != package.split(".")[0]:
            allowed = experiment and module.startswith("sprout.runs")
            assert allowed, f"{package} imports {module}"
        if top == "matplotlib":
            assert "plot" in path.stem, "plots are drawn in plotting files"
        if top == "hydra":
            assert experiment, "hydra is for the experiments"
        if top == "accelerate":
            assert "train" in path.stem, "accelerate is for training files"
        assert top != "triton", "a model has no kernels"
    commands = {"sprout.analysis": {"analyze", "train_loop"}, "biohama.experiments": set()}  # they call it, lazily
    for part, callers in commands.items():
        if package.startswith(part.split(".")[0]) and not package.startswith(part) and path.stem not in callers:
            assert not any(f"{module}.{name}".startswith(part) for module, name in imports(path, package)), (
                f"back to {part}"
            )


@pytest.mark.parametrize("path", sources(ROOT / "benchmarks"), ids=lambda path: path.stem)
def test_benchmarks(path: Path) -> None:
    allowed = {"reference", "reference_pairs", "testing", "dense", *_public_names(), ""}
    if path.relative_to(ROOT / "benchmarks") == Path("gpu/tables.py"):  # it tries other constants in the kernel files
        allowed |= set(TRITON_FILES)
    for module, name in imports(path, package_of(path)):
        if module == "bio_kernels":
            assert name in allowed, f"bio_kernels.{name} is not public"
        elif module.startswith("bio_kernels."):
            assert module.split(".")[1] in allowed, f"{module} is not public"


def _public_names() -> set[str]:
    tree = ast.parse((KERNELS / "__init__.py").read_text(encoding="utf8"))
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = set(ast.literal_eval(node.value))
    return names


def test_public_names() -> None:
    assert _public_names() >= {"topk_gather", "sparse_attention", "weighted_rows", "update_strength_", "BlockSparse"}


@pytest.mark.parametrize(
    "path",
    sources(KERNELS, *(ROOT / name for name in ("sprout", "biohama", "benchmarks", "tests"))),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf8").splitlines())
    assert lines <= LINES, f"{lines} lines"


def test_no_package_is_called_kernels() -> None:
    """`kernels` is the import name of a distribution of Hugging Face: the folder is a source root and nothing more."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    assert not list(ROOT.glob("tests/*/*.py"))
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents


def test_a_wrong_arrow_is_found(tmp_path: Path) -> None:
    """The reader of imports sees each form, also inside functions."""
    path = tmp_path / "x.py"
    path.write_text(
        "import triton\nfrom . import ops\ndef f():\n    from .reference import a\n    import bio_kernels._pairs\n"
    )
    assert siblings(path) == {"ops", "reference", "_pairs"}
    assert {module.split(".")[0] for module, _ in imports(path, "bio_kernels")} >= {"triton"}
