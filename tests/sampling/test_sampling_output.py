"""Sheets, folders and ADM's file; the tool from its command line."""

import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_fakes import STATISTICS, TOKENIZER, tokenizer_facts, write_dit

from megavtp.dit.sampling.output import draw_sheet, open_output
from megavtp.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "sample.py"
IMAGES = torch.randint(0, 256, (11, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NAMES = ["one"] * 9 + ["two"] * 2


def write(out, images=IMAGES, names=NAMES):
    with open_output(out, names) as add:
        for batch in images.split(4):
            add(batch)


def test_a_folder_of_pictures(tmp_path):
    write(tmp_path / "new" / "samples")
    files = sorted((tmp_path / "new" / "samples").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(11)]
    for file, image in zip(files, IMAGES):
        assert np.array_equal(np.array(Image.open(file)), image.permute(1, 2, 0).numpy())
    with pytest.raises(UserError, match="exists; choose another --out"):
        write(tmp_path / "new" / "samples")


def test_adms_file(tmp_path):
    write(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], IMAGES.permute(0, 2, 3, 1).numpy())
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None
    write(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_sheet(tmp_path):
    write(tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    factor = 20  # so that 5 pixels are at least 96
    assert sheet.height == 4 + 3 * (6 * factor + 4)  # eight and one of the first name, two of the second
    margin = sheet.width - 8 * (5 * factor + 4)
    pixels = np.array(sheet)
    for row, column, index in ((0, 0, 0), (0, 7, 7), (1, 0, 8), (2, 1, 10)):
        top, left = 4 + row * (6 * factor + 4), margin + column * (5 * factor + 4)
        cell = pixels[top : top + 6 * factor : factor, left : left + 5 * factor : factor]
        assert np.array_equal(cell, IMAGES[index].permute(1, 2, 0).numpy())
    names = (pixels[:, :margin].min(axis=(1, 2)) < 128).reshape(-1)
    rows = [names[4 + row * 124 : 128 + row * 124].any() for row in range(3)]
    assert rows == [True, False, True]  # a name stands beside its first row
    assert draw_sheet(torch.zeros(1, 3, 256, 256, dtype=torch.uint8), ["x"]).height == 264


def test_what_fails_leaves_nothing(tmp_path):
    (tmp_path / "old.npz").write_bytes(b"old")
    for name in ("sheet.png", "file.npz", "folder", "old.npz"):
        with pytest.raises(ZeroDivisionError), open_output(tmp_path / name, NAMES) as add:
            add(IMAGES[:4])
            raise ZeroDivisionError
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("old.npz", b"old")]
    for out, names, text in (
        ("samples.jpg", NAMES, "give a .png file"), ("many.png", ["x"] * 1025, "too many for a sheet"),
        ("old.npz/inside.npz", NAMES, "cannot be written"), ("old.npz/inside", NAMES, "cannot be written"),
    ):
        with pytest.raises(UserError, match=text):
            write(tmp_path / out, names=names)


def tool(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_path(str(TOOL), run_name="__main__")
    return end.value.code, capsys.readouterr()


def test_the_tool(tmp_path, monkeypatch, capsys):
    checkpoint = write_dit(tmp_path / "ckpt", replace(tokenizer_facts(), statistics=STATISTICS))
    given = ["--dit", checkpoint, "--tokenizer", TOKENIZER, "--steps", 2, "--device", "cpu", "--per-class", 3]
    sheet = ["--classes", "1,animals", "--out", tmp_path / "samples.png", "--guidance", "2", "--interval", "0.1,1"]
    status, said = tool(monkeypatch, capsys, *given, *sheet)
    assert status == 0 and said.out == f"wrote 6 images to {tmp_path / 'samples.png'}\n"
    assert Image.open(tmp_path / "samples.png").height == 4 + 2 * (128 + 4)
    status, said = tool(
        monkeypatch, capsys, *given, "--classes", "all", "--out", tmp_path / "samples.npz", "--batch-size", 4
    )
    assert status == 0 and np.load(tmp_path / "samples.npz")["arr_0"].shape == (9, 64, 64, 3)
    status, said = tool(monkeypatch, capsys, *given, "--classes", "12", "--out", tmp_path / "x.png")
    assert status == 2 and said.err.startswith("error: --classes 12: the DiT has 3") and said.err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
