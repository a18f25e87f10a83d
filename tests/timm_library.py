"""Stands in for the timm library, which need not be installed."""

import copy
import sys
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
from torch import nn


def put_timm(monkeypatch: pytest.MonkeyPatch, models: Mapping[str, nn.Module]) -> None:
    """Let ``import timm`` find a library of these models, each of which it makes anew with the same weights."""
    library = SimpleNamespace(
        is_model=models.__contains__, list_models=lambda: list(models),
        create_model=lambda name, **given: copy.deepcopy(models[name]),
    )
    monkeypatch.setitem(sys.modules, "timm", library)
