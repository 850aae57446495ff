"""Scores: what they hold, show, select and write."""

import json
import re
import subprocess
import sys
import threading

import pytest
import torch

from fastlens.errors import MissingDependencyError, ShapeError, SourceError
from fastlens.scores import JSON_NAME, TENSORS_NAME, Cell, Scores, visible, writable_folder
from tests.close import assert_close_to

HEADS = {"layer": ["L0", "L1"], "head": ["H0", "H1", "H2"]}


def head_map(**changes):
    values = torch.tensor([[0.0, 0.5, -2.0], [1.0, 0.25, 0.0]])
    fields = {"axes": ("layer", "head"), "labels": {k: list(v) for k, v in HEADS.items()}}
    return Scores(values, **{**fields, "unit": "logits", "title": "a map", **changes})


def token_map(**changes):
    values = torch.tensor([[1.0, 1.5], [0.0, 1.0]], dtype=torch.float64)
    labels = {"layer": ["L0", "L1"], "pos": ["The:0", " Tower\n:1"]}
    return Scores(values, ("layer", "pos"), labels, reference=1.0, **changes)


def full():
    return head_map(
        per_example=torch.arange(18.0).reshape(3, 2, 3),
        reference=0.5,
        baselines={"clean": 2.0, "corrupted": 0.5},
        plan={"strategy": "stacked", "runs": 6},
        certificate={"runs": 1, "max_difference": 1e-7, "tolerance": 1e-4},
        meta={"prompt": "naïve 中文 \n", "tokens": [[1, 2]]},
    )


def test_missing_labels_are_indices():
    scores = Scores(torch.zeros(2, 3), ("layer", "head"), {"head": ["a", "b", "c"]})
    assert scores.labels == {"layer": ["0", "1"], "head": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": ("layer",)}, "2 different axis names"),
        ({"axes": ("layer", "layer")}, "2 different axis names"),
        ({"labels": {"pos": ["a"]}}, "labels for 'pos'"),
        ({"labels": {"head": ["a"]}}, "length 3 and 1 labels"),
        ({"per_example": torch.zeros(3, 2)}, "per_example must be"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ShapeError, match=message):
        head_map(**changes)


def test_versions_are_filled_in():
    versions = head_map().versions
    assert set(versions) == {"fastlens", "torch", "python"}
    assert versions["torch"] == torch.__version__
    assert versions["python"] == sys.version.split()[0]


def test_standard_error_is_that_of_the_mean():
    samples = torch.tensor([1.0, 2.0, 4.0])
    scores = Scores(samples.mean(), (), per_example=samples)
    # Sample variance 7/3, over three examples.
    assert_close_to(scores.standard_error, torch.tensor((7 / 9) ** 0.5), atol=1e-7)
    assert Scores(samples.mean(), (), per_example=samples[:1]).standard_error is None
    assert head_map().standard_error is None


# -- top and select ------------------------------------------------------------------------------


def test_top_is_ordered_by_distance_from_the_reference():
    top = head_map(reference=1.0).top(3)
    assert [cell.value for cell in top] == [-2.0, 0.0, 0.0]
    assert top[0] == Cell((0, 2), ("L0", "H2"), "L0H2", -2.0, -3.0, None)
    assert len(head_map().top(100)) == 6
    assert head_map().top(0) == []


def test_top_puts_nan_last_and_infinity_first():
    scores = Scores(torch.tensor([float("nan"), 1.0, -float("inf"), 0.0]), ("layer",))
    assert [cell.index for cell in scores.top(4)] == [(2,), (1,), (3,), (0,)]


def test_names_of_cells():
    assert token_map().top(1)[0].name == "L1 The:0"
    labels = {"kind": ["induction"], "layer": ["L3"], "head": ["H7"], "pos": [" of:9"]}
    scores = Scores(torch.ones(1, 1, 1, 1), ("kind", "layer", "head", "pos"), labels)
    assert scores.top(1)[0].name == "induction L3H7 ·of:9"


def test_select_by_index_label_and_slice():
    scores = full()
    one = scores.select(head="H2")
    assert one.axes == ("layer",)
    assert one.labels == {"layer": ["L0", "L1"]}
    assert_close_to(one.values, scores.values[:, 2])
    assert_close_to(one.per_example, scores.per_example[:, :, 2])
    assert (one.reference, one.baselines) == (scores.reference, scores.baselines)
    assert_close_to(scores.select(layer=-1).values, scores.values[1])
    part = scores.select(head=slice(1, 3), layer=0)
    assert part.labels == {"head": ["H1", "H2"]}
    assert_close_to(part.values, scores.values[0, 1:])
    assert scores.labels == HEADS, "selecting must not edit the original"


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ({"heads": 0}, "Nearest: 'head'"),
        ({"head": 3}, "length 3; got index 3"),
        ({"head": "H9"}, "no entry labelled 'H9'"),
    ],
)
def test_select_what_is_not_there(selectors, message):
    with pytest.raises(ShapeError, match=re.escape(message)):
        head_map().select(**selectors)


def test_select_by_an_ambiguous_label():
    with pytest.raises(ShapeError, match="several entries"):
        Scores(torch.zeros(2), ("pos",), {"pos": ["a", "a"]}).select(pos="a")


# -- showing -------------------------------------------------------------------------------------


def test_table():
    lines = head_map().table(2).splitlines()
    assert lines == [
        "a map (layer 2 x head 3, logits)",
        "layer  head  logits",
        "L0     H2        -2",
        "L1     H0         1",
    ]


def test_table_with_reference_and_errors():
    text = full().table(1)
    assert "clean 2, corrupted 0.5" in text
    assert "mean of 3 examples" in text
    assert "1 of its runs repeated one at a time, max difference 1e-07" in text
    assert re.search(r"layer +head +logits +change +\+-", text)
    assert re.search(r"L0 +H2 +-2 +-2\.5 +3\.464", text)


def test_table_shows_spaces_and_line_breaks_of_tokens():
    assert "·Tower\\n:1" in token_map().table(4)
    assert len(token_map().table(4).splitlines()) == 2 + 4


def test_repr_is_short_and_says_what_is_strongest():
    text = repr(full())
    assert "tensor" not in text
    assert "a map (layer 2 x head 3, logits)" in text
    assert "strongest: L0H2 -2, " in text
    assert len(text.splitlines()) <= 6
    assert repr(Scores(torch.tensor(1.5), ())).splitlines()[0] == "Scores (one number)"
    assert "empty" in repr(Scores(torch.zeros(0), ("layer",)))


def test_notebook_view_is_escaped():
    text = Scores(torch.ones(1, 1), ("layer", "pos"), {"pos": ["<b>:0"]})._repr_html_()
    assert "&lt;b&gt;" in text
    assert "<b>:0" not in text


def test_visible():
    assert visible(" a b\n\t") == "·a·b\\n\\t"
    assert visible("two words", "kind") == "two words"
    assert visible("a\n", "kind") == "a\\n"


# -- dataframes ----------------------------------------------------------------------------------


def test_to_dataframe():
    pandas = pytest.importorskip("pandas")
    frame = full().to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 6
    row = frame[(frame.layer == "L1") & (frame["head"] == "H0")].iloc[0]
    assert (row["layer_index"], row["head_index"], row["value"], row["change"]) == (1, 0, 1.0, 0.5)
    assert row["standard_error"] == pytest.approx(full().standard_error[1, 0].item())
    assert "standard_error" not in head_map().to_dataframe()


def test_to_dataframe_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="pip install pandas"):
        head_map().to_dataframe()


# -- files ---------------------------------------------------------------------------------------


def test_save_and_load_keep_everything(tmp_path):
    scores = full()
    assert scores.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    loaded = Scores.load(tmp_path / "new" / "folder")
    assert torch.equal(loaded.values, scores.values)
    assert torch.equal(loaded.per_example, scores.per_example)
    for name in "axes labels unit title reference baselines plan certificate meta versions".split():
        assert getattr(loaded, name) == getattr(scores, name), name
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == [JSON_NAME, TENSORS_NAME]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_strides_survive(tmp_path, dtype):
    values = torch.randn(3, 2).to(dtype).T
    Scores(values, ("layer", "pos")).save(tmp_path)
    loaded = Scores.load(tmp_path / JSON_NAME)
    assert loaded.values.dtype == dtype
    assert torch.equal(loaded.values, values)
    assert loaded.per_example is None


def test_tensors_in_meta_become_lists(tmp_path):
    head_map(meta={"ids": torch.tensor([1, 2]), "by": ("layer",), 3: torch.float32}).save(tmp_path)
    meta = Scores.load(tmp_path).meta
    assert meta == {"ids": [1, 2], "by": ["layer"], "3": "torch.float32"}


def test_saving_again_replaces(tmp_path):
    head_map(title="old").save(tmp_path)
    head_map(title="new").save(tmp_path)
    assert Scores.load(tmp_path).title == "new"


def test_a_reader_never_sees_half_a_file(tmp_path):
    scores = Scores(torch.randn(200, 200), ("layer", "pos"))
    scores.save(tmp_path)
    stop = threading.Event()
    sizes = set()

    def read():
        while not stop.is_set():
            sizes.add((tmp_path / TENSORS_NAME).stat().st_size)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        scores.save(tmp_path)
    stop.set()
    reader.join()
    assert sizes == {(tmp_path / TENSORS_NAME).stat().st_size}


def test_load_from_nowhere(tmp_path):
    with pytest.raises(SourceError, match=re.escape(str(tmp_path / "none" / JSON_NAME))):
        Scores.load(tmp_path / "none")


@pytest.mark.parametrize("size", [0, 1, 50, -1])
def test_a_torn_tensor_file_is_found(tmp_path, size):
    head_map().save(tmp_path)
    data = (tmp_path / TENSORS_NAME).read_bytes()
    (tmp_path / TENSORS_NAME).write_bytes(data[:size])
    with pytest.raises(SourceError, match=TENSORS_NAME):
        Scores.load(tmp_path)


def test_a_torn_json_file_is_found(tmp_path):
    head_map().save(tmp_path)
    text = (tmp_path / JSON_NAME).read_text()
    (tmp_path / JSON_NAME).write_text(text[: len(text) // 2])
    with pytest.raises(SourceError, match=f"{JSON_NAME} is torn"):
        Scores.load(tmp_path)


@pytest.mark.parametrize("content", ['{"a": 1}', "[1, 2]", "3"])
def test_a_foreign_json_file_is_refused(tmp_path, content):
    (tmp_path / JSON_NAME).write_text(content)
    with pytest.raises(SourceError, match=r"not written by Scores\.save"):
        Scores.load(tmp_path)


def test_a_missing_field_and_another_version_are_refused(tmp_path):
    head_map().save(tmp_path)
    record = json.loads((tmp_path / JSON_NAME).read_text())
    (tmp_path / JSON_NAME).write_text(json.dumps({**record, "axes": ["layer"]}))
    with pytest.raises(SourceError, match="does not fit"):
        Scores.load(tmp_path)
    (tmp_path / JSON_NAME).write_text(json.dumps({**record, "format_version": 99}))
    with pytest.raises(SourceError, match="format version 99"):
        Scores.load(tmp_path)


def test_files_of_two_saves_do_not_mix(tmp_path):
    head_map().save(tmp_path / "a")
    head_map(per_example=torch.zeros(1, 2, 3)).save(tmp_path / "b")
    (tmp_path / "b" / TENSORS_NAME).replace(tmp_path / "a" / TENSORS_NAME)
    with pytest.raises(SourceError, match="not the file"):
        Scores.load(tmp_path / "a")


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match=re.escape(str(tmp_path / "file" / "folder"))):
        writable_folder(tmp_path / "file" / "folder")
    with pytest.raises(SourceError, match="cannot write"):
        head_map().save(tmp_path / "file")
    assert list(writable_folder(tmp_path / "good").iterdir()) == []


def test_scores_stand_on_the_ground_floor():
    """Importing them loads neither what draws nor what tabulates."""
    code = "import sys, fastlens.scores; print(sorted(m.split('.')[0] for m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"'matplotlib'", "'pandas'"} & set(re.findall(r"'\w+'", out.stdout))
    assert "fastlens.plotting" not in out.stdout
