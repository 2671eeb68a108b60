"""Bad input to detection/train_net.py: config keys, LazyConfigs, data, the memory's file."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from bad_input import ROOT, Part, check, every_case, toys

#: What Detectron2 and the registration of a data set leave before the first iteration.
LOGS = ("run/log.txt", "run/config.yaml", "run/datasets/*")
KEYS = Part(
    "Detectron2: config keys",
    "`detection/train_net.py --config-file ... KEY VALUE ...`; nothing is trained.",
    ("detectron2",),
)
LAZY = Part(
    "Detectron2: LazyConfig",
    "`configs/detection/mask_rcnn_R_50_FPN_1x_pskd.py` with overrides of `train.pskd`.",
    ("detectron2",),
)
RESUMED = Part(
    "Detectron2: resume and the memory's file",
    "Of a run with `MODEL.PSKD.TEACHER memory`, resumed in the second of two epochs. The memory "
    "stays as it was.",
    ("detectron2",),
)
PARTS = [KEYS, LAZY, RESUMED]


def tiny():
    return toys("detection", "detectron2_tiny")


def train(line: str = "", *flags: str, kind: str = "fpn", train: str | None = "", **specs) -> int:
    """Train a tiny model on the images of the folder, and return the program's exit status."""
    spec = "coco:set.json:set" if train == "" else train
    words = tiny().arguments(kind, Path.cwd() / "run", line, train=spec, **specs)
    return tiny().train_net.run([*flags, *words])


@functools.cache
def _images() -> Path:
    folder = Path(tempfile.mkdtemp())
    tiny().make_images(folder)
    return folder


def write_images() -> None:
    shutil.copytree(_images(), ".", dirs_exist_ok=True)


def keyed(tried: str, line: str, says: str, **specs) -> None:
    """Add a case of keys under which train_net.py cannot train."""

    def run():
        write_images()
        yield None
        return train(line, **specs)

    KEYS.add(tried, run, f"train_net: {says}", ends=1, leaves=LOGS)


for _line, _says in (
    ("ALPHA_FINAL 1.5", "MODEL.PSKD.ALPHA_FINAL: expected a number in [0, 1], got 1.5"),
    (
        "ALPHA_SCHEDULE step",
        "MODEL.PSKD.ALPHA_SCHEDULE: expected one of linear, constant, cosine, got 'step'",
    ),
    ("TEACHER mine", "MODEL.PSKD.TEACHER: expected one of memory, snapshot..., got 'mine'"),
    ("EPOCH_ITERS -1", "MODEL.PSKD.EPOCH_ITERS: expected 0 or more, got -1"),
    ("LABEL_SMOOTHING 2.0", "MODEL.PSKD.LABEL_SMOOTHING: expected a number in [0, 1], got 2.0"),
    (
        "ALPHA_FINAL high",
        "Type mismatch (...float... vs. ...str...) with values (0.7 vs. high) for config key: "
        "MODEL.PSKD.ALPHA_FINAL",
    ),
):
    keyed(f"`MODEL.PSKD.{_line}`", f"MODEL.PSKD.{_line}", _says)
keyed(
    "`MODEL.PSKD.ALPHA 0.5`, which is no key",
    "MODEL.PSKD.ALPHA 0.5",
    "Non-existent key: MODEL.PSKD.ALPHA",
)
keyed(
    "a key without a value",
    "MODEL.PSKD.ALPHA_FINAL",
    "Override list has odd length: ...",
)
keyed(
    "Detectron2's own head",
    "MODEL.ROI_HEADS.NAME StandardROIHeads",
    "MODEL.ROI_HEADS.NAME: with PS-KD expected PSKDROIHeads, got StandardROIHeads",
)
keyed(
    "no iterations",
    "SOLVER.MAX_ITER 0",
    "SOLVER.MAX_ITER: expected 1 or more, got 0",
)
keyed(
    "a config file that is not there",
    "",
    "--config-file: expected a YAML or LazyConfig file, got '...none.yaml'",
    kind="none.yaml",
)
keyed(
    "a data set that nobody registered",
    "DATASETS.TRAIN ('nowhere',)",
    "dataset 'nowhere': expected a registered one, or --train/--test with a coco:... or voc:... "
    "spec",
    train=None,
)
keyed(
    "a sampler whose epochs have no size",
    "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler DATALOADER.REPEAT_THRESHOLD 0.1",
    "MODEL.PSKD.EPOCH_ITERS: expected a number of iterations with DATALOADER.SAMPLER_TRAIN "
    "RepeatFactorTrainingSampler, whose epochs have no size of their own, got 0",
)


@KEYS.case(
    "an unknown key in a YAML file",
    "train_net: Non-existent config key: MODEL.PSKD.ALPHA",
    ends=1,
)
def _key_in_yaml():
    Path("mine.yaml").write_text("MODEL:\n  PSKD:\n    ALPHA: 0.5\n")
    yield None
    return tiny().train_net.run(["--config-file", "mine.yaml"])


@KEYS.case(
    "`--train set.json`",
    "error: argument --train: expected coco:ANNOTATIONS.json:IMAGE_DIR or voc:ROOT[:SPLIT], got "
    "'set.json'",
    ends=2,
)
def _no_spec():
    return train(train="set.json")


@KEYS.case(
    "`MODEL.PSKD.ALPHA_FINAL 0.5 --train coco:set.json:set`",
    "error: expected flags before KEY VALUE, got --train after MODEL.PSKD.ALPHA_FINAL",
    ends=2,
)
def _flag_after_keys():
    words = ["--config-file", "none.yaml", "MODEL.PSKD.ALPHA_FINAL", "0.5"]
    return tiny().train_net.run([*words, "--train", "coco:set.json:set"])


@KEYS.case(
    "`--eval-only` without weights",
    "train_net: --eval-only: expected MODEL.WEIGHTS, or --resume and a checkpoint in ...run, got "
    "neither",
    ends=1,
    leaves=LOGS,
)
def _nothing_to_evaluate():
    write_images()
    yield None
    return train("", "--eval-only", test="coco:set.json:set")


@KEYS.case(
    "a test set of another class",
    "train_net: other.json: expected the classes of the training set (square, ring), got also "
    "circle",
    ends=1,
    leaves=LOGS,
)
def _other_classes():
    write_images()
    content = json.loads(Path("set.json").read_text())
    content["categories"][0]["name"] = "circle"
    Path("other.json").write_text(json.dumps(content))
    yield None
    return train(test="coco:other.json:set")


# ---- LazyConfig ----------------------------------------------------------------------------------


@LAZY.case(
    "a file that is not there",
    "train_net: [Errno 2] No such file or directory: 'none.py'",
    ends=1,
)
def _no_lazy_file():
    return tiny().train_net.run(["--config-file", "none.py"])


@LAZY.case(
    "an override without a value",
    "train_net: expected overrides as path.key=value: Error parsing override 'train.max_iter'",
    ends=1,
)
def _no_value():
    path = ROOT / "configs" / "detection" / "mask_rcnn_R_50_FPN_1x_pskd.py"
    return tiny().train_net.run(["--config-file", str(path), "train.max_iter"])


def lazy(tried: str, says: str, *overrides: str) -> None:
    """Add a case of overrides that are refused when the hook, or what it needs, is built."""

    def run():
        from detectron2.config import LazyConfig
        from pskd_detectron2 import lazy

        path = ROOT / "configs" / "detection" / "mask_rcnn_R_50_FPN_1x_pskd.py"
        cfg = LazyConfig.apply_overrides(LazyConfig.load(str(path)), list(overrides))
        cfg.train.output_dir = str(Path.cwd() / "run")
        yield None
        lazy.pskd_hook(cfg, None, [])

    LAZY.add(tried, run, says, leaves=LOGS)


lazy(
    "an unknown option",
    "train.pskd: expected options of PSKDHook: ...unexpected keyword argument 'alpha'",
    "train.pskd.alpha=0.5",
)
lazy(
    "alpha_final 1.5",
    "MODEL.PSKD.ALPHA_FINAL: expected a number in [0, 1], got 1.5",
    "train.pskd.alpha_final=1.5",
)


@LAZY.case(
    "label smoothing of a sigmoid head",
    "pskd_label_smoothing: expected 0 with a sigmoid head (USE_SIGMOID_CE), got 0.1",
)
def _smoothed_sigmoid():
    built_heads("pskd_label_smoothing=0.1", "box_predictor.use_sigmoid_ce=True")


@LAZY.case(
    "`model.roi_heads.pskd_label_smoothing=1.5`",
    "pskd_label_smoothing: expected a number in [0, 1], got 1.5",
)
def _too_smooth():
    built_heads("pskd_label_smoothing=1.5")


def built_heads(*overrides: str) -> None:
    from detectron2.config import LazyConfig, instantiate

    path = ROOT / "configs" / "detection" / "mask_rcnn_R_50_FPN_1x_pskd.py"
    options = [f"model.roi_heads.{override}" for override in overrides]
    instantiate(LazyConfig.apply_overrides(LazyConfig.load(str(path)), options).model.roi_heads)


# ---- resume --------------------------------------------------------------------------------------

ANNOTATIONS, CLASSES = 5, 2


def hook_of(iteration: int = 0, max_iter: int = 4, **options):
    """Return a hook and its memory, on heads that hold what it asks of them."""
    from pskd_detectron2 import PSKDHook
    from pskd_detectron2.state import PSKDState

    heads = torch.nn.Linear(1, 1)
    heads.num_classes, heads.pskd = CLASSES, PSKDState(True)
    heads.box_predictor = torch.nn.Identity()
    heads.box_predictor.pskd = heads.pskd
    model = torch.nn.Module()
    model.backbone, model.roi_heads = torch.nn.Linear(1, 1), heads
    given = {"epoch_iters": 2, "teacher": "memory", "num_annotations": ANNOTATIONS}
    hook = PSKDHook(model, **(given | {"output_dir": "run", "fingerprint": "mine"} | options))
    hook.trainer = SimpleNamespace(iter=iteration, start_iter=iteration, max_iter=max_iter)
    return hook, heads.pskd.memory


def resumed(tried: str, says: str, spoil=lambda memory: None, **options) -> None:
    """Add a case of a run that cannot be gone on with."""

    def run():
        hook, memory = hook_of()
        hook.before_train()
        hook.trainer.iter = 2
        memory.write(torch.arange(5), torch.full((5, 3), 1 / 3), torch.ones(5, dtype=torch.bool))
        memory.next_epoch()
        state = hook.state_dict()
        spoil(state["memory"])
        hook, memory = hook_of(iteration=3, **options)
        yield None if memory is None else memory.state_dict
        hook.load_state_dict(state)

    RESUMED.add(tried, run, says)


def other_format(memory: dict) -> None:
    memory.clear()
    memory["model"] = {}


resumed(
    "a flipped bit",
    "damaged: expected CRC-32 0x..., got 0x...",
    lambda memory: memory["probs"].view(torch.int32)[0, 0].bitwise_xor_(4),
)
resumed(
    "no memory",
    "expected a memory with ['counts', 'crc32', 'fingerprint', 'probs', 'seen', 'sums'], got "
    "['model']",
    other_format,
)
resumed(
    "a memory of other annotations",
    "probs: expected torch.float32 of shape (5, 3) (annotations x stages, classes), got ((4, 3), "
    "torch.float32)",
    lambda memory: memory.update(probs=memory["probs"][1:]),
)
resumed(
    "a memory of another training set",
    "expected the annotations mine, got other: another training set",
    lambda memory: memory.update(fingerprint="other"),
)
resumed(
    "another alpha",
    "alpha_final: expected 0.7, with which the checkpoint was trained, got 0.1 "
    "(MODEL.PSKD.ALLOW_SCHEDULE_CHANGE True allows it)",
    alpha_final=0.1,
)
resumed(
    "another teacher",
    "teacher: expected 'memory', with which the checkpoint was trained, got 'snapshot'",
    teacher="snapshot",
)


@RESUMED.case(
    "another length",
    "num_epochs: expected 2, with which the checkpoint was trained, got 5 "
    "(MODEL.PSKD.ALLOW_SCHEDULE_CHANGE True allows it)",
)
def _another_length():
    hook, _ = hook_of()
    hook.before_train()
    options = hook.state_dict()["options"]
    hook, _ = hook_of(max_iter=9, teacher="snapshot")
    hook.load_state_dict({"options": options | {"teacher": "snapshot"}})
    yield None
    hook.before_train()


@RESUMED.case(
    "a stock checkpoint, in the second epoch",
    "iteration 3 is in epoch 2: expected a checkpoint with the memory of its last epoch, got one "
    "without",
)
def _stock_checkpoint():
    hook, _ = hook_of(iteration=3)
    hook.before_train()


@every_case(*PARTS)
def test_what_the_user_sees(case, tmp_path):
    check(case, tmp_path)
