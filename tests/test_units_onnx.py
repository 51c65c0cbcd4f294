"""A classifier as an ONNX file, in miniature; apart from the other tests of results, since the exporter takes seconds to start."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_units_result import classifier, network

import tl_tutorial as tl
from tl_tutorial.metrics import softmax


@pytest.mark.filterwarnings("ignore")
def test_temperature_reaches_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network()(images).numpy()
    found = onnxruntime.InferenceSession(str(classifier(3.0).export_onnx(tmp_path / "m.onnx"))).run(None, {"images": images.numpy()})[0]
    assert np.allclose(found, softmax(logits, 3.0), atol=1e-5) and not np.allclose(found, softmax(logits), atol=1e-2)


def test_a_network_that_onnx_lacks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The first cause is said, not the exporter's advice to mend it; what was there stays."
    pytest.importorskip("onnxscript")

    def export(*_: object, **__: object) -> None:
        try:
            raise AssertionError("only 4D queries are supported")
        except AssertionError as cause:
            raise RuntimeError("\x1b[96mThis is step 3/3\x1b[0m of many\nlines") from cause

    monkeypatch.setattr(torch.onnx, "export", export)
    (tmp_path / "m.onnx").write_bytes(b"older")
    clf = tl.Classifier(tl.create("small_cnn", 2).eval(), ("a", "b"), 32, tl.Settings(arch="small_cnn"))
    with pytest.raises(tl.ModelError, match=r"small_cnn: PyTorch .* \(only 4D queries are supported\); export another one"):
        clf.export_onnx(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"older"
