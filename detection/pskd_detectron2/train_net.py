"""Train or evaluate a Detectron2 model with PS-KD.

    python detection/train_net.py --num-gpus 8 \\
        --config-file configs/detection/faster_rcnn_R_50_FPN_1x_pskd.yaml MODEL.PSKD.ALPHA_FINAL 0.5
    python detection/train_net.py --config-file configs/detection/bccd_pskd.yaml \\
        --train voc:BCCD:train --test voc:BCCD:test OUTPUT_DIR runs/bccd

Outside a checkout it is ``python -m pskd_detectron2.train_net``. The options are those of
Detectron2's own train_net.py. --config-file also takes the configs that come with Detectron2, as
detectron2:COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml; a ``.py`` is a LazyConfig. --train and
--test give any data set without code.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from pskd_detection import add_dataset_arguments

from pskd_detectron2 import Trainer, load_config, register_spec
from pskd_detectron2.config import recipe_path, set_class_count
from pskd_detectron2.data import check_image_files, class_names_of
from pskd_detectron2.files import save_results
from pskd_detectron2.lazy import run_lazy
from pskd_detectron2.resume import EvaluationCheckpointer
from pskd_detectron2.trainer import check_config
from pskd_tools.program import exit_status

PROGRAM = "train_net"
logger = logging.getLogger("detectron2.pskd_detectron2.train_net")


def setup(args) -> CfgNode:
    """Return the config; with --train and --test its datasets and class count are set from them.

    Raises:
        ValueError: as `load_config`, `register_spec`, `check_config` and `check_image_files`.
    """
    cfg = load_config(args.config_file, args.opts)
    class_names: Sequence[str] | None = None
    if args.train:
        dataset = register_spec(args.train, cfg.OUTPUT_DIR, strict=args.strict_data)
        class_names = dataset.class_names
        cfg.DATASETS.TRAIN = (args.train,)
        set_class_count(cfg, len(class_names))
    elif args.test and not args.eval_only:
        class_names = class_names_of(cfg.DATASETS.TRAIN)
    if args.test:
        dataset = register_spec(args.test, cfg.OUTPUT_DIR, class_names, strict=args.strict_data)
        cfg.DATASETS.TEST = (args.test,)
        if args.eval_only and class_names is None:  # the training set is not asked
            set_class_count(cfg, len(dataset.class_names))
    cfg.freeze()
    check_config(cfg, training=not args.eval_only)
    default_setup(cfg, args)
    if args.check_images:
        names = (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)
        check_image_files(names, cfg.DATALOADER.NUM_WORKERS)
    return cfg


def evaluate(cfg: CfgNode, resume: bool) -> dict:
    """Evaluate MODEL.WEIGHTS, or with --resume the last checkpoint.

    Raises:
        ValueError: if there is neither, since random weights were evaluated.
    """
    model = Trainer.build_model(cfg)
    checkpointer = EvaluationCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise ValueError(
            "--eval-only: expected MODEL.WEIGHTS, or --resume and a checkpoint in "
            f"{cfg.OUTPUT_DIR}, got neither"
        )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)  # TEST.EXPECTED_RESULTS
    return results


def main(args) -> None:
    args.config_file = recipe_path(args.config_file)
    if args.config_file.endswith(".py"):
        run_lazy(args)
        return
    cfg = setup(args)
    results: dict = {"command": sys.argv, "seed": cfg.SEED}
    if args.eval_only:
        results |= evaluate(cfg, args.resume)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()  # its last hook evaluates
        results |= trainer.results()
    if comm.is_main_process():
        save_results(cfg.OUTPUT_DIR, results, evaluation=args.eval_only)


def parse(argv: Sequence[str] | None = None):
    parser = default_argument_parser(epilog=__doc__)
    add_dataset_arguments(parser, required=False)
    parser.add_argument(
        "--check-images", action="store_true", help="read every image once before the first step"
    )
    args = parser.parse_args(argv)
    # All that follows the first KEY is taken for keys and values.
    flags = [word for word in args.opts if word.startswith("--")]
    if flags:
        parser.error(f"expected flags before KEY VALUE, got {flags[0]} after {args.opts[0]}")
    return args


def run(argv: Sequence[str] | None = None) -> int:
    """Train or evaluate as the command line says, in as many processes as it names.

    Returns:
        The exit status. Of one process, what the user can mend is told in one line; an error in
        one of several comes with its traceback.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    args = parse(argv)
    options = ("num_machines", "machine_rank", "dist_url")
    chosen = {name: getattr(args, name) for name in options}
    return exit_status(PROGRAM, lambda: launch(main, args.num_gpus, **chosen, args=(args,)))


if __name__ == "__main__":
    sys.exit(run())
