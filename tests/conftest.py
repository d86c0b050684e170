"""What several test files share: the script's folder on the path, a demo corpus, and a way to run the script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The folder of the demo corpus: tokenizer.model and the train, val and test shards."""
    import train_gpt

    folder = tmp_path_factory.mktemp("demo")
    train_gpt.build_demo(folder, 1024)
    return folder


@pytest.fixture(scope="session")
def run():
    """run(env, *args, cwd): the script (or, with args, `python *args`) with these variables and a bare environment."""

    def start(env, *args, cwd, timeout=120):
        bare = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        command = [sys.executable, *(args or (str(ROOT / "train_gpt.py"),))]
        return subprocess.run(
            command,
            env=dict(bare, OMP_NUM_THREADS="1", **env),
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
        )

    return start
