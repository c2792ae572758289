# SPDX-License-Identifier: MIT
"""How the tests of the main job run it: small fits by the command line."""

from __future__ import annotations

import json
from pathlib import Path

from camkernels.__main__ import main
from pictures import save, smooth

SMALL = ["--levels", "4", "--finest", "24", "--width", "16", "--hidden", "1", "--batch", "256"]
FILES = {"reconstruction.png", "error.png", "loss.png", "checkpoint.pt", "report.json"}


def fit(path: Path, out: Path, *arguments: str) -> int:
    stop = ["--steps", "12"] if not {"--steps", "--seconds", "--target-psnr"} & set(arguments) else []
    small = [] if "--resume" in arguments else SMALL
    return main(["fit", "image", str(path), "--out", str(out), *small, *stop, *map(str, arguments)])


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def fit_once(folder: Path) -> Path:
    """The folder of a finished fit of folder/photo.png."""
    assert fit(save(smooth(), folder / "photo.png"), folder / "out") == 0
    return folder / "out"


def expect_error(capsys, arguments: list, *words: str) -> None:
    capsys.readouterr()
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as leave:  # argparse's own
        status = leave.code
    message = capsys.readouterr().err
    assert status == 2 and "Traceback" not in message
    assert all(word in message for word in words), message
