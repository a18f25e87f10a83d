"""This converts a DiT's checkpoint between the native format and LightningDiT's."""

from dataclasses import replace
from pathlib import Path

from megavtp.checkpoint.formats.convert import WEIGHTS_ONLY, Format, check_fitting, write_native
from megavtp.checkpoint.reading import is_checkpoint, open_checkpoint
from megavtp.data.all_or_nothing import all_or_nothing
from megavtp.data.torch_file import write_torch_file
from megavtp.dit.checkpoint import AVERAGE, TRAINED, WholeDiT, dit_tensors, read_facts, stored_facts
from megavtp.dit.lightningdit import lightningdit_tree, read_lightningdit
from megavtp.latents.artifact import TokenizerArtifact, check_same_tokenizer


def convert_dit(
    path: str | Path, to: Format, out: str | Path, tokenizer: str | Path | None = None, module_prefix: bool = False
) -> list[str]:
    """Write the DiT at ``path`` as a native checkpoint or as LightningDiT's ``.pt``. The latter is ``out`` itself, or a
    file in the folder ``out`` with LightningDiT's name for the step.

    Args:
        tokenizer: folder of the tokenizer or of the latents that the DiT belongs to, with ``visual_tokenizer.json``.
            Without it, a native DiT made from a ``.pt`` does not know its tokenizer. A DiT that knows its tokenizer
            accepts no other.
        module_prefix: see ``lightningdit_tree``.
    """
    path, out = Path(path), Path(out)
    dit = _read_native_dit(path) if is_checkpoint(path) or path.is_dir() else read_lightningdit(path)
    notes = list(dit.notes)
    if tokenizer is not None:
        artifact = TokenizerArtifact.read(tokenizer)
        check_fitting(artifact.needed_statistics(str(tokenizer)), dit.config.model.latent_channels, str(tokenizer))
        if dit.artifact is not None:
            check_same_tokenizer(dit.artifact, str(path), artifact, str(tokenizer))
        dit = replace(dit, artifact=artifact)
    if to == "native":
        if dit.artifact is None:
            notes.append("which tokenizer it belongs to is not known: name its folder with --tokenizer to state it")
        with all_or_nothing(out) as folder:
            sets = {TRAINED: dit.weights, AVERAGE: dit.average}
            tensors = {prefix + name: tensor for prefix, state in sets.items() for name, tensor in state.items()}
            write_native(folder, dit.step, tensors, dit.config, stored_facts(dit.artifact, dit.classes))
        return [*notes, WEIGHTS_ONLY]
    tree = lightningdit_tree(dit, module_prefix=module_prefix)
    with all_or_nothing(out) as new:
        file = new
        if out.suffix != ".pt":
            new.mkdir()
            file = new / f"{dit.step:07d}.pt"
        write_torch_file(file, tree)
    return notes


def _read_native_dit(path: Path) -> WholeDiT:
    with open_checkpoint(path) as checkpoint:
        facts = read_facts(checkpoint)
        weights, average = (dit_tensors(checkpoint, facts.config.model, prefix) for prefix in (TRAINED, AVERAGE))
        return WholeDiT(**vars(facts), weights=weights, average=average, notes=[])
