"""The README's examples run as they stand, and its commands name what exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf8"), re.S)


@pytest.mark.default_memory
@pytest.mark.parametrize("code", BLOCKS, ids=["operations", "sprout", "prefix", "biohama"])
def test_examples_run(code):
    exec(compile(code, "README.md", "exec"), {})


def test_extras_named_in_the_readme_exist():
    setup = (ROOT / "setup.py").read_text(encoding="utf8")
    named = re.search(r"Extras: ([^.]+)\.", (ROOT / "README.md").read_text(encoding="utf8"))
    assert named is not None
    for extra in re.findall(r"`(\w+)`", named.group(1)):
        assert f'"{extra}":' in setup
