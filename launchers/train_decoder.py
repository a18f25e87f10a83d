"""Train a tokenizer's pixel decoder further: `deepspeed launchers/train_decoder.py --config FILE [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import guard  # noqa: E402

if __name__ == "__main__":
    guard()
    from megavtp.decoder.launcher import train_decoder  # takes seconds

    train_decoder()
