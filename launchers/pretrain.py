"""Pre-train a visual tokenizer: `deepspeed launchers/pretrain.py [--config FILE] [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.pretraining.launcher import pretrain  # noqa: E402

if __name__ == "__main__":
    pretrain()
