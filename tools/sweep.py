"""Every kind of network through every use: `python -m tools.sweep` writes nbs/reference/sweep_results.json.

All classification networks of torchvision and sixty of timm, at random weights: create, forward at the natural
and at another size, blocks, rates, freezing, one training step, Grad-CAM, saving and loading, and ONNX.
`python -m tools.sweep NAME …` prints the rows of a few networks and writes nothing; `--go-on` adds what is missing
or has failed to the results of an earlier run; `--onnx` exports again, and keeps the rest of those rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import tl_tutorial as tl
import tl_tutorial.backbones
import tl_tutorial.explaining
import tl_tutorial.freezing
from tl_tutorial.backbones import blocks
from tl_tutorial.explaining import evidence
from tl_tutorial.freezing import freeze_start, layers, snapshot
from tl_tutorial.network import Network

RESULTS = Path(__file__).parents[1] / "nbs" / "reference" / "sweep_results.json"
LARGE = 200 # million parameters, above which only shapes are sent through
TIMM = (
    "resnet50d", "seresnet50", "mobilenetv2_100", "mobilenetv3_small_050", "mobilenetv4_conv_small",
    "tf_efficientnet_b0", "mixnet_s", "lcnet_050", "ghostnet_100", "regnety_002", "vgg11_bn", "dla34", "dpn68",
    "hrnet_w18_small", "xception41", "res2net50_26w_4s", "resnest14d", "cspdarknet53", "repvgg_a0", "rexnet_100",
    "eca_nfnet_l0", "convnext_atto", "inception_next_tiny", "edgenext_xx_small", "fastvit_t8", "mobilevit_xxs",
    "efficientformer_l1", "efficientformerv2_s0", "efficientvit_b0", "levit_128s", "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "cait_xxs24_224", "crossvit_tiny_240", "coat_tiny", "maxvit_nano_rw_256",
    "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "pvt_v2_b0", "twins_pcpvt_small", "poolformer_s12",
    "mixer_s16_224", "resmlp_12_224", "xcit_nano_12_p16_224", "volo_d1_224", "tnt_s_legacy_patch16_224", "nest_tiny",
    "mvitv2_tiny", "hiera_tiny_224", "hgnetv2_b0", "davit_tiny", "focalnet_tiny_srf", "gcvit_xxtiny",
    "repghostnet_050", "starnet_s1", "mambaout_femto", "tiny_vit_5m_224", "vovnet39a", "botnet26t_256", "pit_ti_224",
)


def names() -> list[str]:
    "Every network that is tried."
    from torchvision import models

    return ["efficientnet_lite0", "small_cnn", *sorted(models.list_models(module=models)), *(f"timm:{name}" for name in TIMM)]


def gist(call: Callable[[], Any]) -> Any:
    "What a step gave, or the sentence with which it was refused; anything else that is raised is a failure and goes up."
    try:
        return call()
    except tl.TLError as error:
        return f"refused: {error}"


@contextmanager
def shapes_only() -> Iterator[None]:
    "Inside, networks are built on PyTorch's device `meta`: layers and shapes without numbers, in a fraction of the time."
    with patch.object(tl.backbones, "ordinary", lambda: torch.device("meta")):
        yield


def depth(network: Network) -> dict[str, Any]:
    "Layers, the lowest rate as a share of the head's, and the share of the body that learns at three settings of `tuned`."
    groups = tl.parameter_groups(network, 1.0, decay_rate=0.8)
    whole = sum(p.numel() for p in network.body.parameters())
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in network.parameters()}
    learning = {}
    for tuned in (0.75, 0.5, 0.25):
        freeze_start(tl.unfreeze(network.body), tuned)
        learning[str(tuned)] = round(sum(p.numel() for p in network.body.parameters() if p.requires_grad) / whole, 3)
        assert 0 < learning[str(tuned)] < 1 or len(layers(network.body)) < 3
    tl.unfreeze(network.body)
    return {"blocks": len(blocks(network.body)), "layers": len(layers(network.body)),
            "lowest_rate": round(min(group["lr"] for group in groups), 4), "learning": learning}


def frozen_step(network: Network, side: int) -> float:
    "One step with half of the body frozen: the loss; what is frozen, buffers included, did not change."
    freeze_start(network.body, 0.5)
    still = [name for name, p in network.body.named_parameters() if not p.requires_grad]
    tl.freezing.freeze_statistics(network)
    before = snapshot(network.body)
    optimizer = torch.optim.AdamW(tl.parameter_groups(network, 1e-3))
    loss = torch.nn.functional.cross_entropy(network.train()(torch.rand(2, 3, side, side)), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    changed = set(tl.check_frozen(network.body, before))
    assert not changed & set(still) and not any("running" in name for name in changed) and bool(loss.isfinite())
    assert changed
    tl.unfreeze(network.body)
    return round(float(loss.detach()), 3)


def layout(network: Network, side: int) -> dict[str, Any]:
    "Sides of the maps that Grad-CAM uses, and how well a place on them goes with the same place in the picture (correlation)."
    network.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, side, side, generator=generator).requires_grad_(True)
    heat = tl.explaining.grad_cam(network, images)
    assert heat.shape == (1, side, side) and bool(heat.isfinite().all())
    with torch.enable_grad():
        maps, _ = evidence(network, images)
    down, across = maps.shape[2:]
    places = [(i, j) for i in (0, down - 1) for j in (0, across - 1)]
    centre = (torch.arange(side) + 0.5) / side
    seen, meant = [], []
    for i, j in places:
        probe = (maps[0, :, i, j] * torch.randn(maps.shape[1], generator=generator)).sum()
        slope, = torch.autograd.grad(probe, images, retain_graph=True)
        power = slope[0].double().square().sum(0)
        if float(power.max()) > 0:
            power = (power / power.max()) ** 2 # random weights give tiny slopes
            power = power / power.sum()
            seen.append((float((power.sum(1) * centre).sum()), float((power.sum(0) * centre).sum())))
            meant.append(((i + 0.5) / down, (j + 0.5) / across))
    both = [float(np.corrcoef([s[k] for s in seen], [m[k] for m in meant])[0, 1]) for k in (0, 1)]
    return {"maps": [down, across], "agreement": round(min(both), 2)}


def classifier(network: Network, arch: str, side: int) -> tl.Classifier:
    "The network as what a training gives."
    return tl.Classifier(network.eval(), ("cat", "dog", "owl", "pig", "rat"), side, tl.Settings(arch=arch))


def kept(network: Network, arch: str, side: int) -> str:
    "Save and load, as a classifier and as the start of another: the same answers, or an assertion fails."
    clf = classifier(network, arch, side)
    image = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        twin = tl.load(clf.save(Path(folder) / "m.safetensors"), device="cpu")
        wanted = list(clf.predict(image)[0].probabilities.values())
        assert np.allclose(list(twin.predict(image)[0].probabilities.values()), wanted, atol=1e-5)
        after = tl.create(None, 3, weights=Path(folder) / "m.safetensors")
    assert after.arch == arch and all(torch.equal(a, b) for a, b in zip(after.body.state_dict().values(), network.body.state_dict().values(), strict=True))
    return "same answers"


def exported(network: Network, arch: str, side: int) -> str:
    "Export, and run the file in onnxruntime: the same probabilities, or an assertion fails."
    import onnxruntime

    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        session = onnxruntime.InferenceSession(classifier(network, arch, side).export_onnx(Path(folder) / "m.onnx"))
        assert np.allclose(session.run(None, {"images": images.numpy()})[0], network(images).softmax(1), atol=1e-4)
    return "same probabilities"


def small_side(network: Network) -> int:
    "A side that the network takes and that costs little."
    prepared = network.preprocess
    return max(64, prepared.least) if prepared.size > prepared.least else prepared.size


def export_again(arch: str, found: dict[str, Any]) -> dict[str, Any]:
    "The row of an earlier run with its export done now; networks of which only shapes were tried stay as they are."
    if found.get("only") == "shapes":
        return found
    torch.manual_seed(0)
    network = tl.create(arch, 5, weights="none")
    return found | {"saved": "same answers", "onnx": gist(lambda: exported(network, arch, small_side(network)))}


def row(arch: str, quick: bool = False) -> dict[str, Any]:
    "One network through every use; quick: those that need no numbers."
    began = time.perf_counter()
    torch.manual_seed(0)
    try:
        with shapes_only():
            network = tl.create(arch, 5, weights="none")
    except tl.ModelError: # some need numbers while they are built
        network = tl.create(arch, 5, weights="none")
    natural, least, small = network.preprocess.size, network.preprocess.least, small_side(network)
    found: dict[str, Any] = {"size": natural, "least": least, "features": network.head.in_features,
                             "million": round(sum(p.numel() for p in network.parameters()) / 1e6, 1)}
    for side in dict.fromkeys((natural, least, small + 37)):
        found[f"takes_{side}"] = gist(lambda side=side: network.check_size(side) or "yes")  # type: ignore[misc]
    found |= depth(network)
    if found["million"] <= LARGE and not quick:
        network = tl.create(arch, 5, weights="none")
        with torch.no_grad():
            assert network.eval()(torch.rand(1, 3, small, small)).shape == (1, 5)
        found["step"] = frozen_step(network, small)
        view = max(small, min(natural, 96))
        found["grad_cam"] = gist(lambda: layout(network, view))
        found["saved"] = kept(network, arch, small)
        found["onnx"] = gist(lambda: exported(network, arch, small))
    else:
        found["only"] = "shapes"
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks to try; none: all, and the results are written")
    parser.add_argument("--go-on", action="store_true", help="keep the rows of an earlier run that succeeded")
    parser.add_argument("--quick", action="store_true", help="only what needs no numbers: sizes, blocks, rates, freezing")
    parser.add_argument("--onnx", action="store_true", help="only export, and add what came out to the rows of an earlier run")
    args = parser.parse_args()
    asked = args.names
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    import timm
    import torchvision

    rows: dict[str, Any] = {}
    if args.onnx:
        rows = json.loads(RESULTS.read_text())["networks"]
    elif args.go_on and RESULTS.exists():
        rows = {arch: found for arch, found in json.loads(RESULTS.read_text())["networks"].items() if "failed" not in found
                and ("saved" in found or found["million"] > LARGE and "only" in found)}
    for arch in asked or [name for name in names() if name not in rows or args.onnx and "onnx" not in rows[name]]:
        try:
            rows[arch] = export_again(arch, rows[arch]) if args.onnx else row(arch, args.quick)
        except Exception as error: # a failure is a result too
            rows[arch] = rows.get(arch, {}) | {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps({arch: rows[arch]}), flush=True)
        if not asked:
            versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
            RESULTS.write_text(json.dumps({"versions": versions, "networks": rows}, indent=1) + "\n")
    failed = [arch for arch, found in rows.items() if "failed" in found]
    print(f"{len(rows)} networks, failed: {', '.join(failed) or 'none'}", file=sys.stderr)


if __name__ == "__main__":
    main()
