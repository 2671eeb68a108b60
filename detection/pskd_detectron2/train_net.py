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

import os
import sys
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from pskd_detection import add_dataset_arguments

from pskd_detectron2.config import load_config, recipe_path
from pskd_detectron2.data import check_image_files
from pskd_detectron2.files import save_results
from pskd_detectron2.lazy import run_lazy
from pskd_detectron2.registered import register_specs
from pskd_detectron2.resume import EvaluationCheckpointer
from pskd_detectron2.trainer import Trainer, check_config
from pskd_tools.program import exit_status

PROGRAM = "train_net"


def setup(args) -> CfgNode:
    """Return the config; with --train and --test its datasets and class count are set from them."""
    cfg = load_config(args.config_file, args.opts)
    num_classes = register_specs(args, cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN)
    if args.train:
        cfg.DATASETS.TRAIN = (args.train,)
    if args.test:
        cfg.DATASETS.TEST = (args.test,)
    if num_classes is not None:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def evaluate(cfg: CfgNode, args) -> dict:
    """Evaluate MODEL.WEIGHTS, or with --resume the last checkpoint."""
    check_config(cfg, training=False)
    model = Trainer.build_model(cfg)
    checkpointer = EvaluationCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    if not cfg.MODEL.WEIGHTS and not (args.resume and checkpointer.has_checkpoint()):
        raise ValueError(
            "--eval-only: expected MODEL.WEIGHTS, or --resume and a checkpoint in "
            f"{cfg.OUTPUT_DIR}, got neither"
        )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    check_images(cfg, args, cfg.DATASETS.TEST)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)  # TEST.EXPECTED_RESULTS
    return results


def run_yaml(args) -> tuple[dict, str, int]:
    """As `run_lazy`."""
    cfg = setup(args)
    if args.eval_only:
        results = evaluate(cfg, args)
    else:
        trainer = Trainer(cfg)
        check_images(cfg, args, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        trainer.resume_or_load(resume=args.resume)
        trainer.train()  # its last hook evaluates
        results = trainer.results()
    return results, cfg.OUTPUT_DIR, cfg.SEED


def check_images(cfg: CfgNode, args, names: Sequence[str]) -> None:
    if args.check_images:
        check_image_files(names, cfg.DATALOADER.NUM_WORKERS)


def main(args) -> None:
    args.config_file = recipe_path(args.config_file)
    run_config = run_lazy if args.config_file.endswith(".py") else run_yaml
    results, output_dir, seed = run_config(args)
    if comm.is_main_process():
        results = {"command": sys.argv, "seed": seed} | results
        save_results(output_dir, results, evaluation=args.eval_only)


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
