"""What `cafe export` writes scores and ranks as the model itself does."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch

from cafe import cli
from cafe import export as module
from cafe.config import Config
from cafe.export import UserTower, export
from cafe.models import MODELS, build
from cafe.recommend import Recommender
from cafe.serve import ExportedModel
from cafe.train import fit

MAX_LEN = 8
CLOSE = {"rtol": 0, "atol": 1e-5}
EXPORTABLE = sorted(MODELS.keys() - {"poprec", "ssept"})
TINY = {"dim": 16, "max_len": MAX_LEN, "epochs": 2, "batch_size": 32, "lr": 0.01}


@pytest.fixture(scope="module", params=[("sasrec", "paper"), ("sasrec", "best"), ("cafe", "paper"), ("cafe", "best")])
def exported(request, dataset, tmp_path_factory):
    """A trained model, and the folder that was written of it."""
    folder = tmp_path_factory.mktemp("-".join(request.param))
    model = fit(Config.make(*request.param, **TINY), dataset, folder / "run")
    if (
        model.config.calibrate
    ):  # so tiny a shop may fit weights of 0 or 1, with which much of the formula would not be seen
        model.intent_weight[0] = 0.7
        model.prior_weight.fill_(0.3)
    meta = export(model, dataset, folder / "serving")
    return model, folder / "serving", meta


def histories(dataset, users=40):
    """Histories of item numbers, of one item up to more than the model reads."""
    rows = [dataset.sequences[user].tolist() for user in range(users)]
    assert min(map(len, rows)) < MAX_LEN < max(map(len, rows))
    return [*rows, rows[0][:1]]


def packed(rows):
    newest = [row[-MAX_LEN:] for row in rows]
    return torch.tensor(np.concatenate(newest)), torch.tensor([0, *np.cumsum([len(row) for row in newest])]).int()


@torch.no_grad()
def scores_of(model, rows):
    """The joint scores of the whole catalog, as the model has them."""
    item, intent = model.score(*packed(rows))
    return model.join(item, None if intent is None else intent[:, model.item_intent]).numpy()


def test_scores_are_the_models(exported, dataset):
    model, folder, _ = exported
    served, rows = ExportedModel(folder), histories(dataset)
    want = scores_of(model, rows)
    assert want.std(axis=1).min() > 0.01
    np.testing.assert_allclose(served.scores(served.outputs(rows)), want, **CLOSE)
    alone = [served.scores(served.outputs([row]))[0] for row in rows[:6]]  # other batches, other lengths
    np.testing.assert_allclose(alone, want[:6], **CLOSE)


def test_the_ten_best_are_the_recommenders(exported, dataset):
    model, folder, _ = exported
    served, rows = ExportedModel(folder), histories(dataset)
    ids = [[dataset.item_ids[item] for item in row] for row in rows]
    for history, want in zip(ids, Recommender(model, dataset).recommend(ids, k=10), strict=True):
        items, intents, scores = zip(*served.recommend(history, k=10), strict=True)
        assert list(items) == want.items
        assert list(intents) == want.intents
        np.testing.assert_allclose(scores, want.scores, rtol=1e-5, atol=2e-5)


def test_intents_are_the_recommenders(exported, dataset):
    model, folder, meta = exported
    if model.config.model != "cafe":
        assert meta["outputs"] == ["query"]
        assert not (folder / "intents.npy").exists()
        return
    served, rows = ExportedModel(folder), histories(dataset, 20)
    logits = served.outputs(rows)["intent_query"] @ np.load(folder / "intents.npy").T
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = pl.read_parquet(folder / "intents.parquet")["intent"]
    ids = [[dataset.item_ids[item] for item in row] for row in rows]
    for row, want in zip(shares, Recommender(model, dataset).recommend(ids, k=1), strict=True):
        top = np.argsort(-row)[:3]
        assert [names[int(intent)] for intent in top] == [intent for intent, _ in want.top_intents]
        np.testing.assert_allclose(row[top], [share for _, share in want.top_intents], atol=1e-4)


def test_tables_have_the_ids_and_the_vectors(exported, dataset):
    _, folder, meta = exported
    table = pl.read_parquet(folder / "items.parquet")
    assert table.columns == ["item", "intent", "intent_number", "vector"]
    assert table["item"].equals(dataset.item_ids.alias("item"))
    assert table["intent_number"].to_list() == dataset.item_intent.tolist()
    assert table["intent"].to_list() == [dataset.intent_ids[int(c)] for c in dataset.item_intent]
    vectors = np.load(folder / "items.npy")
    assert vectors.dtype == np.float32
    assert list(vectors.shape) == meta["shapes"]["items"]
    np.testing.assert_array_equal(table["vector"].to_numpy(), vectors)
    assert json.loads((folder / "export.json").read_text()).items() >= meta.items()


def test_a_history_without_items_is_no_number(exported, dataset):
    model, folder, _ = exported
    served, rows = ExportedModel(folder), histories(dataset, 20)[:2]
    both = served.session.run(None, {"items": np.array([[-1] * 5, [-1] * 2 + rows[0][:3]])})
    alone, empty, none = served.outputs([rows[0][:3]]), served.outputs([[]]), served.outputs([])
    for name, got in zip(alone, both, strict=True):
        assert np.isnan(got[0]).all()
        np.testing.assert_allclose(got[1], alone[name][0], **CLOSE)
        np.testing.assert_array_equal(empty[name], got[:1])
        assert none[name].shape == (0, *got.shape[1:])
    with pytest.raises(ValueError, match="popular"):
        served.recommend(["what"])
    for k in (0, -1, 2.5, "3", True):
        for refused in (served.recommend, Recommender(model, dataset).recommend):
            with pytest.raises(ValueError, match=f"k={k!r}: expected a whole number, at least 1"):
                refused([], k=k)


def run_serve(folder, *arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [sys.executable, "serve.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_written_program_runs_alone(exported, dataset):
    model, folder, _ = exported
    history = [dataset.item_ids[item] for item in dataset.sequences[0].tolist()]
    done = run_serve(folder, ", ".join([*history, "what"]))
    printed = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert printed == Recommender(model, dataset).recommend([history], k=10)[0].items


def test_mistakes_of_the_written_program_are_one_line(dataset, tmp_path):
    numbered = replace(dataset, item_ids=pl.Series(range(dataset.num_items)))
    export(untrained(numbered, "sasrec", dim=8, layers=1), numbered, tmp_path / "out")
    assert run_serve(tmp_path / "out", "1, x,2").stdout.count("\n") == 10
    for arguments, said in (
        ((), "usage: python serve.py ITEM,ITEM,..."),
        (("1", "2"), "usage: "),
        (("--help",), "usage: "),
        (("x",), "error: none of the items ['x'] is known"),
        (("",), "error: none of the items [''] is known"),
    ):
        done = run_serve(tmp_path / "out", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
        assert done.stderr.startswith(said)
    (tmp_path / "without/onnxruntime").mkdir(parents=True)
    hidden = "raise ModuleNotFoundError(name='onnxruntime')"
    (tmp_path / "without/onnxruntime/__init__.py").write_text(hidden)
    done = run_serve(tmp_path / "out", "1", PYTHONPATH=str(tmp_path / "without"))
    assert 'serving needs onnxruntime: pip install numpy onnxruntime polars, or "cafe-kernels[export]"' in done.stderr


def untrained(dataset, name, preset="paper", **choice):
    torch.manual_seed(0)
    options = {"dim": 16, "heads": 2, "max_len": MAX_LEN, "init_std": 0.5} | choice
    model = build(Config.make(name, preset, **options), dataset).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("distance_weight"):
            torch.nn.init.normal_(parameter)
    model.intent_weight[0] = 0.7
    model.prior_weight.fill_(0.3)
    return model


@pytest.mark.parametrize("choice", [{}, {"mask_reads": "values", "block": "query_norm", "qk_positions": True}])
@pytest.mark.parametrize("name", EXPORTABLE)
def test_towers_of_all_models(dataset, name, choice):
    model, rows = untrained(dataset, name, **choice), histories(dataset)
    longest = max(map(len, rows))
    padded = torch.tensor([[-1] * (longest - len(row)) + row for row in rows])
    with torch.no_grad():
        found, want = UserTower(model)(padded), model.states(*packed(rows))
    np.testing.assert_allclose(found[0], want[0], **CLOSE)
    if name == "cafe":
        np.testing.assert_allclose(found[1], want[1], **CLOSE)


@pytest.mark.parametrize("name", EXPORTABLE)
def test_the_written_model_reads_rows_of_any_length(dataset, tmp_path, name):
    """The ONNX itself, without what serve.py cuts off before."""
    model, rng = untrained(dataset, name, dim=8, layers=1), np.random.default_rng(0)
    tower = UserTower(model).eval()
    tower.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for length in (1, MAX_LEN - 1, MAX_LEN, MAX_LEN + 1, 3 * MAX_LEN):
        for batch in (1, 3):
            rows = rng.integers(0, dataset.num_items, (batch, length))
            rows[-1, : length // 2] = -1
            read = [row[row >= 0].tolist() for row in rows]
            with torch.no_grad():
                want = model.states(*packed(read))
            found = dict(zip(tower.outputs, session.run(None, {"items": rows}), strict=True))
            query = want[0].numpy()
            np.testing.assert_allclose(found["query"][:, : query.shape[1]], query, **CLOSE)
            if name == "cafe":
                np.testing.assert_allclose(found["intent_query"], want[1], **CLOSE)


def test_a_model_of_one_token_reads_the_hidden_item(dataset):
    model = untrained(dataset, "bert4rec", max_len=1)
    with torch.no_grad():
        (query,), (want, _) = UserTower(model)(torch.tensor([[1, 2]])), model.states(*packed([[1, 2]]))
    np.testing.assert_allclose(query, want, **CLOSE)


def test_long_histories_are_read_as_the_recommender_does(dataset, tmp_path):
    model = untrained(dataset, "bert4rec", dim=8, layers=1)
    assert export(model, dataset, tmp_path / "out")["max_len"] == MAX_LEN - 1
    served, ids = ExportedModel(tmp_path / "out"), dataset.item_ids.to_list()
    histories = [ids[start : start + length] for start in (0, 20) for length in (MAX_LEN, MAX_LEN + 1, 3 * MAX_LEN)]
    for history, want in zip(histories, Recommender(model, dataset).recommend(histories, k=10), strict=True):
        items, _, scores = zip(*served.recommend(history, k=10), strict=True)
        assert list(items) == want.items
        np.testing.assert_allclose(scores, want.scores, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "choice",
    [
        {"join": "sum"},
        {"join": "item"},
        {"join": "item", "calibrate": True, "cosine": 8.0},
        {"join": "log_sigmoid", "calibrate": True},
        {"join": "log_softmax", "compose_items": True, "shrinkage": 2.0},
    ],
)
def test_every_joint_score_has_a_formula(dataset, choice):
    model, rows = untrained(dataset, "cafe", **choice), histories(dataset)
    tower = UserTower(model)
    served = ExportedModel.__new__(ExportedModel)
    served.meta = {"score_kind": tower.kind, "intent_weight": tower.intent_weight}
    served.items, served.item_intent = tower.item_vectors(), dataset.item_intent
    served.intents = model.intent_embedding.detach().numpy()
    longest = max(map(len, rows))
    with torch.no_grad():
        found = tower(torch.tensor([[-1] * (longest - len(row)) + row for row in rows]))
    outputs = dict(zip(tower.outputs, (x.numpy() for x in found), strict=True))
    np.testing.assert_allclose(served.scores(outputs), scores_of(model, rows), **CLOSE)


@pytest.mark.parametrize(("name", "message"), [("poprec", "no user tower"), ("ssept", "who the user is")])
def test_models_that_cannot_be_exported(dataset, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        export(untrained(dataset, name), dataset, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(dataset, tmp_path):
    (tmp_path / "notes").write_text("mine")
    for out in (tmp_path, tmp_path / "notes"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            export(untrained(dataset, "sasrec"), dataset, out)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_missing_packages_are_named(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx and onnxscript: pip install .cafe-kernels\[export\]"):
        export(untrained(dataset, "sasrec"), dataset, tmp_path / "out")


def test_places_that_cannot_be_written(dataset, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write .*/file/out: Not a directory; choose another"):
        export(untrained(dataset, "sasrec"), dataset, tmp_path / "file/out")
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(FileExistsError, match="/link is a link to target, which is not there: remove it"):
        export(untrained(dataset, "sasrec"), dataset, tmp_path / "link")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


@pytest.mark.parametrize(("module", "extra"), [("export", "export"), ("adapter", "pandas")])
def test_without_polars_the_extra_is_named(module, extra):
    program = f"import sys; sys.modules['polars'] = None; import cafe.{module}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.endswith(f'cafe.{module} needs polars: pip install "cafe-kernels[{extra}]"\n')


def test_a_full_disk_leaves_nothing(dataset, tmp_path, monkeypatch):
    def full(path, array):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(UserTower, "save", lambda self, path: path.write_bytes(b"model"))
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*out: No space left"):
        export(untrained(dataset, "sasrec"), dataset, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command(dataset, tmp_path, monkeypatch, capsys):
    dataset.save(tmp_path / "data")
    fit(Config.make("poprec"), dataset, tmp_path / "poprec", data=tmp_path / "data")
    fit(Config.make("sasrec", **TINY | {"epochs": 1}), dataset, tmp_path / "run", data=tmp_path / "data")
    monkeypatch.setattr(UserTower, "save", lambda self, path: path.write_bytes(b"model"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cafe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    code, printed = call("export", "--run", tmp_path / "run", "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(printed.out)["score"] == "query . items[v]"
    names = {"model.onnx", "items.npy", "items.parquet", "export.json", "serve.py"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    code, printed = call("export", "--run", tmp_path / "run", "--out", tmp_path / "out")
    assert (code, printed.err.count("\n")) == (1, 1)
    assert "not an empty folder" in printed.err
    assert call("export", "--run", tmp_path / "poprec", "--out", tmp_path / "p")[0] == 1
