"""How many right answers does the automatic head give, against simple probes on the same pictures?

    python -m benchmarks.accuracy [--sets "clip art" weaves …] [--shots 5 10 20 40] [--draws 5]
                                  [--fashion DIR] [--photos DIR] [--cifar FILE.npz] [--out FILE.json]

For each set, number of training pictures a class and draw: the head on the panel of three networks as `fine_tune(…, epochs=0)` fits
it, its side and the share of moments chosen by left-out answers; the same without moments; and scikit-learn's logistic regression
and ridge on EfficientNet-Lite0's features of the same pictures at 224 and at 288 pixels.
Features of a set are computed once. Fine-tuning is not part of this, nor are other libraries' recipes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.sets import Pictures, development
from tl_tutorial.batches import Batches, stored_side
from tl_tutorial.evidence import SHARES, SIZES, Seen, best_share, head_on
from tl_tutorial.inference import features, placed
from tl_tutorial.material import Material
from tl_tutorial.metrics import calibration_error, softmax
from tl_tutorial.network import Network, Preprocess
from tl_tutorial.panel import SISTERS, Panel, load_lite
from tl_tutorial.pixels import to_square
from tl_tutorial.settings import Settings

OUT = Path(__file__).parents[1] / "nbs/reference/accuracy_results.json"
FIRST = next(iter(SISTERS))


class Raw(torch.nn.Module):
    "A network's own features, as a probe in another library would take them."
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.maps(x)  # type: ignore[operator, no-any-return]


def squares(images: list[np.ndarray], size: int) -> Batches:
    "Pictures as they are stored for one side."
    cut = np.stack([np.asarray(to_square(Image.fromarray(image), stored_side(size))) for image in images])
    return Batches(cut, np.zeros(len(cut)), size, 64)


def looked(body: torch.nn.Module, width: int, batches: Batches) -> torch.Tensor:
    "What a body says of pictures."
    return features(placed(Network(body, width, 1, Preprocess()), "cpu"), batches, settings=Settings())  # type: ignore[arg-type]


def seen(batches: Batches, names: list[str]) -> Seen:
    "Last features and moments by some of the three networks."
    panel, last = Panel([load_lite(name) for name in names], fine=True), 1280 * len(names)
    found = looked(panel, panel.width, batches)
    return Seen(found[:, :last], found[:, last:])


def drawn(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    "Rows of `shots` pictures of each class, or of all where there are fewer."
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == k))[:shots] for k in np.unique(labels)])


def ours(table: dict[str, Seen], rows: np.ndarray, labels: np.ndarray, first: int, shares: tuple[float, ...]) -> dict[str, object]:
    "Logits of the test pictures, the accuracy that the head says of itself, its side and its share of moments."
    none, some, settings = np.zeros((0, 1, 1, 3), np.uint8), torch.from_numpy(rows), Settings()
    mine = Material(none, labels[rows], none, labels[:0], 1, int(labels.max()) + 1)
    choose = lambda seen: best_share(seen.rows(some), mine, settings=settings, shares=shares)
    size = min(SIZES, key=lambda one: choose(table[f"{FIRST} {one}"])[0])
    panel = table[f"panel {size}"]
    chosen = choose(panel)[1]
    head = head_on(panel.rows(some), chosen, material=mine, settings=settings)
    test = torch.cat([panel.last, panel.moments], 1)[first:, :head.weight.shape[1]]
    right = float((head.logits.argmax(1).numpy() == labels[rows]).mean())
    return {"logits": (test @ head.weight.T + head.bias).numpy(), "said": right, "size": size, "share": chosen}


def probe(kind: str, train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    "What a simple probe says of the test pictures; features are standardised."
    from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    model = LogisticRegression(max_iter=500) if kind == "logistic" else RidgeClassifierCV(np.geomspace(1, 1e5, 11))
    return make_pipeline(StandardScaler(), model).fit(train, labels).predict(test)


def measured(name: str, pictures: tuple[Pictures, Pictures], shots: list[int], draws: int) -> list[dict[str, object]]:
    "All rows of one set."
    (train, labels), (test, truth) = pictures
    keep = drawn(labels, max(shots), 99)
    train, labels, first, began = [train[k] for k in keep], labels[keep], len(keep), time.perf_counter()
    raws, table = {}, {}
    for size in SIZES:
        batches = squares(train + test, size)
        raws[size] = looked(Raw(load_lite(FIRST)), 1280, batches).numpy()
        table[f"{FIRST} {size}"] = seen(batches, [FIRST])
        table[f"panel {size}"] = table[f"{FIRST} {size}"].beside(seen(batches, list(SISTERS)[1:]))
    print(f"{name}: features of {len(train) + len(test)} pictures in {time.perf_counter() - began:.0f} s", flush=True)
    found: list[dict[str, object]] = []
    for count in (count for count in shots if count <= np.bincount(labels).max()):
        for draw in range(draws):
            rows = drawn(labels, count, draw)
            mine, plain = (ours(table, rows, labels, first, shares) for shares in (SHARES, (0.0,)))
            right = lambda found: float((found["logits"].argmax(1) == truth).mean())
            row: dict[str, object] = {"set": name, "shots": count, "draw": draw, "test": len(test), "size": mine["size"],
                                      "share": mine["share"], "panel": right(mine), "said": mine["said"], "said_of": len(rows),
                                      "calibration": float(calibration_error(softmax(mine["logits"], 1.0), truth)), "last": right(plain)}
            for kind in ("logistic", "ridge"):
                for side in SIZES:
                    row[f"{kind} {side}"] = float((probe(kind, raws[side][rows], labels[rows], raws[side][first:]) == truth).mean())
            found.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", help="some of the sets")
    parser.add_argument("--shots", type=int, nargs="*", default=[5, 10, 20, 40], help="training pictures a class")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--most", type=int, default=240, help="test pictures of a set, at most")
    parser.add_argument("--fashion", type=Path, help="folder with Fashion-MNIST's archives")
    parser.add_argument("--photos", type=Path, help="labelled photographs with train/ and test/")
    parser.add_argument("--cifar", type=Path, help="an .npz file with train and test pictures")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    kept = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    for name, make in development(asked.fashion, asked.photos, asked.cifar).items():
        if asked.sets and name not in asked.sets:
            continue
        train, (test, truth) = make()
        few = drawn(truth, max(1, asked.most // len(np.unique(truth))), 0)
        new = measured(name, (train, ([test[k] for k in few], truth[few])), asked.shots, asked.draws)
        kept = [row for row in kept if row["set"] != name] + new
        text = ",\n".join(json.dumps(row) for row in kept)
        asked.out.write_text(f'{{"torch": "{torch.__version__}", "rows": [\n{text}\n]}}\n')
        ways = ("panel", "last", "logistic 224", "logistic 288", "ridge 224", "ridge 288")
        print("  " + ", ".join(f"{way} {np.mean([row[way] for row in new]):.3f}" for way in ways), flush=True)


if __name__ == "__main__":
    main()
