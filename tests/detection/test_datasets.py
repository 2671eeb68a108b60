"""Data sets from specs: what is read, what is mended, and what is refused with which words."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pskd_detection import load_dataset, write_voc
from pskd_detection.boxes import SLACK
from pycocotools import mask as coco_mask

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
def test_a_size_that_is_not_told_is_that_of_the_image_as_shown(tmp_path, content, size):
    exif = Image.Exif()
    exif[0x0112] = 8  # a quarter turn to the left
    for key in ("width", "height"):
        del content["images"][1][key]
    content["images"][1].update(size)
    spec = made(tmp_path, content)
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "b.png", exif=exif)
    image = load_dataset(spec).coco["images"][1]
    assert (image["width"], image["height"]) == (WIDTH, HEIGHT)


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
    "image without id": (drop("images", "id"), "image number 2: .*integer 'id', got none"),
    "file name twice": (set_in("images", file_name="a.png"), "image number 2.*'a.png' again"),
    "no file name": (drop("images", "file_name"), "image number 2: expected 'file_name'"),
    "negative size": (set_in("images", width=-4), "image 3: .*positive integers, got .-4, 30"),
    "size as text": (set_in("images", width="40"), "image 3: .*positive integers, got"),
    "no class": (drop("annotations", "category_id"), "annotation 5: .*'category_id'.*got None"),
    "no box": (drop("annotations", "bbox"), "annotation 5: .*four finite numbers, got None"),
    "NaN": (set_box([1, 2, float("nan"), 4]), "annotation 5: .*four finite numbers"),
    "infinity": (set_box([1, 2, float("inf"), 4]), "annotation 5: .*four finite numbers"),
    "text": (set_box([1, 2, "3", 4]), "annotation 5: .*four finite numbers"),
    "class name twice": (set_in("categories", name="dog"), "category number 2: .*'dog' again"),
    "class id twice": (set_in("categories", id=90), "category number 2: .*got 90 again"),
    "class without name": (drop("categories", "name"), "category number 2: expected 'name'"),
    "keypoints of a class": (
        set_in("categories", keypoints=17),
        "category number 2: .*as a list of names, got 17",
    ),
    "size NaN": (set_in("images", width=float("nan")), "image 3: .*positive integers, got"),
    "no images": (lambda c: c["images"].clear(), "at least one image, got none"),
    "no annotations": (lambda c: c["annotations"].clear(), "to train on, got 0"),
    "no annotations key": (lambda c: c.pop("annotations"), "'annotations' as a list.*got none"),
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


LEFT_OUT, CLIPPED = None, "clipped"
MENDED = {  # what is changed; what becomes of the second annotation; what is logged
    "unknown image": (set_in("annotations", image_id=8), LEFT_OUT, "not in the file.*image_id 8"),
    "negative width": (set_box([9, 9, -3, 4]), LEFT_OUT, "negative width or height"),
    "negative height": (set_box([9, 9, 3, -4]), LEFT_OUT, "negative width or height"),
    "beyond the left": (set_box([-1.5, 2, 9, 9]), [0, 2, 7.5, 9], "more than 1 pixel outside"),
    "beyond the top": (set_box([2, -1.5, 9, 9]), [2, 0, 9, 7.5], "more than 1 pixel outside"),
    "beyond the right": (set_box([32, 2, 9.5, 9]), [32, 2, 8, 9], "more than 1 pixel outside"),
    "beyond the bottom": (set_box([2, 22, 9, 9.5]), [2, 22, 9, 8], "more than 1 pixel outside"),
    "wholly outside": (set_box([40, 2, 0.5, 9]), LEFT_OUT, "outside their image left out"),
    "far outside": (set_box([900, 900, 5, 9]), LEFT_OUT, "outside their image left out"),
    "box of four": (
        set_in("annotations", segmentation=[[1, 2, 3, 4]]), LEFT_OUT, "fewer than three points",
    ),
    "half a point": (
        set_in("annotations", segmentation=[[1, 2, 3, 4, 5, 6, 7]]), LEFT_OUT, "three points",
    ),
    "area as text": (set_in("annotations", area="big"), "box's area", "box's; .*: 'big'"),
    "area NaN": (set_in("annotations", area=float("nan")), "box's area", "areas .*box's; .*: nan"),
    "area negative": (set_in("annotations", area=-5), "box's area", "areas .*replaced"),
    "area a list": (set_in("annotations", area=[5]), "box's area", "areas .*replaced"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "becomes", "words"), MENDED.values(), ids=MENDED)
def test_what_detectron2_trains_on_is_mended_and_counted(
    tmp_path, content, change, becomes, words, caplog
):
    change(content)
    spec = made(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        data = load_dataset(spec)
    first, *second = data.coco["annotations"]
    assert first["bbox"] == [1, 2, 10, 5]
    if becomes is LEFT_OUT:
        assert second == []
    elif becomes == "box's area":
        assert second[0]["area"] == WIDTH * HEIGHT
    else:
        assert second[0]["bbox"] == becomes
    (record,) = caplog.records
    assert re.search(f"set.json: 1 .*{words}", record.getMessage())
    assert "annotation 5" in record.getMessage()
    with pytest.raises(ValueError, match=f"expected nothing to mend, got 1 .*{words}"):
        load_dataset(spec, strict=True)


def as_text(value):
    return f"number {value}"


@pytest.mark.parametrize("kind", [str, float, as_text, lambda value: value + 0.5])
def test_ids_may_be_text_or_fractions(tmp_path, content, kind, caplog):
    expected = load_dataset(made(tmp_path, content)).coco
    for part, keys in {
        "images": ["id"], "categories": ["id"], "annotations": ["id", "image_id", "category_id"],
    }.items():  # fmt: skip
        for entry in content[part]:
            entry |= {key: kind(entry[key]) for key in keys}
    with caplog.at_level(logging.WARNING):
        data = load_dataset(made(tmp_path, content))
    file_of = {image["id"]: image["file_name"] for image in data.coco["images"]}
    name_of = dict(zip(data.category_ids, data.class_names, strict=True))
    assert [file_of[a["image_id"]] for a in data.coco["annotations"]] == ["a.png", "a.png"]
    assert [name_of[a["category_id"]] for a in data.coco["annotations"]] == ["dog", "cat"]
    ids = [*file_of, *name_of, *(a["id"] for a in data.coco["annotations"])]
    assert all(type(value) is int for value in ids)
    if kind is float:
        assert data.coco == expected and not caplog.records
    else:
        assert "2 images whose id is no integer numbered anew" in caplog.text


def test_ids_of_annotations_are_found_whether_text_or_number(tmp_path, content):
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    assert len(load_dataset(made(tmp_path, content)).coco["annotations"]) == 2


UNSET = [0, 0.0, False, "0", "0.0", "false", "FALSE", "No", " no ", "Unspecified", "", None]
SET = [1, 1.0, True, "1", "1.0", "true", "True", "YES"]


@pytest.mark.parametrize("value", [*UNSET, *SET], ids=repr)
@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_flags_are_read_as_label_tools_write_them(tmp_path, content, key, value, caplog):
    content["annotations"][0][key] = value
    with caplog.at_level(logging.WARNING):
        data = load_dataset(made(tmp_path, content))
    is_set = any(value is known for known in SET)
    assert [a["iscrowd"] for a in data.coco["annotations"]] == [int(is_set), 0]
    assert "ignore" not in data.coco["annotations"][0]  # which Detectron2 refuses
    assert ("1 of 2 objects are crowd or difficult: left out of training" in caplog.text) == is_set


@pytest.mark.parametrize("value", ["maybe", 2, -1, 0.5, [], [0], {}, "2", float("nan")], ids=repr)
@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_what_is_no_flag_is_refused(tmp_path, content, key, value):
    content["annotations"][1][key] = value
    with pytest.raises(ValueError, match=f"set.json: annotation 5: expected '{key}' as 0 or 1, "):
        load_dataset(made(tmp_path, content))


def code(counts, size=(HEIGHT, WIDTH)):
    return {"size": list(size), "counts": counts}


PIXELS = WIDTH * HEIGHT
COMPRESSED = coco_mask.encode(np.asfortranarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)))["counts"]
SEGMENTATIONS = {
    "infinity": ([[1, 2, 3, 4, 5, float("inf")]], "within 400 pixels"),
    "1e9": ([[1, 2, 3, 4, 5, 1e9]], "within 400 pixels"),
    "second polygon": ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, -1e9]], "within 400 pixels"),
    "text in a polygon": ([[1, 2, 3, 4, 5, "6"]], "lists of numbers"),
    "null in a polygon": ([[1, 2, 3, 4, 5, None]], "lists of numbers"),
    "points": ([[[1, 2], [3, 4], [5, 6], [7, 8], [7, 9], [7, 5]]], "lists of numbers"),
    "flat": ([1, 2, 3, 4, 5, 6], "lists of numbers"),
    "text": ("1 2 3", "polygons or a run-length code, got str"),
    "number": (3, "polygons or a run-length code, got int"),
    "counts too long": (code([PIXELS, 1]), "1200 pixels, got those of 1201"),
    "no counts": (code([]), "1200 pixels, got those of 0"),
    "negative counts": (code([PIXELS + 5, -5]), "'counts' as a run-length code"),
    "fractions": (code([PIXELS - 0.5, 0.5]), "'counts' as a run-length code"),
    "counts with NaN": (code([PIXELS, float("nan")]), "'counts' as a run-length code"),
    "counts with infinity": (code([PIXELS, float("inf")]), "'counts' as a run-length code"),
    "counts of text": (code(["1", "2"]), "'counts' as a run-length code"),
    "counts missing": ({"size": [HEIGHT, WIDTH]}, "'counts' as a run-length code, got None"),
    "size missing": ({"counts": [PIXELS]}, "size .30, 40., got None"),
    "size swapped": (code([PIXELS], (WIDTH, HEIGHT)), "size .30, 40., got .40, 30."),
    "size as text": (code([PIXELS], ("30", "40")), "size .30, 40., got"),
    "compressed, cut off": (code(COMPRESSED.decode()[:-2]), "'counts' "),
    "compressed, garbage": (code("~~~"), "'counts' as a run-length code"),
    "compressed, not ASCII": (code("\u00e9"), "'counts' as a run-length code"),
    "compressed, negative": (code("O"), "'counts' as a run-length code"),
    "compressed, open at its end": (code("P"), "'counts' as a run-length code"),
    "compressed, huge": (code("o" * 30 + "0"), "'counts' as a run-length code"),
    "compressed, empty": (code(""), "'counts' as a run-length code"),
}


@pytest.mark.parametrize(("segmentation", "words"), SEGMENTATIONS.values(), ids=SEGMENTATIONS)
@pytest.mark.parametrize("crowd", [0, 1])
def test_segmentations_that_pycocotools_crashes_on_are_refused(
    tmp_path, content, segmentation, words, crowd
):
    content["annotations"][1].update(segmentation=segmentation, iscrowd=crowd)
    with pytest.raises(ValueError, match=f"set.json: annotation 5: segmentation: .*{words}"):
        load_dataset(made(tmp_path, content))


def test_the_reach_of_a_polygon_has_an_end_whatever_the_image(tmp_path, content):
    content["images"][0]["width"] = 10**10
    content["annotations"][1]["segmentation"] = [[1, 2, 3, 4, 5, 1e9]]
    with pytest.raises(ValueError, match="segmentation: expected polygons within 1000000 pixels"):
        load_dataset(made(tmp_path, content))


def test_segmentations_of_pycocotools_are_kept(tmp_path, content):
    rng = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((HEIGHT, WIDTH)) < share, dtype=np.uint8)
        compressed = coco_mask.encode(mask)["counts"].decode()
        flat = mask.reshape(-1, order="F")
        ends = [*np.flatnonzero(np.diff(flat)) + 1, PIXELS]
        runs = np.diff([0, *([0] if flat[0] else []), *ends]).tolist()
        polygons = [[0, 0, WIDTH + 9, 0, 5.5, HEIGHT + 9]]
        floats = [float(run) for run in runs]
        for kept in (code(compressed), code(runs), code(floats), polygons, [], None, [[]]):
            content["annotations"][1]["segmentation"] = kept
            annotation = load_dataset(made(tmp_path, content)).coco["annotations"][1]
            assert annotation["segmentation"] == ([] if kept == [[]] else kept)


def test_a_short_polygon_beside_another_is_left_out(tmp_path, content, caplog):
    triangle = [1, 2, 11, 2, 11, 7]
    content["annotations"][1]["segmentation"] = [[1, 2, 3, 4], triangle]
    data = load_dataset(made(tmp_path, content))
    assert data.coco["annotations"][1]["segmentation"] == [triangle]
    assert "1 polygons of fewer than three points left out" in caplog.text


def test_keypoints_are_all_or_none(tmp_path, content):
    content["categories"][0]["keypoints"] = ["left", "right"]
    content["annotations"][0]["keypoints"] = [1, 2, 2, 0, 0, 0]
    first, second = load_dataset(made(tmp_path, content)).coco["annotations"]
    assert (first["keypoints"], first["num_keypoints"]) == ([1, 2, 2, 0, 0, 0], 1)
    assert (second["keypoints"], second["num_keypoints"]) == ([0] * 6, 0)


@pytest.mark.parametrize("value", [[1, 2], [1, 2, 2], [1, 2, float("nan")] * 2, ["1"] * 6, "x", 5])
def test_bad_keypoints_are_refused(tmp_path, content, value):
    content["categories"][0]["keypoints"] = ["left", "right"]
    content["annotations"][0]["keypoints"] = value
    with pytest.raises(ValueError, match="annotation 0: expected 'keypoints' as 6 numbers x, y, v"):
        load_dataset(made(tmp_path, content))


def test_folders_may_be_those_of_windows(tmp_path, content):
    spec = made(tmp_path, content)
    (tmp_path / "images" / "sub").mkdir()
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "sub" / "a.png")
    content["images"][0]["file_name"] = "sub\\a.png"
    (tmp_path / "set.json").write_text(json.dumps(content))
    assert [image["file_name"] for image in load_dataset(spec).coco["images"]][0] == "sub/a.png"


def roboflow(content: dict, name: str = "pets-x7") -> dict:
    for category in content["categories"]:
        category["supercategory"] = name
    root = {"id": 0, "name": name, "supercategory": "none"}
    return content | {"categories": [root, *content["categories"]]}


@pytest.mark.parametrize("name", ["pets-x7", "dog"])
def test_the_root_category_of_roboflow_is_no_class(tmp_path, content, name, caplog):
    spec = made(tmp_path, roboflow(content, name))
    assert load_dataset(spec).class_names == ("cat", "dog")
    assert load_dataset(spec, ("cat", "dog")).class_names == ("cat", "dog")
    assert f"category 0, '{name}', is no class" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["annotations"][0].update(category_id=0),
        lambda c: c["categories"][1].pop("supercategory"),
        lambda c: c["categories"][0].update(id=1),
    ],
)
def test_category_0_of_others_is_a_class(tmp_path, content, change):
    content = roboflow(content)
    change(content)
    assert len(load_dataset(made(tmp_path, content)).class_names) == 3


@pytest.mark.parametrize("below", [True, False])
def test_images_of_lvis_are_named_by_their_url(tmp_path, content, below):
    folder = tmp_path / "images"
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
    spec = made(tmp_path, content)
    if below:
        (folder / "val2017").mkdir()
        for name in ("a.png", "b.png"):
            (folder / name).rename(folder / "val2017" / name)
    names = [image["file_name"] for image in load_dataset(spec).coco["images"]]
    assert names == (["val2017/a.png", "val2017/b.png"] if below else ["a.png", "b.png"])


def test_an_image_that_is_none_has_no_size(tmp_path, content):
    del content["images"][1]["width"]
    spec = made(tmp_path, content)
    (tmp_path / "images" / "b.png").write_text("no image")
    with pytest.raises(ValueError, match="b.png: expected an image"):
        load_dataset(spec)


@pytest.mark.parametrize("spec", ["", "coco", "coco:a.json", "voc:", "voc::train", "x:a:b"])
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


VOC_BAD = {
    "text in the box": (voc_object(box=("l", 1, 2, 3)), "a.xml: object 1: .*got .'l', '1'"),
    "NaN": (voc_object() + voc_object(box=("nan", 1, 2, 3)), "a.xml: object 2: .*four finite"),
    "no flag": (voc_object(difficult="2"), "a.xml: object 1: expected 'difficult' as 0 or 1"),
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
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("b\nb\n")
    with pytest.raises(ValueError, match="every 'file_name' once, got 'b.jpg' again"):
        load_dataset(spec)


@pytest.mark.parametrize(
    ("box", "words"),
    [((20, 1, 10, 3), "negative width or height left out"), ((1, 1, 99, 9), "image clipped")],
)
def test_boxes_of_voc_are_mended_as_those_of_coco(tmp_path, box, words, caplog):
    spec = voc(tmp_path, {"a": voc_object() + voc_object(box=box)})
    load_dataset(spec)
    assert re.search(f"train.txt: 1 boxes .*{words}; the first: .*a.xml: object 2", caplog.text)
    with pytest.raises(ValueError, match=f"train.txt: strictly read.*got 1 .*{words}; .*a.xml"):
        load_dataset(spec, strict=True)


@pytest.mark.parametrize("value", ["Unspecified", None, "true"], ids=repr)
def test_difficult_is_read_as_label_tools_write_it(tmp_path, value, caplog):
    spec = voc(tmp_path, {"a": voc_object() + voc_object(difficult="" if value is None else value)})
    is_set = any(value is known for known in SET)
    assert [a["iscrowd"] for a in load_dataset(spec).coco["annotations"]] == [0, int(is_set)]
    assert ("1 of 2 objects are crowd or difficult" in caplog.text) == is_set


def flat(folder: Path, names: dict[str, str], encoding="utf-8", declared="") -> str:
    """Write images and, beside each, its XML as label tools do: <filename> by the XML's stem."""
    folder.mkdir(exist_ok=True)
    for stem, image in names.items():
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / image)
        head = f"<?xml version='1.0' encoding='{declared}'?>" if declared else ""
        inside = f"<filename>{image}</filename>" + voc_object("\u00fc")
        text = f"{head}<annotation>{inside}</annotation>"
        (folder / f"{stem}.xml").write_bytes(text.encode(encoding))
    return f"voc:{folder}"


def files_of(spec: str) -> list[str]:
    return [image["file_name"] for image in load_dataset(spec).coco["images"]]


def test_a_flat_folder_is_read_whole(tmp_path):
    images = {name: name + suffix for name, suffix in zip(
        "abcdefg", (".jpg", ".JPG", ".jpeg", ".bmp", ".webp", ".PNG", ".tif"), strict=True
    )}  # fmt: skip
    spec = flat(tmp_path / "12:30", images)
    (tmp_path / "12:30" / "._a.xml").write_bytes(b"\x00\x05\x16\x07")  # of macOS
    data = load_dataset(spec)
    assert [image["file_name"] for image in data.coco["images"]] == list(images.values())
    assert (data.class_names, len(data.coco["annotations"])) == (("\u00fc",), len(images))
    assert data.image_dir == tmp_path / "12:30"
    (tmp_path / "12:30" / "a.xml").rename(tmp_path / "12:30" / "a.XML")
    assert files_of(spec) == list(images.values())


def test_the_file_name_in_the_xml_counts_where_its_own_name_does_not(tmp_path):
    other = {"frame1": "picture.JPG", "two": "two.png"}
    spec = flat(tmp_path / "set", other)
    assert files_of(spec) == list(other.values())
    Image.new("RGB", (9, 9)).save(tmp_path / "set" / "two.bmp")  # with no XML of its own
    assert files_of(spec) == list(other.values())
    path = tmp_path / "set" / "frame1.xml"
    for told in ("C:\\data\\picture.JPG", "/home/me/picture.JPG", "picture.jpg", "picture"):
        path.write_text(f"<annotation><filename>{told}</filename></annotation>")
        assert files_of(spec) == list(other.values())
    path.write_text("<annotation><filename>lost.bmp</filename></annotation>")
    with pytest.raises(ValueError, match="set, got 1 of 2 missing; the first is lost.bmp"):
        load_dataset(spec)


def test_vocs_layout_is_read_whole_without_a_split(tmp_path):
    voc(tmp_path, {"b": voc_object(), "a": voc_object("alga")}, suffix=".JPG")
    data = load_dataset(f"voc:{tmp_path}")
    assert [image["file_name"] for image in data.coco["images"]] == ["a.JPG", "b.JPG"]
    assert data.image_dir == tmp_path / "JPEGImages"
    (tmp_path / "JPEGImages").rename(tmp_path / "images")
    (tmp_path / "Annotations").rename(tmp_path / "annotations")
    assert files_of(f"voc:{tmp_path}") == ["a.JPG", "b.JPG"]


def test_folders_of_cvat_are_kept_apart(tmp_path):
    for folder in ("Annotations/x", "Annotations/y", "JPEGImages/x", "JPEGImages/y"):
        (tmp_path / folder).mkdir(parents=True)
    spec = voc(tmp_path, {"x/a": voc_object(), "y/a": voc_object()}, split="default")
    assert files_of(spec) == files_of(f"voc:{tmp_path}") == ["x/a.jpg", "y/a.jpg"]


ENCODINGS = {
    "utf-8": ("utf-8", "utf-8"),
    "none": ("utf-8", ""),
    "mark": ("utf-8-sig", "utf-8"),
    "mark of UTF-16": ("utf-16", "utf-16"),
    "gb2312": ("gb2312", "gb2312"),
    "GBK": ("gbk", "GBK"),
    "ANSI": ("cp1252", "ANSI"),
    "latin": ("iso-8859-1", "ISO-8859-1"),
    "windows": ("cp1252", "Windows-1252"),
    "Shift JIS": ("shift_jis", "Shift_JIS"),
}


@pytest.mark.parametrize(("encoding", "declared"), ENCODINGS.values(), ids=ENCODINGS)
def test_xml_is_read_in_its_encoding(tmp_path, encoding, declared):
    name = {"gb2312": "\u732b", "gbk": "\u8c93", "shift_jis": "\u732b"}.get(encoding, "\u00fc")
    head = f"<?xml version='1.0' encoding='{declared}'?>" if declared else ""
    spec = voc(tmp_path, {"a": ""})
    text = f"{head}<annotation>{voc_object(name)}</annotation>"
    (tmp_path / "Annotations" / "a.xml").write_bytes(text.encode(encoding))
    assert load_dataset(spec).class_names == (name,)


@pytest.mark.parametrize("declared", ["utf-8", "klingon", "hex"])
def test_xml_in_another_encoding_is_refused_by_name(tmp_path, declared):
    spec = flat(tmp_path / "set", {"a": "a.png"}, "cp1252", declared)
    with pytest.raises(ValueError, match="set/a.xml: expected VOC annotations in XML, got"):
        load_dataset(spec)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_the_list_of_a_split_may_have_a_byte_order_mark(tmp_path, encoding):
    spec = voc(tmp_path, {"a": voc_object()})
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes("a\r\n".encode(encoding))
    assert files_of(spec) == ["a.jpg"]


def test_file_names_need_not_be_utf_8(tmp_path):
    spec = voc(tmp_path, {"a": voc_object()})
    for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        source = tmp_path / folder / f"a{suffix}"
        source.rename(source.with_name(os.fsdecode(b"\xe8") + suffix))
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(b"\xe8\n")
    name = os.fsdecode(b"\xe8.jpg")
    assert files_of(spec) == files_of(f"voc:{tmp_path}") == [name]
    data = load_dataset(spec)
    assert len(data.fingerprint) == 64
    assert json.loads(json.dumps(data.coco)) == data.coco
    write_voc(data.coco, tmp_path / "written", "all")
    assert (tmp_path / "written" / "Annotations" / "1.xml").exists()


def test_a_folder_without_xml_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected VOC annotations, \*.xml, got none"):
        load_dataset(f"voc:{tmp_path}")


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
