"""What every reader does alike: the same cases for all layouts of data sets."""

import concurrent.futures
import os
import shutil

import pytest

from ccu_jax.config.schema import Data
from ccu_jax.data import DATASETS
from ccu_jax.data.readers import archives, untrusted_files
from ccu_jax.data.readers.base import MARKER, Counts, Location
from ccu_jax.errors import UserError
from tests.data.readers.layouts import (
    LAYOUTS,
    LINE_LAYOUTS,
    RELEASES,
    compute_signature,
    encode_image,
    ignore_progress,
    open_source,
    read_rows,
    row_image,
)

for_all = pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
for_releases = pytest.mark.parametrize("layout", RELEASES, indirect=True)
for_lines = pytest.mark.parametrize("layout", LINE_LAYOUTS, indirect=True)


@pytest.fixture
def layout(request, tmp_path):
    return LAYOUTS[request.param](tmp_path)


def count_skipped(counts):
    return sum(n for name, n in counts.items() if name.startswith("skipped: "))


@for_all
def test_rows_are_read_in_order(layout):
    source, examples, counts = read_rows(layout.config(validation_fraction=0))
    assert counts["read"] == 6 and count_skipped(counts) == 0
    ids = list(layout.images)
    if layout.dataset == "fashion200k":  # whose test files are read first
        ids = [ids[-1], *ids[:-1]]
    assert list(examples) == ids
    for i, id_ in enumerate(layout.images):
        assert examples[id_].image == row_image(i)
        assert examples[id_].text == f"a thing {i}"
        assert set(examples[id_].labels) <= set(source.classes)
    expected = {"mmimdb": "micro_f1", "hatefulmemes": "auroc"}
    assert source.metric == expected.get(layout.dataset, "accuracy")
    assert source.multi_label == (layout.dataset == "mmimdb")
    splits = [examples[id_].split for id_ in layout.images]
    assert splits[:4] == ["train"] * 4 and splits[5] == "test"


@for_all
def test_threads_read_the_same_rows(layout):
    source, _ = open_source(layout.config())
    expected = [source.read(key) for key in source.keys] * 20
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, [*source.keys] * 20)) == expected
    assert [*open_source(layout.config())[0].keys] == [*source.keys]


@for_all
def test_folder_that_does_not_exist_or_is_empty_is_reported(layout, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "no folder"), ("empty", "missing|contains no")):
        config = Data(dataset=layout.dataset, dir=str(tmp_path / name))
        with pytest.raises(UserError, match=f"data.dir: .*{name}") as error:
            open_source(config)
        error.match(message)
        assert "\n" not in str(error.value)


@for_releases
def test_release_is_found_from_above_and_inside(layout, monkeypatch):
    expected = read_rows(layout.config()).examples
    for folder in (layout.root.parent, layout.root, layout.image_folder):
        assert read_rows(layout._replace(root=folder).config()).examples == expected
        monkeypatch.chdir(folder)
        assert read_rows(Data(dataset=layout.dataset, dir=".")).examples == expected


@for_releases
@pytest.mark.parametrize("part", ["list_file", "image_folder"])
def test_missing_part_of_a_release_is_named_with_a_remedy(layout, part, tmp_path):
    path = getattr(layout, part)
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{layout.root} lacks ") as error:
        open_source(layout.config())
    error.match(path.name)
    error.match("or get .* from http.*://")
    assert "\n" not in str(error.value)


@for_all
def test_location_names_the_edition(layout, tmp_path):
    locate = DATASETS[layout.dataset].locate
    edition = "own" if layout.dataset == "pairs" else "official"
    assert locate(layout.config(), tmp_path) == Location(layout.root, edition)
    (layout.root / MARKER).write_text("")
    assert locate(layout.config(), tmp_path) == Location(layout.root, "sample")
    inner = "data" if layout.dataset == "hatefulmemes" else ""
    name = "medical" if layout.dataset == "pairs" else layout.dataset
    location = locate(Data(dataset=layout.dataset, sample=name), tmp_path)
    assert location == Location(tmp_path / "sample" / name / inner, "sample")


@for_all
def test_signature_changes_with_lists_and_images(layout):
    config = layout.config()
    os.utime(layout.image_folder, ns=(0, 0))  # file systems have coarse clocks
    signatures = [compute_signature(config)]
    (layout.root / "README.md").write_text("")
    assert compute_signature(config) == signatures[0]
    image = next(iter(layout.images.values()))
    new = layout.root / "new"
    new.write_bytes(encode_image("blue"))
    os.replace(new, layout.image_folder / ("x" + image.suffix))
    signatures.append(compute_signature(config))
    data = layout.list_file.read_bytes()
    layout.list_file.write_bytes(data.replace(b"0", b"9"))
    signatures.append(compute_signature(config))
    assert len(set(signatures)) == 3


def move_and_link(path, outside):
    path.rename(outside)
    path.symlink_to(outside)


DAMAGES = {
    "missing": lambda path, outside: path.unlink(),
    "is no plain file (folder)": lambda path, outside: (path.unlink(), path.mkdir()),
    "is no plain file (pipe)": lambda path, outside: (path.unlink(), os.mkfifo(path)),
    "outside of the folder": move_and_link,
    "cannot be read": lambda path, outside: (path.unlink(), path.symlink_to(path.name)),
}


@for_all
@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_image_is_skipped(layout, damage, tmp_path):
    id_, reason = list(layout.images)[1], f"image {damage.partition(' (')[0]}"
    DAMAGES[damage](layout.images[id_], tmp_path / "outside")
    _, examples, counts = read_rows(layout.config())
    assert examples.keys() == layout.images.keys() - {id_}
    assert counts[f"skipped: {reason}"] == count_skipped(counts) == 1
    with pytest.raises(UserError, match=f"{layout.root}: .*: {reason} .data.strict"):
        read_rows(layout.config(strict=True))


@for_all
def test_link_to_another_file_of_the_folder_is_followed(layout):
    first, second = list(layout.images.values())[:2]
    first.unlink()
    first.symlink_to(second)
    assert len(read_rows(layout.config()).examples) == 6


@for_all
@pytest.mark.parametrize("part", ["list_file", "image_folder", "root"])
def test_link_out_of_the_folder_is_not_followed(layout, part, tmp_path):
    path, outside = getattr(layout, part), tmp_path / "above" / "outside"
    outside.parent.mkdir()
    path.rename(outside)
    if part == "root":
        folder = tmp_path / "folder"
        folder.mkdir()
        path, layout = folder / path.name, layout._replace(root=folder)
    path.symlink_to(outside)
    message = f"{path} is a link out of its folder"
    if layout.dataset == "pairs" and part == "image_folder":
        assert count_skipped(read_rows(layout.config()).counts) == 6
        return
    if layout.dataset == "pairs" and part == "root":
        message = "contains no pairs.jsonl"
    with pytest.raises(UserError, match=message):
        open_source(layout.config())


LINES = [
    (b"caf\xe9", "line is not UTF-8"),
    (b"x" * (untrusted_files.MAX_LINE_BYTES + 1), "line too long"),
]
JSON_LINES = [
    (b"{not json", "line is no valid JSON"),
    (b'{"id": "a"} {"id": "b"}', "line is no valid JSON"),
    (b"[" * 200_000, "line is no valid JSON"),
    (b'{"id": 1%s}' % (b"0" * 9999), "line is no valid JSON"),
    (b"[1]", "line is no JSON object"),
    (b"null", "line is no JSON object"),
]
BAD_LINES = [(name, *line) for name in LINE_LAYOUTS for line in LINES]
BAD_LINES += [
    (name, *line) for name in ("jsonl", "hatefulmemes") for line in JSON_LINES
]


@pytest.mark.parametrize(
    "layout, line, reason",
    BAD_LINES,
    indirect=["layout"],
    ids=lambda value: str(value)[:30],
)
def test_unusable_line_is_skipped_and_the_next_one_is_read(layout, line, reason):
    data = layout.list_file.read_bytes()
    first, rest = data.split(b"\n", 1)
    layout.list_file.write_bytes(first + b"\n \n" + line + b"\n" + rest)
    _, examples, counts = read_rows(layout.config())
    assert examples.keys() == layout.images.keys()
    assert counts["read"] == 7
    assert counts[f"skipped: {reason}"] == count_skipped(counts) == 1
    message = f"{layout.list_file.name} line 3: {reason}"
    with pytest.raises(UserError, match=message) as error:
        read_rows(layout.config(strict=True))
    assert "\n" not in str(error.value)


@for_lines
def test_encoding_marks_and_line_ends_do_not_matter(layout):
    expected = read_rows(layout.config())
    data = layout.list_file.read_bytes()
    for new in (
        b"\xef\xbb\xbf" + data,
        data.replace(b"\n", b"\r\n\r\n  \r\n"),
        data.rstrip(b"\n"),
    ):
        layout.list_file.write_bytes(new)
        _, examples, counts = read_rows(layout.config())
        counts.pop("noted: file without final newline", None)
        assert (examples, counts) == (expected.examples, expected.counts)


@pytest.mark.parametrize(
    "layout, archive, inner",
    [
        ("fashion200k", "women.tar.gz", "women"),
        ("fashion200k", "women.tar.gz", ""),
        ("hatefulmemes", "img.tar.gz", "img"),
        ("hatefulmemes", "img.zip", ""),
        ("mmimdb", "mmimdb.tar.gz", "mmimdb"),
        ("mmimdb", "mmimdb.tar.gz", ""),
    ],
    indirect=["layout"],
)
def test_images_may_be_in_their_archive(layout, archive, inner, tmp_path):
    _, examples, counts = read_rows(layout.config())
    folder = layout.image_folder if layout.dataset != "mmimdb" else layout.root
    root = folder.parent
    name, _, ending = archive.partition(".")
    kind = {"tar.gz": "gztar", "zip": "zip"}[ending]
    packed_root = root if inner else folder
    shutil.make_archive(str(root / name), kind, packed_root, inner or None)
    unused = read_rows(layout.config())  # the unpacked files come first
    assert (unused.examples, unused.counts) == (examples, counts)
    folder.rename(tmp_path / "elsewhere")
    for num_try in range(2):

        def unpack(path, number=num_try):
            target = tmp_path / f"unpacked{number}"
            return archives.unpack(path, target, Counts("", False), ignore_progress)

        config = layout._replace(root=root).config()
        packed = read_rows(config, unpack=unpack)
        assert packed.examples == examples
        assert packed.counts == counts | {f"noted: images in {archive}": 1}
        folder.mkdir(exist_ok=True)  # a stopped `tar` leaves an empty folder
    signatures = [compute_signature(config)]
    (root / archive).write_bytes((root / archive).read_bytes() + b"\0")
    os.utime(root / archive, ns=(0, 0))
    assert compute_signature(config) not in signatures
