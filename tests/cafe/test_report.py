"""The report: what is on the page, that nothing on it asks for the outside or runs, and that its figures show what they say."""

import re
import sys
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
import torch

from cafe import cli, plots
from cafe.checkpoint import load_checkpoint, save_checkpoint
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.evaluation import Evaluation, compare
from cafe.experiment import read_experiment, run_experiment
from cafe.models import build
from cafe.report import PAGE, write_report
from cafe.train import fit
from cafe_kernels import DistanceMaskedAttention

from .conftest import shop

HOSTILE = '<script>alert("x")</script>&$_{'
EXPERIMENT = f"""
baseline = "SASRec $x_1$"
seeds = 2
[common]
dim = 8
max_len = 8
epochs = 2
[systems."SASRec $x_1$"]
model = "sasrec"
[systems.PopRec]
model = "poprec"
[systems.'{HOSTILE}']
model = "cafe"
"""


def hostile_shop(k: int) -> Dataset:
    """Every intent and item has a name that would be markup; `k` as the data's minimum item count."""
    made = shop(items=90, intents=3, seed=k)
    ids = [
        pl.Series([f"{HOSTILE}{i}" for i in range(len(ids))]) for ids in (made.user_ids, made.item_ids, made.intent_ids)
    ]
    return Dataset(made.sequences, made.item_intent, *ids, {"options": {"min_item_count": k}, "note": HOSTILE})


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """The same systems trained on two datasets."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "e.toml").write_text(EXPERIMENT)
    experiment = read_experiment(folder / "e.toml")
    for k in (5, 1):
        hostile_shop(k).save(folder / f"data-k{k}")
        run_experiment(replace(experiment, seeds=2 if k == 1 else 1), folder / f"data-k{k}", folder / f"k{k}")
    return folder


@pytest.fixture(scope="module")
def report(experiments):
    out = experiments / "out"
    notes = write_report([experiments / "k5", experiments / "k1"], out)
    return (out / PAGE).read_text(), out, notes


class Read(HTMLParser):
    """Tags, attributes, and the text of the page's tables by caption."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.resources, self.tables, self.open, self.style = [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.resources += [
            attributes[name] for name in ("src", "href", "srcset", "data", "action") if name in attributes
        ]
        assert not any(name.startswith("on") for name in attributes)
        if tag == "table":
            self.tables.append("")
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # well-formed: nothing a name holds closed or opened an element

    def handle_data(self, data):
        if "table" in self.open:
            self.tables[-1] += data + "\t"
        if "style" in self.open:
            self.style += data


def test_page_asks_for_nothing_and_runs_nothing(report):
    page = Read(report[0])
    assert not page.open
    assert "script" not in page.tags
    assert page.tags.count("img") > 15
    assert all(resource.startswith(("data:", "#")) for resource in page.resources)
    assert not re.search(r"url\(|@import|http", page.style)
    assert (
        f"{len(re.findall('<img ', report[0]))}" == f"{len(re.findall('<img src=.data:image/png;base64,', report[0]))}"
    )
    assert HOSTILE not in report[0]


def test_page_has_every_table_and_figure(report):
    text, out, notes = report
    captions = [table.split("\t")[0] for table in Read(text).tables]
    for data in ("data-k1", "data-k5"):
        assert f"Ranking: {data}" in text
    for protocol in ("aligned", "full", "authors: an artefact, no measure of quality"):
        assert captions.count(protocol) == 2
    assert (
        captions.index("aligned")
        < captions.index("full")
        < captions.index("authors: an artefact, no measure of quality")
    )
    for by in ("times the answer is in training", "items in the history"):
        for protocol in ("aligned", "full"):
            assert captions.count(f"NDCG@10 by {by}, {protocol}") == 2
    assert "Of the machine that wrote this page" in captions
    kinds = {path.name.rsplit("-", 1)[0] for path in out.glob("*.png")}
    assert kinds == {
        "ranking", "train-frequency", "history-length", "sparsity", "attention", "embeddings", "theta", "curves"
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    assert not list(out.glob(".*"))
    assert notes == []
    assert torch.__version__ in text


def test_tables_average_seeds_and_pair_users(report, experiments):
    table = next(table for table in Read(report[0]).tables if table.startswith("full\t"))
    rows = [line.split("\t") for line in re.split(r"(?=SASRec \$x_1\$|PopRec|<script>)", table)[1:]]
    seeds, base = (
        [Evaluation.load(experiments / "k1" / f"{system}-{seed}" / "test-full.npz") for seed in range(2)]
        for system in ("script-alert-x-script-_", "sasrec-x_1")
    )
    joint = next(row for row in rows if row[0] == HOSTILE and row[1].startswith("joint score"))
    assert joint[1].endswith("2 seeds")
    assert joint[2] == f"{np.mean([one.mean('ndcg@5') for one in seeds]):.4f}"
    assert joint[10] == f"{compare(seeds, base, 'ndcg@5')['ratio'] - 1:+.1%}"
    assert len(rows) == 4  # SASRec, PopRec, CAFE's two scores


def test_folders_of_runs_without_an_experiment(experiments, tmp_path, dataset):
    """Seeds are found by the folders' names; a twin, an unfinished run and what a small shop cannot show are named."""
    dataset.save(tmp_path / "data")
    small = {"dim": 8, "max_len": 8, "epochs": 1}
    for seed in (0, 1):
        fit(
            Config.make("sasrec", seed=seed, **small),
            dataset,
            tmp_path / "runs" / f"mine-{seed}",
            data=tmp_path / "data",
        )
    fit(Config.make("sasrec", seed=1, **small), dataset, tmp_path / "runs" / "twin", data=tmp_path / "data")
    (tmp_path / "runs" / "twin-1").mkdir()
    (tmp_path / "runs" / "twin-1" / "config.json").write_bytes(
        (tmp_path / "runs" / "mine-1" / "config.json").read_bytes()
    )
    notes = write_report([tmp_path / "runs"], tmp_path / "out", protocols=["full"])
    assert [note.split(" is left out")[0].split("/")[-1] for note in notes] == [
        "twin", "twin-1", "Figure 4", "The map of embeddings of mine, data", "The theta curves"
    ]  # fmt: skip
    assert "three intents of 20 items" in notes[3]
    text = (tmp_path / "out" / PAGE).read_text()
    assert "2 seeds" in text
    assert all(escape(note) in text for note in notes)
    (tmp_path / "out" / PAGE).write_text(text.replace("2 seeds", "2 seeds, old"))
    write_report([tmp_path / "runs" / "mine-0"], tmp_path / "out", protocols=["full"], split="valid")
    assert "2 seeds" not in (tmp_path / "out" / PAGE).read_text()
    assert (tmp_path / "runs" / "mine-0" / "valid-full.npz").exists()


def test_figure_4_has_its_experiment():
    experiment = read_experiment("figure4")
    assert list(experiment.systems) == ["BERT4Rec", "CAFE"]
    assert experiment.baseline == "BERT4Rec"


def test_without_scikit_learn_the_map_is_left_out(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ValueError, match=r"cafe-kernels\[report\]"):
        plots.embed_items(None, dataset)


def test_embeddings_are_of_the_most_and_least_frequent_items():
    made = hostile_shop(1)
    net = build(Config.make("sasrec", dim=8), made)
    with torch.no_grad():  # the frequent half of each intent is learned, the rare one is not
        frequent = made.train_counts() > np.median(made.train_counts())
        learned = torch.eye(8)[torch.from_numpy(made.item_intent).long()] + 0.05 * torch.randn(made.num_items, 8)
        net.item_embedding.copy_(torch.where(torch.from_numpy(frequent)[:, None], learned, torch.randn_like(learned)))
    points = plots.embed_items(net, made, most=10)
    assert len(points.items) == 60
    counts = made.train_counts()
    for intent in range(3):
        of = np.sort(counts[made.item_intent == intent])
        who = points.intent == intent
        assert np.sort(counts[points.items[who & points.frequent]]).tolist() == of[-10:].tolist()
        assert np.sort(counts[points.items[who & ~points.frequent]]).tolist() == of[:10].tolist()
    rare, known = points.silhouette
    assert known > 0.8 > 0.3 > rare


@pytest.mark.parametrize("model", ["sasrec", "bert4rec", "cafe"])
def test_attention_map_is_the_mean_of_the_modules_weights(dataset, model):
    torch.manual_seed(0)
    net = build(Config.make(model, dim=8, max_len=6, layers=1), dataset).eval()
    attention, histories = net.item_encoder.blocks[0].attention, dataset.holdout("test").histories
    seen, rows = [], []
    packed = DistanceMaskedAttention.packed
    try:
        DistanceMaskedAttention.packed = lambda self, x, *a, **k: (seen.append((self, x)), packed(self, x, *a, **k))[1]
        for row in range(len(histories)):  # one by one, by the module's own padded call
            items = torch.from_numpy(histories[row][-6:]).long()
            with torch.no_grad():
                net.states(items, torch.tensor([0, len(items)], dtype=torch.int32))
            x = next(x for module, x in reversed(seen) if module is attention)
            rows.append(
                attention(x[:, None], x[:, None], x[:, None], is_causal=attention.causal)[1][0].detach().numpy()
            )
    finally:
        DistanceMaskedAttention.packed = packed
    found = plots.mean_attention(net, histories, steps=8, batch_size=7)
    assert "packed" not in vars(attention)
    for i in range(8):
        those = [np.pad(weights[i], (0, 8 - len(weights))) for weights in rows if len(weights) > i]
        if those:
            np.testing.assert_allclose(found[i], np.mean(those, axis=0), atol=1e-5)
        else:
            assert np.isnan(found[i]).all()


def test_theta_of_both_sides_is_drawn_by_its_distance():
    curve = torch.arange(-4.0, 5)[None].abs()
    figure, axes = plots.panel()
    plots.draw_theta(axes, curve, np.array([3, 3, 2]), causal=False)
    line = axes.lines[-1]
    assert line.get_xdata().tolist() == [-2, -1, 0, 1, 2]
    assert line.get_ydata().tolist() == [2, 1, 0, 1, 2]
    plots.draw_theta(plots.panel()[1], torch.zeros(2, 4), np.array([4, 1]))
    assert plots.png(figure).startswith(b"\x89PNG")


def call(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cafe", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr()


def test_wrong_input_is_told(experiments, tmp_path, monkeypatch, capsys):
    def refused(*arguments, code=1):
        found, captured = call(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert found == code
        return " ".join(captured.err.split())

    k1, out = experiments / "k1", tmp_path / "out"
    assert "nowhere is not a run" in refused("--runs", "nowhere", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "is no run and holds none" in refused("--runs", tmp_path / "empty", "--out", out)
    assert "has the systems SASRec $x_1$, PopRec" in refused("--runs", k1, "--out", out, "--baseline", "Nobody")
    assert "protocol" in refused("--runs", k1, "--out", out, "--protocol", "fair")
    assert "split" in refused("--runs", k1, "--out", out, "--split", "tests")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused("--runs", k1, "--out", tmp_path / "file")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / PAGE).write_text("mine")
    assert "holds a page or a run that is no report" in refused("--runs", k1, "--out", tmp_path / "site")
    assert "holds a page or a run that is no report" in refused("--runs", k1, "--out", k1 / "poprec-0")
    assert (tmp_path / "site" / PAGE).read_text() == "mine"
    (tmp_path / "experiment.json").write_text("[")
    assert "experiment.json is damaged" in refused("--runs", tmp_path, "--out", out)
    assert "--runs" in refused("--out", out, code=2)
    monkeypatch.setattr("cafe.report.ranked", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "no report was written" in refused("--runs", k1, "--out", out, code=130)
    assert not out.exists()


def test_command_takes_many_runs(experiments, tmp_path, monkeypatch, capsys):
    runs = [experiments / "k1" / "poprec-0", experiments / "k1" / "poprec-1"]
    arguments = ["--runs", *runs, "--out", tmp_path / "out", "--protocol", "full", "--json"]
    code, captured = call(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "2 seeds" in (tmp_path / "out" / PAGE).read_text()
    assert '"The attention map is left out: no run has attention"' in captured.out
    for name in ("theta-1.png", "mine.png"):
        (tmp_path / "out" / name).write_bytes(b"old")
    assert call(*arguments, monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    assert not (tmp_path / "out" / "theta-1.png").exists()  # of a report before this one
    assert (tmp_path / "out" / "mine.png").exists()


def test_an_unfinished_run_is_said_to_be(dataset, tmp_path):
    options = {"dim": 8, "heads": 2, "max_len": 8, "epochs": 2, "local": "initial"}
    dataset.save(tmp_path / "data")
    for model in ("lockerf", "sasrec"):
        fit(Config.make(model, **options), dataset, tmp_path / model, data=tmp_path / "data")
    write_report([tmp_path / "lockerf"], tmp_path / "out", protocols=["full"])
    assert (tmp_path / "out" / "theta-1.png").exists()
    tensors, state = load_checkpoint(tmp_path / "sasrec" / "last.safetensors")
    save_checkpoint(tmp_path / "sasrec" / "last.safetensors", tensors, state | {"done": False})
    with pytest.warns(UserWarning, match="not finished"):
        notes = write_report([tmp_path / "sasrec"], tmp_path / "out", protocols=["full"])
    assert any(note.endswith("is not finished: what is shown is its best model so far") for note in notes)


def test_another_dataset_is_refused(dataset, other_dataset, tmp_path):
    dataset.save(tmp_path / "data")
    fit(Config.make("poprec"), dataset, tmp_path / "run", data=tmp_path / "data")
    other_dataset.save(tmp_path / "data")
    with pytest.raises(ValueError, match="trained on another dataset"):
        write_report([tmp_path / "run"], tmp_path / "out")
    dataset.save(tmp_path / "elsewhere")
    write_report([tmp_path / "run"], tmp_path / "out", data=[tmp_path / "elsewhere"], protocols=["full"])
    assert "Ranking: elsewhere" in (tmp_path / "out" / PAGE).read_text()
