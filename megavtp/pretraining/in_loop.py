"""Pictures and metrics of held-out data while a run trains."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megavtp.config.sizes import ResolvedConfig
from megavtp.data.captions import CaptionTokenizer
from megavtp.data.loader import EvalDataset
from megavtp.data.shards import ShardDataset, open_dataset, split_folders
from megavtp.evaluation import VTPEvaluated, evaluate, format_table, write_metrics
from megavtp.models.lpips import PERCEPTUAL_NETS
from megavtp.models.vtp import VTP
from megavtp.parallel.engine import Engine
from megavtp.parallel.looking import look_once
from megavtp.parallel.mesh import Mesh
from megavtp.pixels import normalise, to_uint8
from megavtp.training.pictures import reconstruction_grid
from megavtp.training.telemetry import Telemetry


class InLoopEvaluation:
    """Evaluates while a run trains. Every rank calls the methods, as ZeRO-3 gathers weights in each forward.

    Without a test split in ``data.root`` there are no metrics, and the pictures show training images.
    """

    def __init__(
        self, config: ResolvedConfig, engine: Engine[VTP], mesh: Mesh, train_set: ShardDataset,
        tokenizer: CaptionTokenizer, perceptual: Callable[[Tensor, Tensor], Tensor] | None, telemetry: Telemetry,
    ):
        self.config, self.engine, self.mesh = config, engine, mesh
        self.tokenizer, self.telemetry = tokenizer, telemetry
        self.output_dir = Path(config.output_dir)
        test_set = look_once(self._open_test)
        self.train_set = self._samples(train_set)
        self.test_set = None if test_set is None else self._samples(test_set)
        net = PERCEPTUAL_NETS.get(config.objectives.reconstruction.perceptual)
        self.perceptual = {} if perceptual is None else {f"lpips_{net}": perceptual}

    def _open_test(self) -> ShardDataset | None:
        folder = split_folders(Path(self.config.data.root)).get("test")
        return None if folder is None else open_dataset(folder)

    def _samples(self, dataset: ShardDataset) -> EvalDataset:
        most, size = self.config.evaluation.max_samples, self.config.model.image_size
        return EvalDataset(dataset, self.tokenizer, size, most, self.config.data.max_pixels)

    @torch.no_grad()
    def pictures(self, step: int) -> None:
        """Write ``pictures/step-N.png``: the same held-out images each time, above their reconstructions."""
        if "reconstruction" not in self.engine.module.objectives:
            return
        with self.telemetry.paused():
            images = self._picture_images()
            path = self.output_dir / "pictures" / f"step-{step:06d}.png"
            reconstructions = self.engine.infer("reconstruction", images=normalise(images.to(self.engine.device)))
            if self.mesh.rank == 0:
                reconstruction_grid(images, to_uint8(reconstructions).cpu(), path)
                self.telemetry.picture(step, "reconstructions", path)

    def _picture_images(self) -> Tensor:
        source, count = self.test_set or self.train_set, self.config.telemetry.pictures
        few = EvalDataset(source.dataset, source.tokenizer, source.size, count, source.max_pixels)
        return next(few.batches(count))["image"]

    @torch.no_grad()
    def metrics(self, step: int) -> None:
        """Evaluate on the test split; write the metrics to ``evaluation.json`` and the log."""
        if self.test_set is None:
            return
        module = self.engine.module
        model = VTPEvaluated(self.engine.infer, module.objectives, module.config.vision.depth)
        with self.telemetry.paused():
            found = evaluate(
                model, self.test_set, self.train_set, self.config.evaluation, self.mesh, tokenizer=self.tokenizer,
                device=self.engine.device, perceptual=self.perceptual,
            )
        if self.mesh.rank == 0:
            write_metrics(self.output_dir / "evaluation.json", {"step": step, **found})
            print("\n" + format_table(found), flush=True)
        self.telemetry.event("evaluation", step=step, **found)

    def finish(self, step: int) -> None:
        """Write the last pictures and the metrics of a finished run."""
        if self.config.telemetry.pictures_every:
            self.pictures(step)
        if self.config.evaluation.at_end:
            self.metrics(step)
