"""Labels from attribute lists and from files of labels."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets.table import InMemoryTable
from PIL import Image

from fedphd.common.config.data import DataConfig, PartitionConfig
from fedphd.common.data.images import LabelledImages
from fedphd.common.data.labels import read_attributes, write_labels
from fedphd.common.data.sources import open_pictures
from fedphd.common.errors import ConfigError

ATTRIBUTES = ["Bald", "Male", "Smiling", "Young"]
# Per file the values of ATTRIBUTES; the class of Male and Young stands behind it.
FACES = {
    "000001.jpg": ([-1, -1, 1, -1], 0),
    "000002.jpg": ([-1, -1, -1, 1], 1),
    "000003.jpg": ([1, 1, -1, -1], 2),
    "000004.jpg": ([-1, 1, 1, 1], 3),
    "000005.jpg": ([-1, 1, -1, 1], 3),
}
BOTH = ("Male", "Young")


def as_text(rows: dict[str, list[int]]) -> str:
    """As CelebA's own list_attr_celeba.txt has it: two spaces before a positive value."""
    lines = [str(len(rows)), " ".join(ATTRIBUTES) + " "]
    lines += [name + "".join(f" {value:>2}" for value in values) for name, values in rows.items()]
    return "\n".join(lines) + "\n"


def as_csv(rows: dict[str, list[int]]) -> str:
    lines = [",".join(["image_id", *ATTRIBUTES])]
    lines += [",".join([name, *map(str, values)]) for name, values in rows.items()]
    return "\n".join(lines) + "\n"


ROWS = {name: values for name, (values, _) in FACES.items()}


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """A folder of images whose brightness is 10 times the number in their name."""
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    for number, name in enumerate(FACES, start=1):
        Image.new("RGB", (10, 12), (10 * number,) * 3).save(folder / name, quality=95)
    return folder


def config_of(folder: Path, text: str, name: str = "list_attr_celeba.txt") -> DataConfig:
    file = folder.parent / name
    file.write_text(text, encoding="utf-8")
    return DataConfig(source=str(folder), attribute_file=str(file), label_attributes=BOTH)


@pytest.mark.parametrize("form", [as_text, as_csv])
def test_a_class_is_two_times_male_plus_young(faces: Path, form: object) -> None:
    assert callable(form)
    data = LabelledImages(config_of(faces, form(ROWS)))
    assert data.labels.tolist() == [expected for _, expected in FACES.values()]
    images = data.decode(image_size=8, channels=1)
    # Each label stays with its image, whatever JPEG made of its brightness.
    brightness = images.images.float().mean((1, 2, 3)).tolist()
    assert brightness == pytest.approx([10, 20, 30, 40, 50], abs=1.5)


def test_the_first_attribute_is_the_most_significant(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(as_text(ROWS), encoding="utf-8")
    found = read_attributes(file, ["Young", "Male", "Bald"])
    # 4 * Young + 2 * Male + Bald.
    assert list(found.values()) == [0, 4, 3, 6, 6]


def test_clients_get_one_class_each(faces: Path) -> None:
    config = config_of(faces, as_text(ROWS))
    for part, expected in enumerate([{0}, {1}, {2}, {3}]):
        split = PartitionConfig(num_partitions=4, classes_per_partition=1, partition_id=part)
        data = LabelledImages(config.model_copy(update={"partition": split}))
        assert set(data.labels.tolist()) == expected


def test_rows_without_an_image_are_only_logged(
    faces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = {**ROWS, "000006.jpg": [1, 1, 1, 1], "000007.jpg": [1, 1, 1, 1]}
    with caplog.at_level(logging.WARNING, logger="fedphd.common.data.labels"):
        LabelledImages(config_of(faces, as_text(rows)))
    assert [r.getMessage().split(": ")[1] for r in caplog.records] == ["2 rows have no image here"]


def cut(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (as_csv({"000001.jpg": [1, 1, 1, 1]}), r"no row for 4 of 5 images: 000002.jpg, 000003.jpg,"
         r" 000004.jpg and 1 more; add"),
        (cut(as_text(ROWS)), "announces 5 rows but has 4; it is incomplete"),
        (as_csv(ROWS).replace("Young", "Old"),
         "label_attributes: .* lacks Young; it has Bald, Male, Smiling, Old"),
        (as_text(ROWS).replace("000002.jpg -1 -1", "000002.jpg -1"),
         "line 4: must be a file name and 4 values of 1 or -1"),
        (as_csv(ROWS).replace("000003.jpg,1,1", "000003.jpg,1,yes"), "line 4: must be a file name"),
        ("", "label_attributes: .* lacks Male, Young; it has no attribute"),
    ],
)  # fmt: skip
def test_what_an_attribute_list_lacks_is_named(faces: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelledImages(config_of(faces, text))


def small(folder: Path, *names: str) -> Path:
    """Images whose brightness is their position in ``names``."""
    for brightness, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), brightness).save(folder / name)
    return folder


def csv_of(**young: int) -> str:
    """A list of files, Male being -1 everywhere."""
    return "file,Male,Young\n" + "".join(f'"{name}",-1,{value}\n' for name, value in young.items())


def label_of(config: DataConfig) -> dict[int, int]:
    """The label of every image, by its brightness."""
    data = LabelledImages(config)
    brightness = data.decode(image_size=8, channels=1).images[:, 0, 0, 0].tolist()
    return dict(zip(brightness, data.labels.tolist(), strict=True))


@pytest.mark.parametrize(
    ("names", "rows", "expected"),
    [
        (["a/1.png", "b/1.png"], {"a/1.png": -1, "b/1.png": 1}, {0: 0, 1: 1}),
        (["a/1.png", "b/1.png"], {"./b/1.png": -1, "faces/a/1.png": 1}, {0: 1, 1: 0}),
        (["a/1.png", "b/2.png"], {"2.png": 1, "1.png": -1}, {0: 0, 1: 1}),
        (["a/1.png", "1.png"], {"1.png": 1, "a/1.png": -1}, {0: 0, 1: 1}),
        (["one, two.png", 'a "b".png'], {"one, two.png": 1, 'a ""b"".png': -1}, {0: 1, 1: 0}),
    ],
    ids=["paths", "paths from elsewhere", "unique names", "both", "quoted"],
)  # fmt: skip
def test_a_row_belongs_to_the_image_of_its_path(
    tmp_path: Path, names: list[str], rows: dict[str, int], expected: dict[int, int]
) -> None:
    source = small(tmp_path / "faces", *names)
    assert label_of(config_of(source, csv_of(**rows), "list.csv")) == expected


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        (["a/1.png", "b/1.png"], {"1.png": 1}, "'1.png' may mean 'a/1.png' or 'b/1.png'; name"),
        (["1.png"], {"a/1.png": 1, "b/1.png": 1}, "a/1.png, b/1.png may all mean '1.png'; name"),
        (["a/1.png"], {"b/1.png": 1}, "no row for 1 of 1 images: a/1.png"),
        (["1.png"], {"1.png": 1, "./1.png": 1}, "line 3: names '1.png' again, after line 2; keep"),
    ],
)  # fmt: skip
def test_rows_that_may_mean_other_images_are_refused(
    tmp_path: Path, names: list[str], rows: dict[str, int], message: str
) -> None:
    source = small(tmp_path / "faces", *names)
    with pytest.raises(ConfigError, match=message):
        LabelledImages(config_of(source, csv_of(**rows), "list.csv"))


@pytest.mark.parametrize("form", [as_text, as_csv])
def test_a_byte_order_mark_and_other_line_ends_do_no_harm(faces: Path, form: object) -> None:
    assert callable(form)
    text = "\ufeff" + form(ROWS).replace("\n", "\r\n")
    data = LabelledImages(config_of(faces, text))
    assert data.labels.tolist() == [expected for _, expected in FACES.values()]


def test_what_is_not_csv_is_named(faces: Path) -> None:
    text = as_csv(ROWS).replace("000004.jpg,-1", '"000004.jpg,-1')
    with pytest.raises(ConfigError, match=r"list\.csv', line 6: not CSV \(unexpected end"):
        LabelledImages(config_of(faces, text, "list.csv"))


def test_files_in_a_home_folder_are_found(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_of(faces, as_csv(ROWS), "list.csv")
    config = config.model_copy(update={"attribute_file": "~/list.csv"})
    assert len(LabelledImages(config).labels) == 5
    config = config.model_copy(update={"attribute_file": "~nobody-at-all/list.csv"})
    with pytest.raises(ConfigError, match=r"'~nobody-at-all/list\.csv': cannot be read: No such"):
        LabelledImages(config)


def test_more_attributes_than_a_label_has_room_for_are_refused() -> None:
    names = tuple(map(str, range(32)))
    with pytest.raises(ValueError, match="at most 31 items"):
        DataConfig(attribute_file="list.txt", label_attributes=names)


def test_a_missing_attribute_list_is_named(faces: Path) -> None:
    config = DataConfig(source=str(faces), attribute_file="/no/list", label_attributes=BOTH)
    with pytest.raises(ConfigError, match="attribute_file = '/no/list': cannot be read: No such"):
        LabelledImages(config)


def test_attributes_need_file_names(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(as_text(ROWS), encoding="utf-8")
    config = DataConfig(attribute_file=str(file), label_attributes=BOTH)
    with pytest.raises(ConfigError, match="source = 'digits' has none; use a folder of image"):
        LabelledImages(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_attributes": BOTH}, "label_attributes needs attribute_file"),
        ({"attribute_file": "a"}, "attribute_file needs label_attributes"),
        ({"attribute_file": "a", "label_attributes": ("A", "A")}, "names an attribute twice"),
        ({"attribute_file": "a", "label_attributes": BOTH, "label_file": "b"},
         "label_file and attribute_file both give labels; keep one"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_together_are_refused(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate(values)


def test_a_file_of_labels_gives_images_without_labels_theirs(faces: Path, tmp_path: Path) -> None:
    bare = DataConfig(source=str(faces))
    with pytest.raises(ConfigError, match=r"label_column = 'label': .* or `fedphd pseudo-labels`"):
        LabelledImages(bare)
    file = tmp_path / "labels.csv"
    write_labels(file, [1, 0, 1, 2, 0], list(FACES))
    labelled = bare.model_copy(update={"label_file": str(file)})
    assert LabelledImages(labelled).labels.tolist() == [1, 0, 1, 2, 0]


def test_a_file_of_labels_may_replace_those_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    write_labels(file, [n % 3 for n in range(1797)], None)
    data = LabelledImages(DataConfig(label_file=str(file)))
    assert data.labels[:5].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("position,file,label\n0,000001.jpg,1\n", "has 1 labels, but the data set has 5 images"),
        ("a,b\n1,2\n", "its first line must be position,file,label"),
        ("position,file,label\n" + "".join(f"{n},00000{n + 1}.jpg,x\n" for n in range(5)),
         "line 2: must be 0,FILE,LABEL"),
        ("position,file,label\n" + "".join(f"{n},00000{5 - n}.jpg,1\n" for n in range(5)),
         "line 2: names '000005.jpg', but image 0 is '000001.jpg'; make it again"),
        ("position,file,label\n" + "".join(f"{n},00000{n + 1}.jpg,{10**25}\n" for n in range(5)),
         "line 2: must be 0,FILE,LABEL with a label of 0 to 2147483647"),
        ("position,file,label\n" + "".join(f"{n},x,{2**31}\n" for n in range(5)),
         "line 2: must be 0,FILE,LABEL"),
        ("position,file,label\n" + "0\n" * 5, "line 2: must be 0,FILE,LABEL"),
    ],
)  # fmt: skip
def test_a_file_of_labels_for_other_images_is_refused(
    faces: Path, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        LabelledImages(DataConfig(source=str(faces), label_file=str(file)))


def test_a_file_of_labels_names_images_by_their_paths(tmp_path: Path) -> None:
    source = small(tmp_path / "images", "a, b/1.png", "c/1.png")
    file, older, marked = (tmp_path / name for name in ("new.csv", "older.csv", "marked.csv"))
    config = DataConfig(source=str(source), label_file=str(file))
    write_labels(file, [4, 2], open_pictures(config).names())
    assert file.read_text("utf-8") == 'position,file,label\n0,"a, b/1.png",4\n1,c/1.png,2\n'
    # Before, such files held the names alone.
    write_labels(older, [4, 2], ["1.png", "1.png"])
    marked.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    for one in (file, older, marked):
        assert label_of(config.model_copy(update={"label_file": str(one)})) == {0: 4, 1: 2}


def test_more_images_than_an_array_has_room_for_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 times the same 64 MiB: more than 2 GiB, which takes 64 MiB."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    large, none = ({"bytes": bytes(2**26), "path": "a.png"}, None)
    chunks = [pa.array([large], kind)] * 40
    features = datasets.Features(image=datasets.Image())

    def opened(chunks: list[pa.Array]) -> list[str] | None:
        table = InMemoryTable(pa.table({"image": pa.chunked_array(chunks)}))
        info = datasets.DatasetInfo(features=features)
        # A fingerprint of its own would take all bytes.
        made = datasets.Dataset(table, info=info, fingerprint="made")
        monkeypatch.setattr(datasets, "load_from_disk", lambda _: made)
        return open_pictures(DataConfig(source=".", format="saved")).names()

    assert opened(chunks) == ["a.png"] * 40
    assert opened([*chunks, pa.array([none], kind)]) is None
