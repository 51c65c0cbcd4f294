"""A classifier as an ONNX file, in miniature; apart from the other tests of results, since the exporter takes seconds to start."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_units_result import classifier, network

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
