"""The cells of a study: every combination of choices, looked at at every point, with every seed of the DiT."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

from megavtp.dit.summary import dit_flops
from megavtp.planning.flops import flops_per_step
from megavtp.planning.summary import parameter_counts
from megavtp.study.config import STAGES, Stage, StudyConfig, words
from megavtp.study.links import Kind, Link, settings_of
from megavtp.study.recipes import Recipes


@dataclass(frozen=True)
class Cell:
    """One tokenizer at one point, and one DiT on it.

    Attributes:
        choices: by axis.
        look: steps of pre-training.
        seed: of the DiT; None without one.
        samples, flops: that pre-training had taken by then.
        encoder: parameters of the vision encoder.
        links: in the order in which they run.
    """

    name: str
    choices: dict[str, str]
    look: int
    seed: int | None
    samples: int
    flops: float
    encoder: int
    links: tuple[Link, ...]

    @property
    def all_flops(self) -> float:
        """The operations of all trainings that led to the cell, pre-training up to the look."""
        return self.flops + sum(link.flops for link in self.links if link.kind != "pretrain")


def cells_of(study: StudyConfig) -> list[Cell]:
    """Return the cells, those of the first look first. UserError: an axis, a setting or a recipe is wrong."""
    built = [_Combination(study, dict(zip(study.axes, names))) for names in product(*study.axes.values())]
    seeds = study.seeds if study.dit.recipe is not None else (None,)
    return [combination.cell(look, seed) for look in study.looks for combination in built for seed in seeds]


def links_of(cells: list[Cell]) -> list[Link]:
    """Return each link once, in the order in which they run."""
    return list({link.folder: link for cell in cells for link in cell.links}.values())


class _Combination:
    """The cells of one choice on every axis.

    A link lies in the folder of the choices that it depends on. So cells whose choices differ in the decoder alone
    share the latents, which are the encoder's, and the DiT on them.
    """

    def __init__(self, study: StudyConfig, choices: dict[str, str]):
        self.study, self.choices, self.recipes = study, choices, Recipes(study, choices)
        self._links: dict[Path, Link] = {}

    def cell(self, look: int, seed: int | None) -> Cell:
        measures = self.study.measures
        links, checkpoint, tokenizer = self._tokenizer(look)
        made = links[-1]
        if measures.tokenizer is not None:
            place = self._place(look, "tokenizer", "decoder")
            links.append(self._once(place / "evaluate", lambda folder: self._evaluate(folder, made, tokenizer)))
        if seed is not None:
            place = self._place(look, "tokenizer")
            latents = self._once(place / "latents", lambda folder: self._latents(folder, links[0], checkpoint))
            place = self._place(look, "tokenizer", "dit") / f"seed-{seed}"
            dit = self._once(place / "dit", lambda folder: self._dit(folder, latents, look, seed))
            links += [latents, dit]
        place = self._place(look, *STAGES)
        if seed is not None:
            place /= f"seed-{seed}"
            drawn = ("--dit", str(dit.outputs[0]), "--tokenizer", str(tokenizer), "--seed", str(seed))
            if measures.generation is not None:
                out, options = place / "generate" / "metrics.json", words(self.study, "measures.generation")
                links.append(_tool("generate", ("generation", *drawn, *options), out, dit, made))
            if measures.samples is not None:
                out, options = place / "draw" / "samples.png", words(self.study, "measures.samples")
                links.append(_tool("draw", (*drawn, *options), out, dit, made))
        config = self.recipes.pretraining(look)
        return Cell(
            str(place.relative_to(self.study.output_dir)), self.choices, look, seed, look * config.train.batch_size,
            look * flops_per_step(config)["total"], self._encoder, tuple(links),
        )

    @cached_property
    def _encoder(self) -> int:
        return parameter_counts(self.recipes.pretraining(self.study.looks[0]))["vision"]

    def _folder(self, *stages: Stage) -> Path:
        """Return the folder of the choices on the axes that set something for one of these stages."""
        folder = Path(self.study.output_dir)
        for axis, choice in self.choices.items():
            if any(settings.get(stage) for settings in self.study.axes[axis].values() for stage in stages):
                folder /= choice
        return folder

    def _place(self, look: int, *stages: Stage) -> Path:
        return self._folder(*stages) / f"step-{look:08}"

    def _tokenizer(self, look: int) -> tuple[list[Link], Path, Path]:
        """Return the links that make the tokenizer at this look, the pre-trained checkpoint, the finished tokenizer."""
        runs = self.study.looks_at == "runs"
        looks = (look,) if runs else self.study.looks
        own = (self._place(look, "tokenizer") if runs else self._folder("tokenizer")) / "pretrain"
        pretrain = self._once(own, lambda folder: self._pretrain(folder, looks))
        checkpoint = _checkpoint(pretrain.folder, look)
        if self.study.decoder.recipe is None:
            return [pretrain], checkpoint, checkpoint
        place = self._place(look, "tokenizer", "decoder")
        decoder = self._once(place / "decoder", lambda folder: self._decoder(folder, pretrain, checkpoint))
        convert = self._once(place / "convert", lambda folder: self._convert(folder, decoder, checkpoint))
        return [pretrain, decoder, convert], checkpoint, convert.outputs[0]

    def _pretrain(self, folder: Path, looks: tuple[int, ...]) -> Link:
        config = self.recipes.pretraining(looks[-1])
        own = [f"output_dir={folder}/run", "evaluation.at_end=false"]
        if self.study.looks_at == "runs":
            own.append(f"train.steps={looks[-1]}")
        else:
            every = math.gcd(*looks)
            own += [f"train.checkpoint_every={every}", f"train.keep_last={config.train.steps // every + 2}"]
        return Link(
            "pretrain", folder, (*self.recipes.arguments("tokenizer"), *own),
            tuple(_checkpoint(folder, look) for look in looks), settings_of(config),
            flops=config.train.steps * flops_per_step(config)["total"],
        )

    def _decoder(self, folder: Path, pretrain: Link, checkpoint: Path) -> Link:
        start = f"model.init_from={checkpoint}"
        config = self.recipes.decoder(start)
        return Link(
            "decoder", folder, (*self.recipes.arguments("decoder"), start, f"output_dir={folder}/run"),
            (_checkpoint(folder, config.train.steps),), settings_of(config), (pretrain,),
            config.train.steps * flops_per_step(config)["total"],
        )

    def _convert(self, folder: Path, decoder: Link, checkpoint: Path) -> Link:
        sources = ("--from", str(checkpoint), "--decoder", str(decoder.outputs[0]))
        return _tool("convert", (*sources, "--to", "hf-vtp"), folder / "tokenizer", decoder)

    def _latents(self, folder: Path, pretrain: Link, checkpoint: Path) -> Link:
        arguments = ("--tokenizer", str(checkpoint), *words(self.study, "latents"))
        return _tool("latents", arguments, folder / "latents", pretrain)

    def _dit(self, folder: Path, latents: Link, look: int, seed: int) -> Link:
        own = (f"data.root={latents.outputs[0]}", f"seed={seed}", f"output_dir={folder}/run")
        config = self.recipes.dit(own, look)
        return Link(
            "dit", folder, (*self.recipes.arguments("dit"), *own), (_checkpoint(folder, config.train.steps),),
            settings_of(config), (latents,),
            3.0 * config.train.steps * config.train.batch_size * dit_flops(config.model),
        )

    def _evaluate(self, folder: Path, made: Link, tokenizer: Path) -> Link:
        pictures = ("--pictures", f"{folder}/reconstructions.png")
        arguments = ("--checkpoint", str(tokenizer), *words(self.study, "measures.tokenizer"), *pictures)
        return _tool("evaluate", arguments, folder / "metrics.json", made)

    def _once(self, folder: Path, make: Callable[[Path], Link]) -> Link:
        if folder not in self._links:
            self._links[folder] = make(folder)
        return self._links[folder]


def _tool(kind: Kind, arguments: tuple[str, ...], out: Path, *after: Link) -> Link:
    """Return the link of a tool that writes ``out`` in the link's folder."""
    arguments = (*arguments, "--out", str(out))
    return Link(kind, out.parent, arguments, (out,), {"arguments": list(arguments)}, after)


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step-{step:08}"
