"""Scores: what they hold, show, select and write."""

import base64
import json
import re
import subprocess
import sys
import threading

import pytest
import torch

from fastlens.errors import MissingDependencyError, ShapeError, SourceError
from fastlens.scores import JSON_NAME, TENSORS_NAME, Cell, Scores, writable_folder
from tests.close import assert_close_to

HEADS = {"layer": ["L0", "L1"], "head": ["H0", "H1", "H2"]}


def head_map(**changes):
    values = changes.pop("values", torch.tensor([[0.0, 0.5, -2.0], [1.0, 0.25, 0.0]]))
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


def two_metrics(**changes):
    """Logits around -1, and nats around 3, of three examples on three heads."""
    values = torch.tensor([[-1.0, 1.0, -1.5], [3.0, 2.75, 13.0]])
    spread = torch.tensor([-0.5, 0.0, 0.5])[:, None, None]
    fields = {
        "axes": ("metric", "head"),
        "labels": {"metric": ["logit difference", "KL"], "head": ["H0", "H1", "H2"]},
        "title": "denoising z",
        "per_example": values + spread,
        "by_metric": {
            "logit difference": {
                "unit": "logits",
                "reference": -1.0,
                "baselines": {"clean": 2.0, "corrupted": -1.0},
            },
            "KL": {"unit": "nats", "title": "KL of z", "reference": 3.0},
        },
    }
    return Scores(values, **{**fields, **changes})


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


# -- intervals -------------------------------------------------------------------------------------


def test_interval_holds_the_mean_of_each_cell():
    per_example = torch.randn(20, 2, 3) + torch.arange(6.0).view(2, 3)
    scores = head_map(values=per_example.mean(0), per_example=per_example)
    low, high = scores.interval()
    assert low.shape == high.shape == (2, 3)
    assert low.dtype == scores.values.dtype
    assert bool(((low < scores.values) & (scores.values < high)).all())
    width = 2 * 1.96 * scores.standard_error
    assert bool((((high - low) / width - 1).abs() < 0.25).all())
    wider = scores.interval(0.99)
    assert bool(((wider[0] < low) & (high < wider[1])).all())
    again = scores.interval(seed=0)
    assert torch.equal(again[0], low)
    assert not torch.equal(scores.interval(seed=1)[0], low)


def test_the_interval_of_a_part_is_part_of_the_interval():
    """All cells share the examples drawn."""
    scores = Scores(torch.zeros(2, 3), ("layer", "head"), per_example=torch.randn(9, 2, 3))
    low, high = scores.interval()
    part = scores.select(layer=1).interval()
    assert_close_to(torch.stack(part), torch.stack([low[1], high[1]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_intervals_of_any_dtype(dtype):
    samples = torch.linspace(0, 1, 8, dtype=dtype, requires_grad=True)
    low, high = Scores(samples.mean(), (), per_example=samples).interval(method="percentile")
    assert low.dtype == high.dtype == dtype
    assert 0.2 < low < 0.45 < 0.55 < high < 0.8


def test_an_interval_needs_examples():
    with pytest.raises(ShapeError, match="these scores have none"):
        head_map().interval()
    with pytest.raises(ShapeError, match="these scores have 1 of them"):
        head_map(per_example=torch.zeros(1, 2, 3)).interval()


# -- several metrics -------------------------------------------------------------------------------


def test_a_metric_comes_with_its_own_unit_reference_and_baselines():
    scores = two_metrics()
    one = scores.select(metric="logit difference")
    assert (one.unit, one.reference) == ("logits", -1.0)
    assert one.baselines == {"clean": 2.0, "corrupted": -1.0}
    assert one.title == "denoising z, logit difference"
    assert (one.axes, one.by_metric) == (("head",), {})
    assert_close_to(one.per_example, scores.per_example[:, 0])
    other = scores.select(metric=-1, head="H2")
    assert (other.unit, other.title, other.reference) == ("nats", "KL of z", 3.0)
    assert other.baselines == {}
    assert set(scores.by_metric) == {"logit difference", "KL"}, "the original is left alone"


def test_parts_of_several_metrics_keep_what_is_theirs():
    scores = two_metrics()
    assert scores.select(head=0).by_metric == scores.by_metric
    last = scores.select(metric=slice(1, 2))
    assert list(last.by_metric) == ["KL"]
    assert last.select(metric=0).unit == "nats"


def test_what_a_metric_leaves_out_is_shared():
    scores = two_metrics(by_metric={"KL": {"unit": "nats"}}, unit="logits", reference=0.5)
    assert scores.select(metric="KL").reference == 0.5
    assert scores.select(metric="logit difference").unit == "logits"
    assert two_metrics(by_metric={}, title="").select(metric="KL").title == "KL"


@pytest.mark.parametrize(
    ("by_metric", "message"),
    [
        ({"KI": {}}, "by_metric names 'KI'.*Nearest: 'KL'"),
        ({"KL": {"units": "nats"}}, "holds 'units'.*Nearest: 'unit'"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(by_metric, message):
    with pytest.raises(ShapeError, match=message):
        two_metrics(by_metric=by_metric)


def test_metrics_need_an_axis_and_different_names():
    with pytest.raises(ShapeError, match="no entries"):
        head_map(by_metric={"KL": {}})
    twice = {"metric": ["KL", "KL"], "head": ["H0", "H1", "H2"]}
    with pytest.raises(ShapeError, match="stand there once"):
        two_metrics(labels=twice, by_metric={"KL": {}})


def test_top_never_compares_metrics():
    top = two_metrics().top(2)
    # By distance from zero, all of KL would come first.
    assert [(cell.name, cell.value, cell.change) for cell in top] == [
        ("logit difference H1", 1.0, 2.0),
        ("logit difference H2", -1.5, -0.5),
        ("KL H2", 13.0, 10.0),
        ("KL H1", 2.75, -0.25),
    ]
    assert top[2].index == (1, 2)
    assert top[2].labels == ("KL", "H2")
    assert top[2].standard_error == pytest.approx(0.5 / 3**0.5)
    turned = two_metrics()
    turned = Scores(turned.values.T, ("head", "metric"), turned.labels, by_metric=turned.by_metric)
    assert [cell.index for cell in turned.top(1)] == [(1, 0), (2, 1)]
    assert turned.top(1)[1].name == "H2 KL"


def test_the_table_of_several_metrics():
    scores = two_metrics(plan={"strategy": "wave", "runs": 3})
    assert scores.table(1).splitlines() == [
        "denoising z (metric 2 x head 3)",
        "mean of 3 examples",
        "3 runs, strategy: wave",
        "",
        "logit difference (logits)",
        "clean 2, corrupted -1",
        "head  logits  change      +-",
        "H1         1      +2  0.2887",
        "",
        "KL (nats)",
        "head  nats  change      +-",
        "H2      13     +10  0.2887",
    ]


def test_the_repr_of_several_metrics():
    assert repr(two_metrics(per_example=None)).splitlines() == [
        "denoising z (metric 2 x head 3)",
        "logit difference (logits)",
        "  clean 2, corrupted -1",
        "  strongest: H1 1, H2 -1.5, H0 -1",
        "KL (nats)",
        "  strongest: H2 13, H1 2.75, H0 3",
    ]


def test_each_metric_may_have_its_own_certificate():
    certificate = {"runs": 2, "max_difference": 1e-6}
    scores = two_metrics(by_metric={"KL": {"certificate": certificate}})
    assert scores.select(metric="KL").certificate == certificate
    assert scores.table().count("max difference 1e-06") == 1
    assert two_metrics(certificate=certificate).table().count("max difference") == 1


def test_one_number_per_metric():
    scores = two_metrics().select(head=1)
    assert scores.axes == ("metric",)
    assert [cell.name for cell in scores.top()] == ["logit difference", "KL"]
    assert "logit difference (logits)\nclean 2, corrupted -1\nlogits  change" in scores.table()
    assert "KL (nats)" in scores._repr_html_()


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


def test_facts_say_what_ran():
    assert "6 runs, strategy: stacked" in full().table()
    assert "strategy: wave" in repr(head_map(plan={"strategy": "wave"}))
    assert repr(head_map(plan={"runs": 3})).splitlines() == repr(head_map()).splitlines()


def test_explicit_runs():
    labels = {"run": ["L9H9 + L10H0", "all MLPs"]}
    scores = Scores(torch.tensor([1.0, -3.0]), ("run",), labels)
    assert scores.top(1)[0].name == "all MLPs"
    assert scores.table().splitlines()[1:] == [
        "run           value",
        "all MLPs         -3",
        "L9H9 + L10H0      1",
    ]


@pytest.mark.parametrize(
    "broken",
    [
        {"axes": ("layer",)},
        {"labels": {}},
        {"values": None},
        {"baselines": {"clean": "high"}},
        {"certificate": {"max_difference": [1]}},
        {"plan": {"strategy": 3, "runs": "many"}},
    ],
)
def test_a_repr_never_raises(broken):
    scores = head_map()
    for name, value in broken.items():
        setattr(scores, name, value)
    assert isinstance(repr(scores), str)
    assert isinstance(scores._repr_html_(), str)


def test_scores_with_gradients_are_shown():
    scores = head_map(values=torch.ones(2, 3, requires_grad=True))
    assert "strongest: L0H0 1" in repr(scores)
    assert len(scores.table(2).splitlines()) == 4


# -- notebooks -------------------------------------------------------------------------------------


def pictures(text):
    return re.findall(r'<img [^>]*src="data:image/png;base64,([^"]+)"', text)


def test_the_notebook_view_holds_a_picture():
    pytest.importorskip("matplotlib")
    text = full()._repr_html_()
    [data] = pictures(text)
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert 'alt="a map (layer 2 x head 3, logits)"' in text
    for fact in ("clean 2, corrupted 0.5", "6 runs, strategy: stacked", "max difference 1e-07"):
        assert fact in text
    assert '<td style="text-align:left">H2</td>' in text
    assert "<script" not in text
    assert "http" not in text


def test_the_notebook_view_of_several_metrics():
    pytest.importorskip("matplotlib")
    text = two_metrics()._repr_html_()
    assert len(pictures(text)) == 1
    assert text.count("<table>") == 2
    caption = "strongest cells: logit difference (logits); clean 2, corrupted -1"
    assert f"<caption>{caption}</caption>" in text


def test_what_is_no_picture_is_a_table(monkeypatch):
    shapes = {(2, 2, 2, 2): "abcd", (0,): "a", (): "", (200, 101): "ab"}
    for shape, axes in shapes.items():
        text = Scores(torch.zeros(shape), tuple(axes))._repr_html_()
        assert not pictures(text), shape
        assert "<table>" in text
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not pictures(full()._repr_html_())
    assert "H2" in full()._repr_html_()


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


def test_to_dataframe_with_intervals():
    pytest.importorskip("pandas")
    frame = full().to_dataframe(interval=0.9)
    low, high = full().interval(0.9)
    assert frame["low"].tolist() == low.flatten().tolist()
    assert frame["high"].tolist() == high.flatten().tolist()
    assert not {"low", "high"} & set(full().to_dataframe())
    with pytest.raises(ShapeError, match="at least two examples"):
        head_map().to_dataframe(interval=0.95)


def test_to_dataframe_of_several_metrics():
    pytest.importorskip("pandas")
    frame = two_metrics().to_dataframe()
    assert frame["unit"].tolist() == ["logits"] * 3 + ["nats"] * 3
    assert frame["change"].tolist() == [0.0, 2.0, -0.5, 0.0, -0.25, 10.0]
    assert "unit" not in full().to_dataframe()


def test_to_dataframe_of_bfloat16():
    pytest.importorskip("pandas")
    frame = Scores(torch.tensor([1.5], dtype=torch.bfloat16), ("layer",)).to_dataframe()
    assert frame["value"].tolist() == [1.5]


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


def test_several_metrics_are_kept(tmp_path):
    scores = two_metrics()
    scores.save(tmp_path)
    loaded = Scores.load(tmp_path)
    assert loaded.by_metric == scores.by_metric
    assert loaded.select(metric="KL").table() == scores.select(metric="KL").table()


def test_files_without_metrics_are_read(tmp_path):
    """As they were written before there could be several."""
    full().save(tmp_path)
    record = json.loads((tmp_path / JSON_NAME).read_text())
    del record["by_metric"]
    (tmp_path / JSON_NAME).write_text(json.dumps(record))
    loaded = Scores.load(tmp_path)
    assert loaded.by_metric == {}
    assert loaded.table() == full().table()
    for wrong in ({"KL": {}}, [1], {"KL": 3}):
        (tmp_path / JSON_NAME).write_text(json.dumps({**record, "by_metric": wrong}))
        with pytest.raises(SourceError, match="does not fit"):
            Scores.load(tmp_path)


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
