"""Odd installations, odd systems and wrong usage: one line that says what to do, and the right exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from making import SMALL, coloured, command, fault, fingerprint, labelled, picture, untouched

import tl_tutorial as tl
from tl_tutorial import cli


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return coloured(tmp_path / "colours")


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    "The one line on stderr with which the command line refuses; exit code 1, nothing on stdout."
    assert cli.main([str(a) for a in arguments]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("tl-tutorial: ")
    return said.err


@fault("K01 torchvision that does not fit")
def test_torchvision_that_does_not_fit(fault: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    "A torchvision that fails on import as a mismatched build does; what does not need it works and can be saved."
    (tmp_path / "broken" / "torchvision").mkdir(parents=True)
    (tmp_path / "broken" / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "broken")
    said = refused(capsys, "train", root, "--out", "m.safetensors", "--arch", "resnet18")
    assert "do not fit together" in said and "pip install" in said
    file = tl.fine_tune(root, epochs=1, **SMALL).save(tmp_path / "m.safetensors")
    assert len(tl.load(file).predict(root)) == 24


@fault("K02 no network")
def test_no_network(fault: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None) # it remembers the proxies of its first use, for the rest of the process
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert cli.main(["train", str(root), "--out", "m.safetensors", "--arch", "squeezenet1_1"]) == 1
    said = capsys.readouterr()
    assert "squeezenet1_1 cannot be fetched" in said.err and "weights=FILE" in said.err and "Traceback" not in said.err and said.out == ""
    assert not [p for p in (tmp_path / "torch").rglob("*") if p.is_file()]


@fault("K03 no GPU")
def test_no_gpu(fault: str, root: Path, capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys, "train", root, "--out", "m.safetensors", "--arch", "small_cnn", "--device", "cuda:99")
    assert "cuda:99 is not there" in said and "device='auto'" in said and not Path("m.safetensors").exists()


@fault("K04 no bfloat16 in hardware")
def test_no_bfloat16(fault: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Such a GPU computes in float16, unless mixed precision is switched off; on the CPU the switch changes no bit."
    from tl_tutorial.inference import half_type
    from tl_tutorial.steps import half_precision

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert half_type(torch.device("cuda"), tl.Settings(amp=True)) == torch.float16
    with half_precision(torch.device("cuda"), tl.Settings(amp=False)):
        assert not torch.is_autocast_enabled("cuda")
    one, two = (fingerprint(tl.fine_tune(root, epochs=1, amp=amp, device="cpu", **SMALL)) for amp in (True, False))
    assert one == two


@fault("K05 no ipywidgets")
def test_no_ipywidgets(fault: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from tl_tutorial.pixels import track

    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with untouched(root):
        assert tl.fine_tune(root, epochs=1, **{**SMALL, "progress": True}).classes == ("blue", "green", "red")
        assert list(track([1, 2, 3], 3, label="looking")) == [1, 2, 3]
    assert "epoch 1: training loss" in capsys.readouterr().err


@fault("K06 a locale without UTF-8")
def test_a_locale_without_utf8(fault: str, tmp_path: Path) -> None:
    "Names that the terminal cannot show are escaped; the report is whole."
    root = labelled(tmp_path / "p", ("caf\u00e9", "\u732b"))
    (root / "caf\u00e9" / "\u732b.png").write_bytes(b"")
    for spoken in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = command("check", root, env={**os.environ, **spoken}, text=False)
        assert done.returncode == 1 and b"Traceback" not in done.stderr and b"7 images, 2 classes" in done.stdout
        assert b"0 bytes" in done.stderr and b".png" in done.stderr and done.stdout.isascii()


@fault("K07 backslashes in paths and names")
def test_windows_paths(fault: str, tmp_path: Path) -> None:
    "Where the separator is a slash, a backslash is a letter: a missing folder is named, a class keeps its name."
    labelled(tmp_path / "photos", ("cat", "dog"))
    with pytest.raises(tl.DataError, match=r"photos\\cat: there is no such folder; check the path"):
        tl.check("photos\\cat")
    if os.sep == "/":
        for number, name in enumerate(("C:\\big\\cat", "CON", "nul.")):
            for k in range(3):
                picture(tmp_path / "w" / name / f"a:b\\{k}.png", 10 * number + k)
        clf = tl.fine_tune(tmp_path / "w", epochs=1, **SMALL)
        assert clf.classes == ("C:\\big\\cat", "CON", "nul.")
        again = tl.load(clf.save(tmp_path / "m.safetensors"))
        assert again.classes == clf.classes and again.evaluate(tmp_path / "w").total == 9


@fault("K08 python -O")
def test_without_assertions(fault: str, root: Path) -> None:
    "The same weights, and the same refusals: nothing depends on an assertion."
    Path("settings.ini").write_text("[model]\nweights = none\n")
    code = ("import sys, tl_tutorial as tl; from tl_tutorial.cli import main; assert False; "
            f"bad = main(['check', 'nothing']); sys.exit(10 * bad + main(['train', {str(root)!r}, '--out', 'm.safetensors', '--arch', 'small_cnn', '--size', '32', '--epochs', '1']))")
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 10 and "no such folder" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert fingerprint(tl.load("m.safetensors")) == fingerprint(tl.fine_tune(root, epochs=1, **SMALL))
