"""train_net.py on heads and precisions of all kinds, its console, and LazyConfigs."""

from __future__ import annotations

import re

import detectron2_tiny as tiny
import pytest
from detectron2.engine import DefaultTrainer
from pskd_detectron2 import PSKDHook

TEACHERS = ("snapshot", "memory")


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_sigmoid_head_trains(teacher, spec, tmp_path):
    opts = f"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True MODEL.PSKD.TEACHER {teacher}"
    epoch = "MODEL.PSKD.EPOCH_ITERS 4 SOLVER.MAX_ITER 5"  # of all eight images
    out = tiny.run("fpn", tmp_path, opts, epoch, train=spec)
    assert tiny.metrics(out)[-1]["pskd/teacher_nll"] > 0


def test_the_console_shows_the_teacher(spec, tmp_path):
    out = tiny.run("cascade", tmp_path, "SOLVER.MAX_ITER 20 SOLVER.IMS_PER_BATCH 1", train=spec)
    log = (out / "log.txt").read_text()
    line = next(line for line in log.splitlines() if "pskd/alpha: " in line)
    for name in ("teacher_nll", "teacher_agreement", "gradient_rescaling"):
        assert f"stage2/pskd/{name}: " in line


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_lazy_config_trains_and_resumes(teacher, spec, tmp_path):
    out = tmp_path / "run"
    words = [
        # Two of them are the eight images: the second epoch meets again what the first one saw.
        "dataloader.train.total_batch_size=4",
        "train.max_iter=4",
        "train.checkpointer.period=3",
        "train.pskd.epoch_iters=2",
        f"train.pskd.teacher={teacher}",
    ]
    line = tiny.lazy_arguments(out, *words, train=spec, test=spec)
    tiny.main(line)
    log = (out / "log.txt").read_text()
    assert log.rstrip().endswith(f"results: {out / 'results.json'}")
    assert "PS-KD: epoch 2 of 2, alpha 0.7000" in log
    # The last line holds the evaluation.
    assert any(line.get("pskd/teacher_nll", 0) > 0 for line in tiny.metrics(out))
    results = tiny.results(out)
    assert {"bbox", "confidence", "seconds_per_iteration"} <= results.keys()
    assert results["ground_truth_rois"]["num_rois"] == 14
    (out / "last_checkpoint").write_text("model_0000002.pth")  # inside the second epoch
    tiny.main(["--resume", *line])
    assert "Starting training from iteration 3" in (out / "log.txt").read_text()
    results = tiny.results(out)
    weights = f"train.init_checkpoint={out / 'model_final.pth'}"
    line.remove("--train")
    line.remove(spec)  # the first; an evaluation does not ask about the training set
    tiny.main(["--eval-only", *line, weights])
    evaluated = tiny.results(out, "evaluation")
    assert evaluated["ground_truth_rois"] == results["ground_truth_rois"]
    assert evaluated["bbox"] == results["bbox"]


def test_a_trainer_of_your_own_takes_the_hook(spec, tmp_path):
    """The example of detection/README.md, as it stands there but for the epoch's length."""
    page = (tiny.ROOT / "detection" / "README.md").read_text(encoding="utf-8")
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "MyTrainer" in c]
    names = {"DefaultTrainer": DefaultTrainer, "PSKDHook": PSKDHook}
    exec(compile(code.replace("1000", "2"), "detection/README.md", "exec"), names)
    trainer = names["MyTrainer"](tiny.config("fpn", tmp_path, "SOLVER.MAX_ITER 4", train=spec))
    trainer.train()
    alphas = [line["pskd/alpha"] for line in tiny.metrics(tmp_path)]
    assert alphas[-1] == pytest.approx(0.7)
    assert tiny.metrics(tmp_path)[-1]["pskd/teacher_nll"] > 0
