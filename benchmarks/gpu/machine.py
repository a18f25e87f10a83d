"""What the report says of the machine."""

import torch

from benchmarks.gpu.measure import tell
from megavtp.parallel.mesh import SINGLE
from megavtp.training.start import start_record


def describe(_: str, rehearse: bool) -> None:
    """Tell the device, the machine and the versions, without the machine's name: the page is to be published."""
    record = start_record(SINGLE)
    machine = {name: record["machine"][name] for name in ("device", "cores", "memory_gib")}
    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else None
    tell(**machine, device_memory_gib=memory, versions=record["versions"])
