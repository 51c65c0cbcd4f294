"""Too little of everything: memory, disk, processes, file handles. The run goes on, or ends with one sentence."""

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_kernels import python
from making import SMALL, coloured, fault, labelled, untouched

import tl_tutorial as tl
from tl_tutorial import cli
from tl_tutorial.backbones import Network
from tl_tutorial.batches import Batches
from tl_tutorial.pixels import load_pixels
from tl_tutorial.steps import Run, predict_logits

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 255, (16, 16, 16, 3), dtype=np.uint8), np.arange(16) % 2


def full(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    "A device whose memory takes so many images at once; gives the sizes of the batches that fitted."
    real, fitted = Network.forward, []

    def forward(network: Network, images: torch.Tensor) -> torch.Tensor:
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        fitted.append(len(images))
        return real(network, images)

    monkeypatch.setattr(Network, "forward", forward)
    return fitted


def learned(steps: int = 3) -> tuple[dict[str, torch.Tensor], Run]:
    "The weights after some steps with BatchNorm's statistics pinned."
    network = tl.create("small_cnn", 2).eval()
    run = Run(network, Batches(IMAGES, LABELS, 16, 16), tl.Settings(), 1, 1e-3)
    for _ in range(steps):
        run.learn(next(run.train.epoch()))
    return network.state_dict(), run


@fault("I01 device memory too small in training")
def test_the_effective_batch_is_kept(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = learned()
    fitted = full(monkeypatch, 5)
    found, run = learned()
    assert run.parts == 4 and fitted == [4] * 12 and run.sums[2] == 48
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


@fault("I02 device memory too small in validation")
def test_validation_in_parts(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tl.create("small_cnn", 2)
    expected = predict_logits(network, Batches(IMAGES, LABELS, 16, 16))
    fitted = full(monkeypatch, 5)
    assert torch.allclose(predict_logits(network, Batches(IMAGES, LABELS, 16, 16)), expected, atol=1e-6) and fitted == [4] * 4
    full(monkeypatch, 0)
    with pytest.raises(tl.DeviceError, match="even with one image.*smaller size"):
        predict_logits(network, Batches(IMAGES, LABELS, 16, 16))


@fault("I03 device memory too small in the first step")
def test_the_first_step(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    "A memory that takes two images trains all the same; one that takes none is one sentence and exit code 1."
    root = coloured(tmp_path / "colours")
    fitted = full(monkeypatch, 2)
    clf = tl.fine_tune(root, epochs=1, **SMALL)
    assert set(fitted) <= {1, 2} and clf.metrics["steps"] == 3 and np.isfinite(clf.history[-1]["train_loss"])
    full(monkeypatch, 0)
    assert cli.main(["train", str(root), "--out", "m.safetensors", "--arch", "small_cnn"]) == 1
    said = capsys.readouterr().err
    assert "out of memory" in said and "smaller size" in said and "Traceback" not in said and not Path("m.safetensors").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: what a real one does when its memory is short was not seen")
@fault("I01 memory of a real GPU too small")
def test_a_real_gpu(fault: str, tmp_path: Path) -> None:
    root = coloured(tmp_path / "colours", 40)
    torch.cuda.set_per_process_memory_fraction(0.004)
    try:
        clf = tl.fine_tune(root, arch="efficientnet_lite0", size=512, epochs=1, batch_size=96, device="cuda", progress=False, amp=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert np.isfinite(clf.history[-1]["train_loss"]) and clf.metrics["steps"] == 1


@contextlib.contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    "A limit that the kernel keeps."
    old = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, old)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@fault("I04 host memory too small")
def test_host_memory(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    "200 MB more than now: pixels that want more in memory end the run by name, and with cache_mb they go to a file."
    root = labelled(tmp_path / "p", each=4)
    image = str(root / "cat" / "0.png")
    tl.fine_tune(root, epochs=1, **SMALL)
    used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    with untouched(root), limited(resource.RLIMIT_DATA, used + 200 * 2**20):
        with pytest.raises(tl.DeviceError, match="not enough memory; lower cache_mb"):
            tl.fine_tune(root, **{**SMALL, "size": 4096})
        assert cli.main(["train", str(root), "--out", "m.safetensors", "--arch", "small_cnn", "--size", "4096"]) == 1
        assert load_pixels([image] * 1500, 256, budget_mb=0).images.nbytes > 280 * 2**20
    assert "lower cache_mb" in capsys.readouterr().err


@fault("I05 small shared memory")
def test_shared_memory(fault: str, tmp_path: Path) -> None:
    "No process of ours needs it: with 4 kB of it (where one may mount that), training works."
    root = labelled(tmp_path / "p")
    before = sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else []
    inner = f"mount -t tmpfs -o size=4k tmpfs /dev/shm && exec {sys.executable} -m tl_tutorial train {root} --out m.safetensors --arch small_cnn --epochs 1"
    shell = ["unshare", "--mount", "sh", "-c", inner]
    able = shutil.which("unshare") and subprocess.run([*shell[:4], "mount -t tmpfs -o size=4k tmpfs /dev/shm"], capture_output=True).returncode == 0
    if able:
        done = subprocess.run(shell, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0 and tl.load("m.safetensors").classes == ("cat", "dog"), done.stderr
    else:
        tl.fine_tune(root, epochs=1, **SMALL)
    assert (sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else []) == before


def port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@fault("I06 one of two processes is killed")
def test_a_killed_process(fault: str, tmp_path: Path) -> None:
    "The other one ends with one sentence, and the state that it kept can be resumed."
    root = coloured(tmp_path / "colours")
    (tmp_path / "settings.ini").write_text("[model]\nweights = none\n[train]\npatience = 99\n")
    common = [python(), "-m", "tl_tutorial", "train", str(root), "--out", "m.safetensors", "--arch", "small_cnn", "--size", "16", "--device", "cpu",
              "--epochs", "3000", "--checkpoint", "run"]
    place = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "OMP_NUM_THREADS": "1"}
    one, two = (subprocess.Popen(common, env={**place, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
                for rank in "01")
    seen = []
    for line in one.stderr:
        seen.append(line)
        if line.startswith("epoch 2"):
            two.send_signal(signal.SIGKILL)
    two.communicate()
    assert two.returncode == -9 and one.wait(60) == 1, seen
    said = "".join(line for line in seen if "tl-tutorial:" in line)
    assert "cannot reach the others" in said and "--resume" in said and "Traceback" not in "".join(seen)
    assert (tmp_path / "run" / "state.safetensors").exists() and not (tmp_path / "m.safetensors").exists()


@fault("I07 a file that never ends")
def test_a_pipe_in_the_place_of_a_picture(fault: str, tmp_path: Path) -> None:
    "Reading it would wait for ever; it is passed over by name."
    root = labelled(tmp_path / "p")
    os.mkfifo(root / "cat" / "pipe.png")
    found = []
    work = threading.Thread(target=lambda: found.extend([tl.check(root), tl.fine_tune(root, epochs=1, **SMALL)]), daemon=True)
    work.start()
    work.join(60)
    assert not work.is_alive(), "it hangs"
    report, clf = found
    assert [p.kind for p in report.problems] == ["no file"] and report.counts == {"cat": 3, "dog": 3} and report.ok
    with pytest.raises(tl.DataError, match=r"pipe\.png"):
        clf.predict(root / "cat" / "pipe.png")


@fault("I08 few file handles")
def test_few_file_handles(fault: str, tmp_path: Path) -> None:
    "Every file is closed as soon as it was read."
    root = labelled(tmp_path / "p", each=40)
    tl.fine_tune(root, epochs=1, **SMALL)
    handles = lambda: len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    before = handles()
    with untouched(root), limited(resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd"))) + 12 if before else 256):
        assert tl.check(root).ok
        clf = tl.fine_tune(root, epochs=1, checkpoint=tmp_path / "run", **SMALL)
        assert len(clf.predict(root)) == 80 and tl.load(clf.save(tmp_path / "m.safetensors"))
    assert handles() == before
