"""Which test runs a documented program at a small size, and which none runs."""

from __future__ import annotations

#: The tests that run the documented programs at a small size: file, test, programs.
RUN: dict[str, dict[str, list[str]]] = {
    "classification/test_benchmark.py": {
        "test_tells_all_figures_and_ends_with_the_limit": ["benchmarks/classification_step.py"],
    },
    "classification/test_benchmark_throughput.py": {
        "test_tells_images_a_second_and_ends_with_the_limit": [
            "benchmarks/classification_throughput.py"
        ],
    },
    "classification/test_compare.py": {
        "test_a_table_of_each_epoch": ["classification/compare.py"],
    },
    "classification/test_page.py": {
        "test_the_plot_of_the_page_is_drawn": ["python -c"],
    },
    "classification/test_training.py": {
        "test_two_processes_share_the_memory_and_go_on_as_one": [
            "classification/train.py",
            "torchrun classification/train.py",
        ],
    },
    "core/test_benchmark_linear.py": {
        "test_the_benchmark_tells_all_figures": ["benchmarks/linear_loss.py"],
    },
    "core/test_benchmark_loss.py": {
        "test_tells_all_figures": ["benchmarks/loss.py"],
    },
    "core/test_benchmark_memory.py": {
        "test_the_benchmark_tells_all_figures": ["benchmarks/prediction_memory.py"],
    },
    "core/test_doctor.py": {
        "test_real_run_tries_the_core_and_imports_no_framework": ["pskd doctor"],
    },
    "core/test_report.py": {
        "test_command_line": ["pskd report"],
    },
    "core/test_wheel.py": {
        "test_train_net_is_there_without_a_checkout": ["python -m pskd_detectron2.train_net"],
        "test_train_programs_are_there_without_a_checkout": [
            "python -m pskd_classification.compare"
        ],
    },
    "detection/test_benchmark_detection.py": {
        "test_the_benchmark_tells_all_figures": ["benchmarks/detection_step.py"],
    },
    "detection/test_convert_backbone.py": {
        "test_the_script_runs": ["detection/convert_backbone.py"],
    },
    "detection/test_demo_detection.py": {
        "test_the_table_is_that_of_the_results": [
            "configs/detection/demo_torchvision.sh",
            "configs/detection/demo_torchvision_pskd.sh",
            "detection/train_net.py",
            "python -m demo.detection",
        ],
    },
    "detection/test_digits.py": {
        "test_command_line": ["python -m demo.digits"],
    },
    "classification/test_demo_classification.py": {
        "test_the_table_is_that_of_the_results": ["python -m demo.classification"],
    },
    "detection/test_noise.py": {
        "test_command_line_for_lines": ["python -m demo.noise"],
    },
    "detection/test_torchvision_training.py": {
        "test_results_tell_the_command_and_every_metric": ["detection/train_torchvision.py"],
        "test_two_processes_end_with_the_same_model_and_teacher": [
            "torchrun detection/train_torchvision.py"
        ],
    },
    "translation/test_benchmark_translation.py": {
        "test_the_benchmark_tells_all_figures": ["benchmarks/translation_step.py"],
    },
    "translation/test_demo.py": {
        "test_demo_prints_the_table_of_both_and_writes_results_and_plots": [
            "configs/translation/demo.sh",
            "configs/translation/demo_pskd.sh",
            "python -m demo.translation",
        ],
        "test_evaluation_scores_every_sentence_against_the_raw_reference": [
            "translation/evaluate.py"
        ],
    },
    "translation/test_demo_steps.py": {
        "test_the_whole_demo_tells_of_both_halves": [
            "make demo",
            "python -m demo",
        ],
    },
    "translation/test_locale_pairs.py": {
        "test_same_seed_same_bytes_in_another_process": ["python -m demo.locale_pairs"],
    },
    "translation/test_plugin_evaluation.py": {
        "test_generate_and_interactive_read_a_checkpoint_and_agree": ["fairseq-generate"],
    },
    "translation/test_prepare.py": {
        "test_folder_holds_what_fairseq_and_scoring_need": ["translation/prepare.py"],
    },
    "translation/test_recipes.py": {
        "test_a_log_becomes_a_plot_of_its_epochs": ["translation/plot_epochs.py"],
        "test_a_recipe_trains": [
            "configs/translation/iwslt.sh",
            "configs/translation/iwslt_pskd.sh",
            "configs/translation/multi30k_8k_de_en.sh",
            "configs/translation/multi30k_8k_de_en_pskd.sh",
            "configs/translation/multi30k_de_en.sh",
            "configs/translation/multi30k_de_en_pskd.sh",
            "configs/translation/wmt14.sh",
            "configs/translation/wmt14_pskd.sh",
            "fairseq-preprocess",
            "fairseq-train",
        ],
        "test_the_recipe_for_hydra_trains": ["fairseq-hydra-train"],
        "test_the_text_of_a_ted_release": ["configs/translation/iwslt_text.sh"],
    },
}
#: The documented programs that no test runs, and why.
NOT_RUN = {
    "make coverage": "runs this",
    "make lint": "reads code and runs none",
    "make setup": "installs what this needs",
    "make test": "runs this",
    "pip install": "needs a network",
    "sacrebleu": "needs a network",
}
