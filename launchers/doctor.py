"""Look for what is wrong before a long run: `deepspeed --hostfile hosts launchers/doctor.py [--shared DIR]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import guard  # noqa: E402

if __name__ == "__main__":
    guard()
    from megavtp.launch.doctor.check import doctor  # takes seconds

    doctor()
