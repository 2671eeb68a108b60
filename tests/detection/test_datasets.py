"""Data sets from specs: what is read, what is mended, and what is refused with which words."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
from pathlib import Path

import pytest
from PIL import Image
from pskd_detection import add_dataset_arguments, load_dataset
from pskd_detection.boxes import SLACK

WIDTH, HEIGHT = 40, 30


def made(folder: Path, content: dict, images=("a.png", "b.png")) -> str:
    """Write images and annotations; return the spec."""
    (folder / "images").mkdir(exist_ok=True)
    for name in images:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / name)
    (folder / "set.json").write_text(json.dumps(content))
    return f"coco:{folder / 'set.json'}:{folder / 'images'}"


@pytest.fixture
def content() -> dict:
    """Two images and two classes whose ids are neither in order nor without gaps."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 3, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 90, "bbox": [1, 2, 10, 5]},
            {"id": 5, "image_id": 7, "category_id": 2, "bbox": [0, 0, WIDTH, HEIGHT], "area": 9},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 2, "name": "cat"}],
    }


def test_what_evaluation_needs_is_filled_in_and_the_rest_is_kept(tmp_path, content):
    content["annotations"][0]["segmentation"] = [[1, 2, 11, 2, 11, 7]]
    data = load_dataset(made(tmp_path, content))
    first, second = data.coco["annotations"]
    assert first == {
        "id": 1,  # 0 would be no match to COCO's evaluation
        "image_id": 7,
        "category_id": 90,
        "bbox": [1, 2, 10, 5],
        "area": 50,
        "iscrowd": 0,
        "segmentation": [[1, 2, 11, 2, 11, 7]],
    }
    assert (second["id"], second["area"]) == (2, 9)
    assert data.class_names == ("cat", "dog")
    assert data.category_ids == (2, 90)
    assert data.coco["info"] == {}
    assert data.image_dir == tmp_path / "images"
    assert [image["id"] for image in data.coco["images"]] == [7, 3]


@pytest.mark.parametrize("size", [{}, {"width": 0, "height": 0}, {"width": None, "height": 5}])
def test_a_size_that_is_not_told_is_read_from_the_image(tmp_path, content, size):
    for key in ("width", "height"):
        del content["images"][1][key]
    content["images"][1].update(size)
    image = load_dataset(made(tmp_path, content)).coco["images"][1]
    assert (image["width"], image["height"]) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_ignored_annotations_become_crowds(tmp_path, content, key):
    content["annotations"][0][key] = 1
    first, second = load_dataset(made(tmp_path, content)).coco["annotations"]
    assert (first["iscrowd"], second["iscrowd"]) == (1, 0)
    assert "ignore" not in first  # which Detectron2 refuses


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ([0, 0, WIDTH, HEIGHT], [0, 0, WIDTH, HEIGHT]),
        ([30.2, 20.1, 9.8, 9.9], [30.2, 20.1, 9.8, 9.9]),
        ([-SLACK, -SLACK, 5, 6], [0, 0, 5 - SLACK, 6 - SLACK]),
        ([35, 25, 5 + SLACK, 5 + SLACK], [35, 25, 5, 5]),
    ],
)
def test_boxes_end_at_the_border(tmp_path, content, box, kept, caplog):
    content["annotations"][0]["bbox"] = box
    with caplog.at_level(logging.WARNING):
        data = load_dataset(made(tmp_path, content))
    assert data.coco["annotations"][0]["bbox"] == pytest.approx(kept)
    warned = [record.getMessage() for record in caplog.records]
    if box == kept:
        assert not warned
    else:
        assert len(warned) == 1
        assert "1 boxes clipped" in warned[0] and "annotation 0: bbox" in warned[0]


def test_boxes_without_area_are_left_out_with_one_warning(tmp_path, content, caplog):
    content["annotations"] += [
        {"id": 11, "image_id": 3, "category_id": 2, "bbox": [4, 4, 0, 3]},
        {"id": 12, "image_id": 3, "category_id": 2, "bbox": [4, 4, 3, 0]},
    ]
    with caplog.at_level(logging.WARNING):
        data = load_dataset(made(tmp_path, content))
    assert [a["id"] for a in data.coco["annotations"]] == [1, 2]
    (record,) = caplog.records
    assert "2 boxes without area" in record.getMessage()
    assert "annotation 11" in record.getMessage()


def set_box(box):
    return lambda content: content["annotations"][1].update(bbox=box)


def set_in(part, **values):
    return lambda content: content[part][1].update(values)


def drop(part, key):
    return lambda content: content[part][1].pop(key)


BAD = {
    "annotation id twice": (set_in("annotations", id=0), "annotation 0: .*every 'id' once"),
    "annotation id text": (set_in("annotations", id="x"), "annotation 'x': .*integer 'id'"),
    "image id twice": (set_in("images", id=7), "image number 2: .*every 'id' once, got 7"),
    "image without id": (drop("images", "id"), "image number 2: .*integer 'id', got none"),
    "file name twice": (set_in("images", file_name="a.png"), "image number 2.*'a.png' again"),
    "no file name": (drop("images", "file_name"), "image number 2: expected 'file_name'"),
    "no image file": (set_in("images", file_name="c.png"), "got 1 of 2 missing.*is c.png"),
    "negative size": (set_in("images", width=-4), "image 3: .*positive integers, got .-4, 30"),
    "size as text": (set_in("images", width="40"), "image 3: .*positive integers, got"),
    "unknown image": (set_in("annotations", image_id=8), "annotation 5: .*'image_id'.*got 8"),
    "unknown class": (set_in("annotations", category_id=1), "annotation 5: .*'category_id'.*got 1"),
    "no class": (drop("annotations", "category_id"), "annotation 5: .*'category_id'.*got None"),
    "no box": (drop("annotations", "bbox"), "annotation 5: .*four finite numbers, got None"),
    "three numbers": (set_box([1, 2, 3]), "annotation 5: .*four finite numbers"),
    "NaN": (set_box([1, 2, float("nan"), 4]), "annotation 5: .*four finite numbers"),
    "infinity": (set_box([1, 2, float("inf"), 4]), "annotation 5: .*four finite numbers"),
    "text": (set_box([1, 2, "3", 4]), "annotation 5: .*four finite numbers"),
    "negative width": (set_box([9, 9, -3, 4]), "annotation 5: .*sizes of at least 0"),
    "negative height": (set_box([9, 9, 3, -4]), "annotation 5: .*sizes of at least 0"),
    "beyond the left": (set_box([-1.5, 2, 9, 9]), "annotation 5: bbox .*image of 40 x 30"),
    "beyond the top": (set_box([2, -1.5, 9, 9]), "annotation 5: bbox .*image of 40 x 30"),
    "beyond the right": (set_box([32, 2, 9.5, 9]), "1 outside; .*annotation 5"),
    "beyond the bottom": (set_box([2, 22, 9, 9.5]), "1 outside; .*annotation 5"),
    "wholly outside": (set_box([40, 2, 0.5, 9]), "1 outside; .*annotation 5"),
    "far outside": (set_box([900, 900, 5, 9]), "1 outside; .*annotation 5"),
    "class name twice": (set_in("categories", name="dog"), "category number 2: .*'dog' again"),
    "class id twice": (set_in("categories", id=90), "category number 2: .*got 90 again"),
    "class without name": (drop("categories", "name"), "category number 2: expected 'name'"),
    "no images": (lambda c: c["images"].clear(), "at least one image, got none"),
    "no annotations": (lambda c: c["annotations"].clear(), "to train on, got 0"),
    "no images key": (lambda c: c.pop("images"), "expected 'images' as a list.*got none"),
    "no annotations key": (lambda c: c.pop("annotations"), "'annotations' as a list.*got none"),
    "no categories key": (lambda c: c.pop("categories"), "'categories' as a list.*got none"),
    "images no list": (lambda c: c.update(images={}), "'images' as a list.*something else"),
    "images of text": (lambda c: c.update(images=["a"]), "'images' as a list of objects"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_trained_on_is_refused(tmp_path, content, change, words):
    load_dataset(made(tmp_path, copy.deepcopy(content)))
    change(content)
    with pytest.raises(ValueError, match=words) as error:
        load_dataset(made(tmp_path, content))
    assert "set.json" in str(error.value)


def test_boxes_outside_are_counted(tmp_path, content):
    for annotation in content["annotations"]:
        annotation["bbox"] = [30, 2, 40, 12]  # corners in place of sizes
    with pytest.raises(ValueError, match="got 2 outside; the first is .*annotation 0: bbox"):
        load_dataset(made(tmp_path, content))


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "expected JSON, got"), ("[]", "JSON object, got list"), ("\udcff", "expected JSON")],
)
def test_a_file_that_is_no_coco_file_is_refused(tmp_path, content, text, words):
    spec = made(tmp_path, content)
    (tmp_path / "set.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"set.json: .*{words}"):
        load_dataset(spec)


def test_missing_files_are_refused(tmp_path, content):
    spec = made(tmp_path, content)
    with pytest.raises(ValueError, match="nowhere.json: expected a COCO annotation file"):
        load_dataset(f"coco:{tmp_path}/nowhere.json:{tmp_path}/images")
    with pytest.raises(ValueError, match="nowhere: expected the folder of the images of .*json"):
        load_dataset(f"coco:{tmp_path}/set.json:{tmp_path}/nowhere")
    (tmp_path / "images" / "b.png").write_text("no image")
    del content["images"][1]["width"]
    (tmp_path / "set.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="b.png: expected an image"):
        load_dataset(spec)


def test_a_size_that_is_not_annotated_is_that_of_the_image_as_shown(tmp_path, content):
    spec = made(tmp_path, content)
    exif = Image.Exif()
    exif[0x0112] = 8  # a quarter turn to the left
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "b.png", exif=exif)
    del content["images"][1]["width"]
    (tmp_path / "set.json").write_text(json.dumps(content))
    image = load_dataset(spec).coco["images"][1]
    assert (image["width"], image["height"]) == (WIDTH, HEIGHT)


def test_the_size_of_an_image_too_large_for_pillow_is_refused(tmp_path, content, monkeypatch):
    spec = made(tmp_path, content)
    del content["images"][1]["width"]
    (tmp_path / "set.json").write_text(json.dumps(content))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="b.png: expected an image, got Image size"):
        load_dataset(spec)


@pytest.mark.parametrize("spec", ["", "coco", "coco:a.json", "voc:root", "voc::train", "x:a:b"])
def test_what_is_no_spec_is_refused(spec):
    with pytest.raises(ValueError, match="expected coco:ANNOTATIONS.json:IMAGE_DIR or voc:ROOT"):
        load_dataset(spec)


def test_a_colon_in_the_path_of_the_annotations_is_no_separator(tmp_path, content):
    folder = tmp_path / "12:30"
    folder.mkdir()
    made(folder, content)
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        os.link(folder / "images" / name, tmp_path / "images" / name)
    assert load_dataset(f"coco:{folder}/set.json:{tmp_path}/images").class_names == ("cat", "dog")


def test_classes_of_a_test_set_are_found_by_name(tmp_path, content):
    spec = made(tmp_path, content)
    test = load_dataset(spec, ("dog", "bird", "cat"))
    assert test.class_names == ("dog", "bird", "cat")
    names = dict(zip(test.category_ids, test.class_names, strict=True))
    assert [names[a["category_id"]] for a in test.coco["annotations"]] == ["dog", "cat"]
    assert list(test.category_ids) == sorted(test.category_ids)
    # With the very same classes the ids of the file stay, by which its owner knows them.
    assert load_dataset(spec, ("cat", "dog")).category_ids == (2, 90)
    with pytest.raises(ValueError, match="set.json: .*training set .dog, bird., got also cat"):
        load_dataset(spec, ("dog", "bird"))


def test_a_test_set_may_be_without_objects_and_a_training_set_not(tmp_path, content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    spec = made(tmp_path, content)
    assert len(load_dataset(spec, ("cat", "dog")).coco["annotations"]) == 2
    with pytest.raises(ValueError, match="to train on, got 2 crowd or difficult ones"):
        load_dataset(spec)
    content["annotations"] = []
    assert load_dataset(made(tmp_path, content), ("cat", "dog")).coco["annotations"] == []


def test_the_fingerprint_is_that_of_what_is_trained_on(tmp_path, content):
    def fingerprint(changed: dict) -> str:
        return load_dataset(made(tmp_path, changed)).fingerprint

    same = {key: copy.deepcopy(content[key]) for key in reversed(content)}
    same["annotations"][0] = dict(reversed(same["annotations"][0].items()))
    same |= {"info": {"year": 2024}, "licenses": []}
    assert fingerprint(content) == fingerprint(same)

    seen = {fingerprint(content)}
    changes = [
        set_box([0, 0, WIDTH, HEIGHT - 1]),
        set_in("annotations", category_id=90),
        set_in("annotations", image_id=3),
        set_in("annotations", iscrowd=1),
        set_in("images", width=WIDTH + 1),
        set_in("images", file_name="c.png"),
        set_in("categories", name="bird"),
        lambda c: c["annotations"].reverse(),
        lambda c: c["annotations"].pop(),
        lambda c: c["images"].pop(),
    ]
    for change in changes:
        changed = copy.deepcopy(content)
        change(changed)
        seen.add(load_dataset(made(tmp_path, changed, ("a.png", "b.png", "c.png"))).fingerprint)
    assert len(seen) == 1 + len(changes)


def test_reading_leaves_no_trace_on_a_second_reading(tmp_path, content):
    spec = made(tmp_path, content)
    assert load_dataset(spec).coco == load_dataset(spec).coco


VOC_OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax>
</bndbox></object>"""


def voc_object(name="cell", box=(1, 1, WIDTH, HEIGHT), difficult=0) -> str:
    return VOC_OBJECT.format(name=name, box=box, difficult=difficult)


def voc(root: Path, files: dict[str, str], split="train", suffix=".jpg") -> str:
    """Write a tree in VOC's layout; ``files`` holds the XML inside <annotation> by name."""
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(files) + "\n\n")
    for name, inside in files.items():
        path = root / "Annotations" / f"{name}.xml"
        path.write_text(f"<annotation>{inside}</annotation>")
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / (name + suffix))
    return f"voc:{root}:{split}"


SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_voc_becomes_coco(tmp_path, suffix):
    files = {
        "two": SIZE + voc_object() + voc_object("alga", (3, 5, 3, 9), difficult=1),
        "none": "<size><width>0</width><height>0</height></size>",
    }
    data = load_dataset(voc(tmp_path, files, suffix=suffix))
    assert data.class_names == ("alga", "cell")
    assert data.coco["images"] == [
        {"id": 1, "file_name": "two" + suffix, "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "none" + suffix, "width": WIDTH, "height": HEIGHT},
    ]
    whole, pixel = data.coco["annotations"]
    # The first pixel has index 1, the last belongs to the box.
    assert whole["bbox"] == [0, 0, WIDTH, HEIGHT]
    assert pixel["bbox"] == [2, 4, 1, 5]
    assert (whole["category_id"], pixel["category_id"]) == (2, 1)
    assert (whole["iscrowd"], pixel["iscrowd"]) == (0, 1)
    assert (whole["area"], pixel["area"]) == (WIDTH * HEIGHT, 5)


def test_the_classes_of_a_voc_test_split_are_those_of_training(tmp_path):
    train = load_dataset(voc(tmp_path, {"a": voc_object("x") + voc_object("y")}))
    spec = voc(tmp_path, {"b": voc_object("y")}, split="test")
    test = load_dataset(spec, train.class_names)
    assert test.class_names == train.class_names == ("x", "y")
    assert test.coco["annotations"][0]["category_id"] == 2
    empty = load_dataset(voc(tmp_path, {"c": ""}, split="empty"), train.class_names)
    assert (empty.class_names, empty.coco["annotations"]) == (("x", "y"), [])


VOC_BAD = {
    "no XML": ("<object>", "a.xml: expected VOC annotations in XML"),
    "no name": (voc_object(name=""), "a.xml: object 1: expected a name"),
    "no box": ("<object><name>x</name></object>", "a.xml: object 1: expected bndbox"),
    "text in the box": (voc_object(box=("l", 1, 2, 3)), "a.xml: object 1: .*got .'l', '1'"),
    "NaN": (voc_object() + voc_object(box=("nan", 1, 2, 3)), "a.xml: object 2: .*four finite"),
    "corners swapped": (voc_object(box=(20, 1, 10, 3)), "a.xml: object 1: .*at least 0"),
    "outside": (voc_object(box=(1, 1, 99, 9)), "train.txt: .*1 outside.*a.xml: object 1"),
    "no object": (SIZE, "train.txt: expected annotations to train on, got 0"),
}


@pytest.mark.parametrize(("inside", "words"), VOC_BAD.values(), ids=VOC_BAD)
def test_voc_that_cannot_be_trained_on_is_refused(tmp_path, inside, words):
    spec = voc(tmp_path, {"a": inside})
    with pytest.raises(ValueError, match=words):
        load_dataset(spec)


def test_missing_files_of_voc_are_refused(tmp_path):
    spec = voc(tmp_path, {"a": voc_object(), "b": voc_object()})
    with pytest.raises(ValueError, match="val.txt: expected a list of image names"):
        load_dataset(f"voc:{tmp_path}:val")
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(ValueError, match="JPEGImages, got 1 of 2 missing; the first is b.jpg"):
        load_dataset(spec)
    (tmp_path / "Annotations" / "a.xml").unlink()
    with pytest.raises(ValueError, match="a.xml: expected VOC annotations in XML"):
        load_dataset(spec)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("b\nb\n")
    with pytest.raises(ValueError, match="every 'file_name' once, got 'b.jpg' again"):
        load_dataset(spec)


def test_the_arguments_are_those_of_the_train_scripts():
    parser = argparse.ArgumentParser()
    add_dataset_arguments(parser)
    args = parser.parse_args(["--train", "voc:a:train", "--test", "voc:a:test"])
    assert (args.train, args.test) == ("voc:a:train", "voc:a:test")
    with pytest.raises(SystemExit):
        parser.parse_args(["--train", "voc:a:train"])
    parser = argparse.ArgumentParser()
    add_dataset_arguments(parser, required=False)
    assert parser.parse_args([]).test is None


BCCD = Path(os.environ.get("PSKD_DATA", "")) / "bccd"


@pytest.mark.skipif(
    not (os.environ.get("PSKD_DATA") and BCCD.is_dir()),
    reason="PSKD_DATA names no folder with the BCCD set (github.com/Shenggan/BCCD_Dataset)",
)
def test_bccd_is_read_whole(caplog):
    with caplog.at_level(logging.WARNING):
        train, val, test = (
            load_dataset(f"voc:{BCCD}:{split}") for split in ("train", "val", "test")
        )
    sizes = [(len(d.coco["images"]), len(d.coco["annotations"])) for d in (train, val, test)]
    assert sizes == [(205, 2805), (87, 1138), (72, 945)]
    assert train.class_names == val.class_names == test.class_names == ("Platelets", "RBC", "WBC")
    assert not caplog.records
    assert len({d.fingerprint for d in (train, val, test)}) == 3
