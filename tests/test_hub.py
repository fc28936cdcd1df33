"""A model as a folder: what is saved comes back, what does not fit is refused with the file's name."""

import copy
import json
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from sprout import BrainLikeSprout, SproutConfig, hub, runs, text
from sprout.gpt import GPT, EncoderOnly
from sprout.pretrained import PretrainedError, config_text, find_folder, parse_config
from tests.sprout_models import SMALL, small, some_tokens, wired

ROOT = Path(__file__).resolve().parents[1]
BYTES = text.Bytes()
WIDE = {**SMALL, "vocab_size": 256}


@pytest.fixture
def saved(tmp_path):
    """(a model, the folder that it was saved in with its tokenizer)."""
    model = wired(small(vocab_size=256))
    hub.save(model, tmp_path / "model", BYTES)
    return model, tmp_path / "model"


@pytest.mark.parametrize("connection", ["dense", "block_sparse"])
def test_a_sprout_comes_back(tmp_path, connection):
    sizes = dict(connection=connection, block_size=16, blocks_per_row=2)
    model = wired(small(**sizes)).train()
    model.save_pretrained(tmp_path / "deep/folder")
    torch.manual_seed(99)  # another layout of blocks before the weights are loaded
    again = BrainLikeSprout.from_pretrained(tmp_path / "deep/folder")
    assert again.config == model.config
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again(some_tokens()), model.eval()(some_tokens()))
    assert sorted(p.name for p in (tmp_path / "deep/folder").iterdir()) == ["config.json", "model.safetensors"]
    model.save_pretrained(tmp_path / "deep/folder")  # an older one is replaced


@pytest.mark.parametrize("cls", [GPT, EncoderOnly])
def test_the_controls_come_back(tmp_path, cls):
    model = cls(SproutConfig(**SMALL))
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert torch.equal(again(some_tokens()), model.eval()(some_tokens()))
    with pytest.raises(PretrainedError, match=f"describes the model {cls.KIND!r}, not 'sprout'; see sprout.hub.load"):
        BrainLikeSprout.from_pretrained(tmp_path)


def test_mixing_it_in_changes_nothing_else():
    model = small()
    assert torch.equal(copy.deepcopy(model)(some_tokens()), model(some_tokens()))
    assert torch.equal(pickle.loads(pickle.dumps(model))(some_tokens()), model(some_tokens()))


@pytest.mark.parametrize("kind", ["sprout", "gpt", "encoder"])
def test_loading_a_folder_with_its_tokenizer(tmp_path, kind):
    words = text.Chars("abc def")
    model = hub.make_model(kind, SproutConfig(**{**SMALL, "vocab_size": words.vocab_size}))
    hub.save(model, tmp_path, words)
    again, tokenizer = hub.load(tmp_path)
    assert type(again) is type(model)
    assert tokenizer.decode(tokenizer.encode("cab fed")) == "cab fed"
    assert torch.equal(again(tokenizer.encode("abc").unsqueeze(0)), model.eval()(words.encode("abc").unsqueeze(0)))


def test_loading_a_run_takes_the_model_or_else_the_newest_whole_checkpoint(tmp_path, caplog):
    models = [small(seed, vocab_size=256) for seed in (1, 2)]
    with runs.RunFolder.create(tmp_path / "run", {}) as run:
        with pytest.raises(PretrainedError, match="run holds no model and no whole checkpoint"):
            hub.load(run.path)
        for step, model in enumerate(models, 1):
            texts = {"config.json": config_text("sprout", model.config), "tokenizer.json": BYTES.to_json()}
            path = run.save(runs.Checkpoint(step, model.state_dict(), {}, None, texts))
    assert torch.equal(hub.load(path)[0].decoder.readout, models[1].decoder.readout)
    assert torch.equal(hub.load(run.path)[0].decoder.readout, models[1].decoder.readout)
    (path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(runs.CheckpointError, match=r"model.safetensors is incomplete"):
        hub.load(path)
    assert torch.equal(hub.load(run.path)[0].decoder.readout, models[0].decoder.readout)
    assert "trying the checkpoint before it" in caplog.text
    hub.save(models[1], run.path / "model", BYTES)
    assert torch.equal(hub.load(run.path)[0].decoder.readout, models[1].decoder.readout)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_and_empty_files_are_named(saved, name):
    (saved[1] / name).write_bytes(b"")
    with pytest.raises(PretrainedError, match=f"{name} is empty"):
        hub.load(saved[1])
    (saved[1] / name).unlink()
    with pytest.raises(PretrainedError, match=f"{name} is missing"):
        hub.load(saved[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_neuron": 5}, r"config.json has the unknown key 'n_neuron'; did you mean 'n_neurons'\?"),
        ({"zzz": 5}, r"config.json has the unknown key 'zzz'; known: vocab_size, "),
        ({"n_neurons": "96"}, r"config.json: n_neurons must be an integer >= 1, got '96'"),
        ({"d_state": 15}, r"config.json: d_state must be a multiple of n_heads=2, got 15"),
        ({"format": 9}, r"config.json has format 9, this version reads 1"),
        ({"model": "words"}, r"config.json describes the model 'words'; known: sprout, gpt, encoder"),
        ({"vocab_size": 255}, r"tokenizer.json has 256 tokens, .*config.json only vocab_size=255"),
        ({"d_state": 32}, r"model.safetensors does not fit the model of its config.json: .* instead of"),
        ({"n_encoder_layers": 2}, r"encoder.layers.1.self_attn.in_proj_weight is missing; .* and 7 more"),
        ({"model": "gpt"}, r"is missing|is unknown"),
    ],
)
def test_configs_that_do_not_fit_are_refused(saved, changes, message):
    file = saved[1] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(PretrainedError, match=message):
        hub.load(saved[1])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"x"'])
def test_what_is_no_config_is_refused(content):
    with pytest.raises(PretrainedError, match=r"here\.json does not describe a model"):
        parse_config(content, "here.json")


def test_what_a_config_leaves_out_takes_the_default():
    assert parse_config('{"format": 1, "model": "sprout", "n_heads": 4}', "x") == ("sprout", SproutConfig(n_heads=4))


@pytest.mark.parametrize("cut", [lambda data: data[:-5], lambda data: b"garbage"])
def test_damaged_weights_are_named(saved, cut):
    file = saved[1] / "model.safetensors"
    file.write_bytes(cut(file.read_bytes()))
    with pytest.raises(PretrainedError, match=r"model\.safetensors is incomplete or damaged"):
        hub.load(saved[1])


def test_neither_a_folder_nor_a_repository():
    for name in ("nowhere", "runs/a/b", "/absent/folder", "./x/y"):
        with pytest.raises(PretrainedError, match=f"{name} is neither a folder nor the name of a repository"):
            hub.load(name)


def hub_library(monkeypatch, folder):
    """A library huggingface_hub that serves folder and keeps what is uploaded to it; the calls it got."""
    calls = []

    def upload_folder(**options):
        files = sorted(p.name for p in Path(options["folder_path"]).iterdir())
        calls.append(("upload", options["repo_id"], options["token"], files))
        return "https://example.invalid/commit"

    def snapshot_download(name, **options):
        calls.append(("download", name, options))
        return str(folder)

    create = lambda name, **options: calls.append(("create", name, options))  # noqa: E731
    fake = dict(upload_folder=upload_folder, snapshot_download=snapshot_download, create_repo=create)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(**fake))
    return calls


def test_the_hub_is_asked_for_the_three_files(saved, monkeypatch):
    calls = hub_library(monkeypatch, saved[1])
    model = BrainLikeSprout.from_pretrained("owner/name", revision="v1")
    assert torch.equal(model.decoder.readout, saved[0].decoder.readout)
    wanted = ["config.json", "model.safetensors", "tokenizer.json"]
    assert calls == [("download", "owner/name", {"allow_patterns": wanted, "revision": "v1"})]


def test_pushing_uploads_what_is_saved(saved, monkeypatch):
    calls = hub_library(monkeypatch, None)
    assert saved[0].push_to_hub("owner/name", private=True, token="t") == "https://example.invalid/commit"
    assert calls == [
        ("create", "owner/name", {"exist_ok": True, "private": True, "token": "t"}),
        ("upload", "owner/name", "t", ["config.json", "model.safetensors"]),
    ]


def test_the_calls_fit_the_real_library():
    library = pytest.importorskip("huggingface_hub")
    import inspect

    inspect.signature(library.snapshot_download).bind("owner/name", allow_patterns=[], revision="v1", token=None)
    inspect.signature(library.create_repo).bind("owner/name", exist_ok=True, private=True, token=None)
    upload = dict(repo_id="owner/name", folder_path=".", commit_message="m", token=None)
    inspect.signature(library.upload_folder).bind(**upload)


def test_missing_libraries_name_the_command(saved, monkeypatch):
    command = r'pip install "bio-kernels\[train\]"'
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=command):
        find_folder("owner/name")
    with pytest.raises(ImportError, match=command):
        saved[0].push_to_hub("owner/name")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=command):
        saved[0].save_pretrained(saved[1])
    with pytest.raises(ImportError, match=command):
        BrainLikeSprout.from_pretrained(saved[1])


def test_importing_sprout_imports_none_of_them():
    heavy = [
        "huggingface_hub",
        "safetensors",
        "accelerate",
        "tensorboard",
        "matplotlib",
        "psutil",
        "tokenizers",
    ]
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}; import sprout; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
