"""The recipes in configs/translation: fairseq takes every flag, and PS-KD's are the baseline's."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

from fairseq import options  # noqa: E402
from fairseq_toys import PLUGIN, ROOT, SIZES  # noqa: E402

from pskd_tools.report.epochs import fairseq_epochs  # noqa: E402

RECIPES = ROOT / "configs" / "translation"
BASELINES = sorted(
    path.name for path in RECIPES.glob("*.sh")
    if not path.stem.endswith("_pskd") and path.name != "iwslt_text.sh"
)  # fmt: skip
TRAINED = [recipe for recipe in BASELINES if recipe != "demo.sh"]


def flags_of(recipe: str, folder: Path, *more: str) -> list[str]:
    """Return what a recipe gives to fairseq-train, which is not run."""
    tool = folder / "fairseq-train"
    tool.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    tool.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    line = [str(RECIPES / recipe), "DATA", "SAVE_DIR", *more]
    done = subprocess.run(
        line,
        env=os.environ | {"PATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def parsed(flags: list[str]) -> dict:
    return vars(options.parse_args_and_arch(options.get_training_parser(), input_args=flags))


@pytest.mark.parametrize("recipe", BASELINES)
def test_the_recipe_with_pskd_is_a_small_change_of_its_baseline(recipe, tmp_path):
    baseline = parsed(flags_of(recipe, tmp_path, "--label-smoothing", "0.2"))
    assert baseline["criterion"] == "label_smoothed_cross_entropy"
    assert baseline["label_smoothing"] == 0.2, "the last flag wins"
    changed = parsed(flags_of(recipe.replace(".sh", "_pskd.sh"), tmp_path, "--pskd-top-k", "5"))
    assert changed["criterion"] == "pskd" and changed["pskd_top_k"] == 5
    differing = {
        key for key in changed if not key.startswith("pskd") and baseline.get(key) != changed[key]
    }
    assert differing == {"criterion", "user_dir", "label_smoothing"}


@pytest.mark.parametrize("recipe", TRAINED)
def test_the_log_is_kept_beside_the_checkpoints(recipe, tmp_path):
    tool = tmp_path / "fairseq-train"
    tool.write_text("#!/bin/sh\necho said; echo warned >&2; exit 3\n")
    tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    line = [str(RECIPES / recipe.replace(".sh", "_pskd.sh")), "DATA", "runs/new"]
    for _ in "stopped", "resumed":
        done = subprocess.run(
            line, env=os.environ | {"PATH": path}, cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (3, "said\nwarned\n", "")
    assert (tmp_path / "runs" / "new" / "train.log").read_text() == "said\nwarned\n" * 2


@pytest.fixture(scope="module")
def joined(fairseq) -> Path:
    """The toy corpus with one dictionary for both languages, as the recipes share embeddings."""
    text = fairseq.folder
    parts = {f"--{part}pref": str(text / part) for part in ("train", "valid", "test")}
    fairseq.forked(
        "preprocess", "-s", "de", "-t", "en", *(word for pair in parts.items() for word in pair),
        "--destdir", str(text / "joined"), "--joined-dictionary", "--workers", "1", name="joined",
    ).expect_success()  # fmt: skip
    return text / "joined"


@pytest.fixture(scope="module")
def trained(fairseq, joined) -> dict[str, Future]:
    """Each recipe and the change by PS-KD, with the sizes of a toy; the demo runs its own."""
    few = "--max-tokens 200 --max-epoch 2 --num-workers 0 --cpu --log-format json".split()

    def train(recipe: str):
        name = recipe.replace(".sh", "_pskd")
        folder = fairseq.folder / f"flags_of_{name}"
        folder.mkdir()
        flags = flags_of(f"{name}.sh", folder, *SIZES, *few)
        assert flags[:3] == ["DATA", "--save-dir", "SAVE_DIR"]
        flags[:3] = [str(joined), "--save-dir", str(fairseq.folder / name)]
        return fairseq.forked("train", *flags, name=name)

    return {recipe: fairseq.submit(train, recipe) for recipe in TRAINED}


@pytest.mark.parametrize("recipe", TRAINED)
def test_a_recipe_trains(recipe, trained):
    run = trained[recipe].result().expect_success()
    assert run.column("alpha") == [0.0, 0.7]
    assert len(run.column("nll_loss", "valid")) == 2
    assert (run.save_dir / "checkpoint_best.pt").exists()


def test_the_recipe_for_hydra_trains(fairseq):
    """With the sizes of a toy."""
    side = {"embed_dim": 32, "ffn_embed_dim": 64, "layers": 1, "attention_heads": 2}
    small = [f"model.{part}.{key}={size}" for part in ("encoder", "decoder")
             for key, size in side.items()]  # fmt: skip
    run = fairseq.forked(
        "hydra_train", "--config-dir", str(RECIPES / "hydra"), "--config-name", "iwslt_pskd",
        f"common.user_dir={PLUGIN}", f"task.data={fairseq.data}",
        f"checkpoint.save_dir={fairseq.folder / 'recipe'}",
        f"hydra.run.dir={fairseq.folder / 'recipe_output'}", *small,
        "model.share_all_embeddings=false", "common.cpu=true", "common.log_format=json",
        "dataset.max_tokens=100", "dataset.num_workers=0", "optimization.max_epoch=2",
        name="recipe",
    ).expect_success()  # fmt: skip
    assert run.column("alpha") == [0.0, 0.7]
    assert run.column("teacher_coverage") == [1.0]
    assert (run.save_dir / "pskd_memory" / "shard_0" / "epoch_00001.pskd").exists()


def test_the_text_of_a_ted_release(tmp_path):
    for language in ("en", "de"):
        (tmp_path / f"train.tags.en-de.{language}").write_text(
            f"<url>http://x</url>\n<title>T</title>\n  one {language} \n"
            "<keywords>a</keywords>\n\n2 < 3\n<3 you\n<translator href='x'>t</translator>\n"
        )
        for part in ("dev2010", "tst2010", "tst2012"):
            (tmp_path / f"IWSLT15.TED.{part}.en-de.{language}.xml").write_text(
                f'<doc docid="1">\n<talkid>1</talkid>\n<seg id="1"> {part} {language} 1 </seg>\n'
                f'  <seg id="2">{part} &amp; 2</seg>\n<seg id="3"> </seg>\n'
                '<seg id="4"> x </seg>\n</doc>\n'
            )
    recipe = [str(RECIPES / "iwslt_text.sh"), str(tmp_path), "en", "de", str(tmp_path / "out")]
    subprocess.run(recipe, check=True)
    text = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert sorted(text) == ["test.de", "test.en", "train.de", "train.en", "valid.de", "valid.en"]
    assert text["train.en"] == "one en\n\n2 < 3\n<3 you\n"
    assert text["valid.de"] == "dev2010 de 1\ndev2010 &amp; 2\n\nx\n"
    assert text["test.en"] == "".join(
        f"{part} en 1\n{part} &amp; 2\n\nx\n" for part in ("tst2010", "tst2012")
    )
    (tmp_path / "IWSLT15.TED.dev2010.en-de.de.xml").unlink()
    done = subprocess.run(recipe, capture_output=True, text=True)
    assert done.returncode != 0 and "TED.dev2010.en-de.de.xml" in done.stderr


def test_a_log_becomes_a_plot_of_its_epochs(fairseq):
    """Of fairseq's other format that is no progress bar."""
    run = fairseq.train("plotted", "--max-epoch", "2", "--log-format", "simple").expect_success()
    records = fairseq_epochs(run.output)
    assert [record["alpha"] for record in records] == pytest.approx([0.0, 0.7], abs=1e-4)
    assert ["gradient_rescaling_hard" in record for record in records] == [False, True]
    log, picture = fairseq.folder / "plotted.log", fairseq.folder / "epochs.png"
    log.write_text(run.output)
    line = [sys.executable, str(ROOT / "translation" / "plot_epochs.py"), str(log), "--out"]
    subprocess.run([*line, str(picture)], check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
