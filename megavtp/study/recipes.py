"""The configurations of one combination of choices: the recipe of each stage with the study's settings over it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TypeVar

from megavtp.config.load import load_config
from megavtp.config.schema import Config
from megavtp.config.sizes import ResolvedConfig
from megavtp.decoder.validate import validate_decoder
from megavtp.dit.config import CompleteDiTConfig, DiTConfig, complete_config
from megavtp.dit.validate import validate_dit
from megavtp.errors import UserError
from megavtp.pretraining.validate import validate_pretraining
from megavtp.study.config import Stage, StudyConfig

T = TypeVar("T")
# What the study decides itself, so that neither the file nor an axis may.
_OWN: dict[Stage, tuple[str, ...]] = {
    "tokenizer": ("output_dir", "train.checkpoint_every", "train.keep_last", "train.resume", "evaluation.at_end"),
    "decoder": ("output_dir", "model.init_from", "train.resume"),
    "dit": ("output_dir", "data.root", "seed", "train.resume"),
}


class Recipes:
    """Reads and checks the stages of a study for the ``choices`` by axis; errors name both."""

    def __init__(self, study: StudyConfig, choices: dict[str, str]):
        self.study, self.choices = study, choices
        self.pretraining = cache(self._pretraining)

    def settings(self, stage: Stage) -> list[str]:
        """Return the key=value of a stage: the file's, then those of each choice.

        The decoder belongs to the tokenizer's model, so it takes over what is set there for ``model``.
        """
        found = list(getattr(self.study, stage).settings)
        for axis, choice in self.choices.items():
            found += self.study.axes[axis][choice].get(stage, ())
        own = _OWN[stage]
        if stage == "tokenizer" and self.study.looks_at == "runs":
            own = (*own, "train.steps")
        for setting in found:
            if (key := setting.partition("=")[0].strip()) in own:
                raise UserError(f"{self._where(stage)}: {key} is set by the study itself; remove it from the file")
        if stage == "decoder":
            shared = [setting for setting in self.settings("tokenizer") if setting.startswith("model.")]
            found = [setting for setting in shared if not setting.startswith("model.init_from")] + found
        return found

    def arguments(self, stage: Stage) -> tuple[str, ...]:
        """Return how a launcher is told the recipe and the settings of a stage."""
        return ("--config", getattr(self.study, stage).recipe, *self.settings(stage))

    def _pretraining(self, look: int) -> ResolvedConfig:
        """Return the configuration of the pre-training that is looked at after ``look`` steps."""
        steps = [f"train.steps={look}"] if self.study.looks_at == "runs" else []
        config = self._read("tokenizer", Config, steps)
        if look > config.train.steps:
            raise UserError(
                f"looks = {list(self.study.looks)}: {look} is beyond the tokenizer's train.steps = "
                f"{config.train.steps}; shorten the list, or set looks_at: runs"
            )
        return self._named("tokenizer", lambda: validate_pretraining(config, None))

    def decoder(self, start: str) -> ResolvedConfig:
        """Return the configuration of the decoder's training on the tokenizer in the setting ``start``."""
        config = self._read("decoder", Config, [start])
        return self._named("decoder", lambda: validate_decoder(config, None))

    def dit(self, own: tuple[str, ...], look: int) -> CompleteDiTConfig:
        """Return the configuration of the DiT on the latents of the tokenizer at this look."""
        config = self._read("dit", DiTConfig, list(own))
        resolved = self._named("dit", lambda: validate_dit(config, None))
        model, tokenizer = resolved.model, self.pretraining(look).model
        size = model.latent_size or tokenizer.image_size // tokenizer.patch_size
        channels = model.latent_channels or tokenizer.bottleneck
        return complete_config(
            replace(resolved, model=replace(model, latent_size=size, latent_channels=channels))
        )

    def _read(self, stage: Stage, root: type[T], more: list[str]) -> T:
        recipe = getattr(self.study, stage).recipe
        return self._named(stage, lambda: load_config(recipe, root, [*self.settings(stage), *more]))

    def _named(self, stage: Stage, make: Callable[[], T]) -> T:
        try:
            return make()
        except UserError as error:
            raise UserError(f"{self._where(stage)}: {error}") from None

    def _where(self, stage: Stage) -> str:
        choices = ", ".join(f"{axis} {choice}" for axis, choice in self.choices.items())
        return f"{stage} of {choices}" if choices else stage
