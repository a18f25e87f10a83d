"""The peak speed, memory and links of known devices."""

import re
from dataclasses import dataclass

from megavtp.errors import UserError

# Dense bf16 TFLOP/s of one device with float32 accumulation, from the makers' data sheets (half of what they print
# with sparsity). A key applies when all its words are in the device's name; the key with most words wins.
_PEAK_BF16 = {
    "a10": 125.0, "a30": 165.0, "a40": 149.7, "a100": 312.0, "a800": 312.0, "a6000": 154.8,
    "h100": 989.4, "h100 pcie": 756.5, "h100 nvl": 835.5, "h800": 989.4, "h800 pcie": 756.5,
    "h200": 989.4, "h200 nvl": 835.5, "h20": 148.0, "gh200": 989.4, "b200": 2250.0, "gb200": 2500.0,
    "l4": 121.0, "l40": 181.05, "l40s": 362.05, "6000 ada": 364.25,
    "rtx 3090": 71.0, "rtx 4080": 97.5, "rtx 4090": 165.2, "rtx 5090": 209.5,
    "mi250x": 191.5, "mi300x": 1307.4, "mi325x": 1307.4,  # one of the two dies of an MI250X is one device
}


def device_peak_tflops(name: str, precision: str) -> float | None:
    """Return the peak of the device that ``torch.cuda.get_device_name`` calls ``name``; None if it is not known.

    It is known for bf16 alone: the peak of float32 products depends on torch's settings (TF32).
    """
    if precision != "bf16":
        return None
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    matches = [key for key in _PEAK_BF16 if words.issuperset(key.split())]
    return _PEAK_BF16[max(matches, key=lambda key: len(key.split()))] if matches else None


@dataclass(frozen=True)
class Device:
    """One accelerator in its usual machine.

    Attributes:
        memory: GiB.
        memory_bandwidth: GB/s.
        inside: GB/s in one direction to the other devices of its node.
        between: GB/s in one direction to other nodes; each device's share of the network.
        peak_tflops: dense bf16.
    """

    name: str
    memory: float
    memory_bandwidth: float
    inside: float
    between: float

    @property
    def peak_tflops(self) -> float:
        return _PEAK_BF16[self.name]


# Memory and links from the makers' data sheets of the SXM (OAM, PCIe) modules: half of the two-way NVLink figure. The
# network is that of the makers' reference systems: DGX A100 200 Gbit/s a device, DGX H100 and B200 and MI300X 400; a
# PCIe card as one 200 Gbit/s port.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", 80, 2039, 300, 25), Device("a800", 80, 2039, 200, 25), Device("h100", 80, 3350, 450, 50),
        Device("h800", 80, 3350, 200, 50), Device("h200", 141, 4800, 450, 50), Device("h20", 96, 4000, 450, 50),
        Device("b200", 180, 8000, 900, 50), Device("mi300x", 192, 5300, 448, 50), Device("l40s", 48, 864, 32, 25),
        Device("rtx 4090", 24, 1008, 32, 25),
    )
}


def find_device(name: str) -> Device:
    """Return the device of that name, in upper or lower case. UserError lists the known ones."""
    if name.lower() not in DEVICES:
        raise UserError(f"device {name}: not known to the planner; choose one of {', '.join(DEVICES)}")
    return DEVICES[name.lower()]
