"""A run of a recipe, from its files to its last checkpoint."""

from megavtp.launch import phase
from megavtp.launch.ranks import STOPPED
from megavtp.parallel.collectives import together
from megavtp.training.output_dir import OutputDir
from megavtp.training.recipe import Recipe
from megavtp.training.replay import replay_step
from megavtp.training.start import start_record
from megavtp.training.telemetry import Telemetry
from megavtp.training.trackers import check_trackers
from megavtp.training.trainer import Trainer


def run(recipe: Recipe, replay: int | None = None) -> int:
    """Train from the newest checkpoint, or from the start, to the end; return the exit status.

    With ``replay`` do that step (counted from 1) again instead and print what in it is not finite; write nothing.
    """
    phase.enter("opening data and building the model", slow=True)

    def open_files() -> OutputDir:
        recipe.open()
        return OutputDir(recipe.config, recipe.mesh.rank == 0)

    if replay is None:
        with together(open_files) as output:
            recipe.build()
            status = _train(recipe, output)
            recipe.engine.close()
    else:
        together(recipe.open)
        recipe.build()
        status = replay_step(recipe, replay)
        recipe.engine.close()
    return status


def _train(recipe: Recipe, output: OutputDir) -> int:
    check_trackers(recipe.config.telemetry)
    telemetry = Telemetry(recipe.config, recipe.mesh, recipe.flops_per_step(), output.keep, recipe.watches())
    trainer = Trainer(recipe, telemetry)
    phase.enter("reading the checkpoint", slow=True)
    start = trainer.resume()
    if recipe.mesh.rank == 0:
        telemetry.event("started", step=start, **start_record(recipe.mesh))
    for kind, note in recipe.notes():
        telemetry.event(kind, step=start, note=note)
    telemetry.start(start)
    output.begin()
    finished = trainer.run(start)
    if finished:
        phase.enter("the last evaluation", slow=True)
        recipe.finish(telemetry)
        telemetry.event("finished", step=recipe.config.train.steps)  # what scripts look for
    telemetry.close()
    return 0 if finished else STOPPED
