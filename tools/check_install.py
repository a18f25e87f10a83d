"""Say whether this environment has the builds that constraints.txt names and that are tested together."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "deepspeed", "megavtp")


def pinned(text: str) -> dict[str, str]:
    """Return the ``name==version`` lines of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {name.strip(): wanted.strip() for name, _, wanted in (line.partition("==") for line in lines if line)}


def problems(pins: dict[str, str]) -> list[str]:
    """Say which packages are missing, or not of their pinned version (a local part such as +cpu aside)."""
    found = []
    for name in {**dict.fromkeys(NEEDED), **pins}:
        try:
            have = version(name).partition("+")[0]
        except PackageNotFoundError:
            if name in NEEDED:
                found.append(f"{name} is not installed: make install")
            continue
        if name in pins and have != pins[name]:
            found.append(f"{name} is {have}, not {pins[name]}: pip install -c constraints.txt {name}=={pins[name]}")
    return found


def main() -> int:
    found = problems(pinned((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    if not found:
        print(", ".join(f"{name} {version(name)}" for name in NEEDED))
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
