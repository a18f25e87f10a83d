"""What known devices can do at most."""

from __future__ import annotations

import re

# Dense bf16 TFLOP/s of one device with float32 accumulation, from the makers' data sheets (half of what they print
# with sparsity). A key applies when all its words are in the device's name; the key with most words wins.
_PEAK_BF16 = {
    "a10": 125.0, "a30": 165.0, "a40": 149.7, "a100": 312.0, "a800": 312.0, "a6000": 154.8,
    "h100": 989.4, "h100 pcie": 756.5, "h100 nvl": 835.5, "h800": 989.4, "h800 pcie": 756.5,
    "h200": 989.4, "h200 nvl": 835.5, "h20": 148.0, "gh200": 989.4, "b200": 2250.0, "gb200": 2500.0,
    "l4": 121.0, "l40": 181.05, "l40s": 362.05, "6000 ada": 364.25,
    "rtx 3090": 71.0, "rtx 4080": 97.5, "rtx 4090": 165.2, "rtx 5090": 209.5,
    "mi250x": 191.5, "mi300x": 1307.4, "mi325x": 1307.4,  # mi250x: one of its two dies, which is one device
}


def device_peak_tflops(name: str) -> float | None:
    """Peak of the device that ``torch.cuda.get_device_name`` calls ``name``; None if it is not known."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    matches = [key for key in _PEAK_BF16 if words.issuperset(key.split())]
    return _PEAK_BF16[max(matches, key=lambda key: len(key.split()))] if matches else None
