import json
import math

import pytest

from megavtp.errors import UserError
from megavtp.evaluation import format_table, write_metrics

METRICS = {
    "samples": 120.0, "zero_shot/group_top1": 0.5, "chance/zero_shot/group_top1": 0.125,
    "reconstruction/psnr": 21.346, "chance/reconstruction/psnr": 9.0, "reconstruction/lpips_vgg": 0.25,
}


def test_table():
    assert format_table(METRICS, {"untrained": {"zero_shot/group_top1": 0.1, "reconstruction/psnr": 5.0}}) == (
        "metric                       value  untrained   chance\n"
        "------------------------  --------  ---------  -------\n"
        "samples                        120\n"
        "zero_shot/group_top1        50.0 %     10.0 %   12.5 %\n"
        "reconstruction/psnr       21.35 dB    5.00 dB  9.00 dB\n"
        "reconstruction/lpips_vgg    0.2500"
    )


def test_json_is_valid_and_whole(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    write_metrics(path, {"metrics": METRICS | {"reconstruction/psnr": math.nan}, "skipped": {}})
    content = json.loads(path.read_text())
    assert content["metrics"]["reconstruction/psnr"] is None and content["metrics"]["samples"] == 120
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_metrics(tmp_path / "file" / "metrics.json", {})
