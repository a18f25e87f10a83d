"""This converts a checkpoint from one format to another, after it has found whether it is a tokenizer's or a DiT's."""

from pathlib import Path

from megavtp.checkpoint.formats.convert import Format, convert_tokenizer
from megavtp.checkpoint.kind import is_dit
from megavtp.checkpoint.reading import INDEX, is_checkpoint, open_checkpoint
from megavtp.dit.convert import convert_dit
from megavtp.errors import UserError


def detect(path: str | Path) -> Format:
    """Return the format of the checkpoint at ``path``. Raises UserError if it has none of them."""
    path = Path(path)
    if is_checkpoint(path):
        return "native"
    if (path / "config.json").is_file():
        return "hf-vtp"
    if path.is_file():
        return "lightningdit"
    missing = "does not exist" if not path.exists() else f"has neither {INDEX} nor config.json"
    raise UserError(f"--from {path} {missing}; give a checkpoint folder, a released model's folder or a .pt file")


def convert(
    path: str | Path, to: Format, out: str | Path, *, source_format: Format | None = None, captions: str | None = None,
    statistics: str | Path | None = None, decoder: str | Path | None = None, tokenizer: str | Path | None = None,
    module_prefix: bool = False,
) -> list[str]:
    """Convert the checkpoint at ``path`` to the format ``to`` at ``out``, which must not exist; errors leave nothing.

    Args:
        source_format: the form at ``path``; None = ``detect`` finds it.
        captions, statistics, decoder: see ``convert_tokenizer``.
        tokenizer, module_prefix: see ``convert_dit``.

    Returns:
        Notes for the user on what the new format does not hold.
    """
    found = source_format or detect(path)
    if found == "lightningdit" and Path(path).is_dir():
        raise UserError(f"{path} is a folder, a LightningDiT is a .pt file: leave --from-format out, or name the file")
    is_a_dit = found == "lightningdit"
    if found == "native":
        with open_checkpoint(path, verify="sizes") as checkpoint:
            is_a_dit = is_dit(checkpoint)
    if is_a_dit and (to == "hf-vtp" or captions or statistics or decoder):
        raise UserError(f"{path} is a DiT; --to hf-vtp, --captions, --statistics and --decoder are for tokenizers")
    if not is_a_dit and (to == "lightningdit" or tokenizer):
        raise UserError(f"{path} is a tokenizer; --to lightningdit and --tokenizer are for DiTs")
    if module_prefix and to != "lightningdit":
        raise UserError(f"--module-prefix is for --to lightningdit, not for --to {to}; leave it out")
    if is_a_dit:
        return convert_dit(path, to, out, tokenizer, module_prefix)
    return convert_tokenizer(path, to, out, captions, statistics, found, decoder)
