"""A model as a folder: config.json and model.safetensors, on disk or on the Hugging Face hub.

Importing this costs nothing: safetensors and huggingface_hub (extra `train`) are imported when a method needs them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from bio_kernels import BlockSparse
from torch import Tensor, nn

from .config import SproutConfig
from .sharded_pool import refuse_shards

FORMAT = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
Model = TypeVar("Model", bound="Pretrained")


class PretrainedError(ValueError):
    """A saved model cannot be used; the message names the file and what is wrong with it."""


def config_text(kind: str, config: SproutConfig) -> str:
    """The content of config.json. Args: kind, which model it is: "sprout", "gpt" or "encoder"."""
    return json.dumps({"format": FORMAT, "model": kind, **asdict(config)}, indent=1)


def parse_config(text: str | bytes, source: str | Path) -> tuple[str, SproutConfig]:
    """The inverse of ``config_text``; what is not given takes the default.

    Raises: PretrainedError, with source: another format, an unknown key (the nearest known one is named), a bad value.
    """
    try:
        values = json.loads(text)
        version, kind = values.pop("format"), values.pop("model")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise PretrainedError(f"{source} does not describe a model: {error!r}") from None
    if version != FORMAT:
        raise PretrainedError(f"{source} has format {version!r}, this version reads {FORMAT}")
    known = [field.name for field in fields(SproutConfig)]
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise PretrainedError(f"{source} has the unknown key {name!r}; {hint}")
    try:
        return kind, SproutConfig(**values)
    except ValueError as error:
        raise PretrainedError(f"{source}: {error}") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copies weights into model. Raises: PretrainedError that names what is missing, too much or of another shape.

    A block-sparse matrix may store another number of blocks: neurons that were pruned took theirs with them.
    """
    ours = model.state_dict()
    matrices = [name for name, module in model.named_modules() if isinstance(module, BlockSparse)]
    blocks = {f"{name}.{part}" for name in matrices for part in ("blocks", "cols")}
    problems = [f"{name} is missing" for name in ours if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in ours]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in ours.items()
        if name in weights and weights[name].shape[name in blocks :] != tensor.shape[name in blocks :]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise PretrainedError(f"{source} does not fit the model of its {CONFIG}: {'; '.join(problems[:5])}{more}")
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise PretrainedError(f"{source} does not fit the model of its {CONFIG}: {error}") from None


def save_model(model: nn.Module, kind: str, folder: str | Path, tokenizer: str | None = None) -> None:
    """Writes config.json, model.safetensors and, if given, tokenizer.json; each whole at any moment.

    Raises: ImportError without safetensors; DiskError, naming the file; ValueError if model is spread over processes.
    """
    refuse_shards(model, "saving")
    from .checkpoint import to_bytes
    from .disk import explained, replace_file

    folder = Path(folder)
    weights = to_bytes(model.state_dict())
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, weights)
    replace_file(folder / CONFIG, config_text(kind, model.config))  # type: ignore[arg-type]
    if tokenizer is not None:
        replace_file(folder / TOKENIZER, tokenizer)


def read_file(folder: Path, name: str) -> bytes:
    """One file of a saved model. Raises: PretrainedError if it is missing or empty."""
    file = folder / name
    if not file.is_file():
        raise PretrainedError(f"{file} is missing: {folder} does not hold a whole model")
    content = file.read_bytes()
    if not content:
        raise PretrainedError(f"{file} is empty")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, on the CPU. Raises: PretrainedError; ImportError without safetensors."""
    from .checkpoint import require_safetensors

    load, content = require_safetensors().load, read_file(folder, WEIGHTS)
    try:
        return load(content)
    except Exception as error:  # the library's own error, which is no ValueError
        raise PretrainedError(f"{folder / WEIGHTS} is incomplete or damaged: {error}") from None


def find_folder(source: str | Path, **download: Any) -> Path:
    """A local folder as it is; a repository of the hub ("owner/name") downloaded.

    Raises: PretrainedError if it is neither; ImportError without huggingface_hub; else what the download raises.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise PretrainedError(f"{source} is neither a folder nor the name of a repository, owner/name")
    return Path(_hub().snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS, TOKENIZER], **download))


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError('the hub needs huggingface_hub: pip install "bio-kernels[train]"') from error
    return huggingface_hub


class Pretrained:
    """save_pretrained, from_pretrained and push_to_hub for a module that is made from one SproutConfig.

    Names and files are those of huggingface_hub.PyTorchModelHubMixin, so that what expects it works. It is no base
    class here: importing it costs a sixth of importing torch, which every ``import sprout`` would pay.
    """

    KIND: ClassVar[str] = "sprout"
    config: SproutConfig

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into a folder; arguments and errors as in ``save_model``."""
        assert isinstance(self, nn.Module)
        save_model(self, self.KIND, folder)

    @classmethod
    def from_pretrained(cls: type[Model], source: str | Path, **download: Any) -> Model:
        """A saved model, on the CPU, in eval mode.

        Args: source, a folder or "owner/name" on the hub; download, options of huggingface_hub.snapshot_download, such
            as revision, token, cache_dir and local_files_only, without effect on a folder.
        Raises: PretrainedError that names the file at fault; ImportError if a library is missing.
        """
        folder = find_folder(source, **download)
        kind, config = parse_config(read_file(folder, CONFIG), folder / CONFIG)
        if kind != cls.KIND:
            raise PretrainedError(
                f"{folder / CONFIG} describes the model {kind!r}, not {cls.KIND!r}; see sprout.hub.load"
            )
        weights = read_weights(folder)
        model = cls(config)  # type: ignore[call-arg]
        assert isinstance(model, nn.Module)
        load_weights(model, weights, folder / WEIGHTS)
        model.eval()
        return model

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload model", **create: Any) -> str:
        """Uploads what ``save_pretrained`` writes.

        Args: repo_id, "owner/name", made if it does not exist; commit_message; create, options of
            huggingface_hub.create_repo, such as private and token.
        Returns: the address of the commit. Raises: ImportError if a library is missing; else what the upload raises.
        """
        hub = _hub()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            hub.create_repo(repo_id, exist_ok=True, **create)
            return str(
                hub.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=commit_message, token=create.get("token")
                )
            )
