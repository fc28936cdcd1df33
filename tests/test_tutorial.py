"""The tutorial's ten commands, run one after another as they stand, in a folder of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf8")
COMMANDS = re.findall(r"^```\n(.+)\n```$", TEXT, re.M)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copy(ROOT / "README.md", folder)
    return folder


@pytest.fixture(scope="module")
def environment():
    """This Python as `python`, and the checkout whether it is installed or not."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PATH": path, "PYTHONPATH": own, "OMP_NUM_THREADS": "1"}


def test_there_are_ten():
    assert len(COMMANDS) == 10
    assert re.findall(r"^\*\*(\d+)\.", TEXT, re.M) == [str(n) for n in range(1, 11)]


MADE = {  # command -> what it must leave behind
    0: "runs/first/model/model.safetensors",
    2: "runs/first/checkpoints/step-00000040/manifest.json",
    3: "runs/readme/model/tokenizer.json",
    4: "runs/gpt/final.json",
    6: "runs/hebb/model/model.safetensors",
    7: "runs/first/analysis/index.html",
    9: "runs/shared/model.safetensors",
}
SAID = {1: '"loss"', 5: "best_val_loss", 8: "The import statement", 9: "BrainLikeSprout"}


@pytest.mark.parametrize("number", range(10))
def test_command(number, place, environment):
    done = subprocess.run(
        COMMANDS[number], shell=True, cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if number in MADE:
        assert (place / MADE[number]).is_file()
    assert SAID.get(number, "") in done.stdout
