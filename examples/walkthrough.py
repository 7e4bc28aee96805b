# %% [markdown]
# # A walkthrough with figures
#
# A shop is simulated, three small models are trained on it, and one looks at what they learned. This page is the script
# `examples/walkthrough.py`: it runs from top to bottom in about a minute of one CPU core (`python examples/walkthrough.py`), and
# an editor that knows `# %%` cells runs it like a notebook. The figures and numbers shown are those of one run, kept in
# `docs/walkthrough/`. The shop's structure was planted, so the gains say that things work, not what your data will give.

# %%
import os
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.data.prepare import prepare
from cafe.data.simulate import simulate
from cafe.evaluate import evaluate
from cafe.plots import learned_masks
from cafe.recommend import Recommender
from cafe.train import fit

FOLDER = Path(os.environ.get("WALKTHROUGH_FOLDER", "walkthrough"))  # the data, the runs and the figures
QUICK = "WALKTHROUGH_QUICK" in os.environ  # for a test: it runs, and learns next to nothing
plt.rcParams |= {"figure.figsize": (6.4, 3.2), "figure.constrained_layout.use": True, "savefig.dpi": 130}

# %% [markdown]
# ## The data
#
# Most items of the shop are seen a handful of times, as in a large catalog. 80 intents, such as *camping tools*, cover 7,000
# items; a user stays in an intent for a while and then goes on to a related one.

# %%
files = simulate("demo", FOLDER / "files")
dataset: Dataset = prepare(files["interactions"], files["items"], FOLDER / "data")
print({name: round(value, 4) for name, value in dataset.stats().items()})

seen = dataset.train_counts()
figure, (left, right) = plt.subplots(1, 2)
left.bar(*np.unique(seen.clip(max=20), return_counts=True), color="tab:gray")
left.set(xlabel="times in training (20: or more)", ylabel="items")
right.bar(*np.unique(dataset.sequences.lengths.clip(max=40), return_counts=True), color="tab:gray")
right.set(xlabel="length of a history (40: or more)", ylabel="users")
figure.savefig(FOLDER / "data.png")

# %% [markdown]
# ## Three models
#
# SASRec as in its paper; SASRec with what `best` has and SASRec can have, too: a softmax over more negatives, an item composed of
# itself and its intent, cosine scores; and CAFE `best`, which adds an encoder of intents, a mask by distance and the joint
# score. All are made small. `fit` keeps a run folder; its `progress` tells the validation of each epoch.

# %%
SMALL = {"dim": 32, "negatives": 256, "epochs": 20}
SYSTEMS = {
    "SASRec": Config.make("sasrec", "paper", dim=64, epochs=60),
    "SASRec, composed": Config.make("sasrec", "best", compose_items=True, cosine=10, shrinkage=0.5, **SMALL),
    "CAFE": Config.make("cafe", "best", **SMALL),
}
models, curves = {}, {}
for name, config in SYSTEMS.items():
    config = replace(config, valid_users=100 if QUICK else 1000, epochs=1 if QUICK else config.epochs)
    curve = curves[name] = []

    def progress(event, curve=curve):
        if "valid" in event:
            curve.append(event["valid"]["ndcg@10"])

    models[name] = fit(config, dataset, FOLDER / "runs" / name, data=FOLDER / "data", progress=progress)

figure, axes = plt.subplots()
for name, curve in curves.items():
    axes.plot(range(1, len(curve) + 1), curve, marker=".", label=name)
axes.set(xlabel="epoch", ylabel="validation NDCG@10, aligned", ylim=(0, None))
axes.legend()
figure.savefig(FOLDER / "learning.png")

# %% [markdown]
# ## What the mask learned
#
# ln theta of the item encoder's attention by distance, less that at distance 0. At 0 everywhere the mask would do nothing; where a
# curve is above 0, a token that far back counts for more than the newest one, all else being equal. Few histories are longer
# than 20, so there is little to learn a curve from beyond. [The kernel's page](kernel.md) has the formulas.

# %%
figure, axes = plt.subplots()
for layer, module in enumerate(learned_masks(models["CAFE"]).values(), 1):
    for head, curve in enumerate(module.theta_curves(), 1):
        axes.plot(curve, label=f"layer {layer}, head {head}")
axes.axhline(0, color="black", linewidth=0.5)
axes.set(xlabel="distance in tokens", ylabel="ln theta", xlim=(0, 25))
axes.legend()
figure.savefig(FOLDER / "theta.png")

# %% [markdown]
# ## Who gains
#
# Every user's last item, ranked against the whole catalog, by how often training has had it. The bars are means over users with
# 95% intervals. In this run the means over all users are .090 for SASRec, .145 for SASRec with composed items and .145 for CAFE: most of
# the gain over SASRec is the loss and how items are represented, here all of it. On real data CAFE adds something to that, see
# [the measurements](../README.md). What training has once or never is hardly found by anybody.

# %%
users = 300 if QUICK else None  # all
results = {name: evaluate(model, dataset, "test", "full", max_users=users) for name, model in models.items()}
figure, axes = plt.subplots()
for place, (name, result) in enumerate(results.items()):
    ndcg = result.values("ndcg@10")
    groups = [ndcg[members] for members in result.buckets("train_frequency").values()]
    means = [group.mean() if len(group) else 0 for group in groups]
    errors = [1.96 * group.std() / max(1, len(group)) ** 0.5 if len(group) else 0 for group in groups]
    axes.bar(np.arange(len(groups)) + 0.27 * place, means, 0.25, yerr=errors, capsize=3, label=name)
axes.set_xticks(np.arange(len(groups)) + 0.27, list(result.buckets("train_frequency")))
axes.set(xlabel="times that training has the answer", ylabel="test NDCG@10, full", ylim=(0, None))
axes.legend()
figure.savefig(FOLDER / "frequency.png")
print({name: round(result.mean("ndcg@10"), 4) for name, result in results.items()})

# %% [markdown]
# ## One user
#
# A recommendation comes with its reason: which intents the model expects next.

# %%
recommender = Recommender(models["CAFE"], dataset)
history = recommender.history_of("u0")
answer = recommender.recommend([history], k=5)[0]
print("has had", history[-5:])
print("expected next", [(intent, round(share, 2)) for intent, share in answer.top_intents])
for item, score in zip(answer.items, answer.scores, strict=True):
    print(f"{item:24} {score:.3f}")

# %% [markdown]
# In this run it prints
#
#     has had ['games-covers-28', 'games-covers-31', 'games-covers-18', 'games-covers-19', 'office-storage-1']
#     expected next [('office sets', 0.22), ('office storage', 0.1), ('garden spares', 0.05)]
#     office-storage-0         3.928
#     office-storage-2         3.391
#     office-storage-3         3.015
#     office-sets-3            2.727
#     office-sets-0            2.575
