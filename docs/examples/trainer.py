"""A trainer to copy: learns from one pinned date of the feed, with and without labels, judged on the day after.
python docs/examples/trainer.py quickstart 2026-01-03"""

import sys
from datetime import date, timedelta

import torch
from pyarrow.compute import field
from sklearn.metrics import roc_auc_score
from torch.nn.functional import embedding_bag, pad

import gpl_core as gpl

WIDTH, EPOCHS, LOSS = 16, 5, ["target", "is_exposed", "sample_weight", "sampling_probability"]


class Towers(torch.nn.Module):
    """Logit of a pair: the user's history times the item; both are made of vectors of the codes in semantic IDs."""

    def __init__(self, lake: gpl.LakehouseReader, feed: gpl.FeedReader):
        super().__init__()
        version = feed.manifest["versions"]["sid_version"]
        found = lake.table("item_sids").filter((field("sid_version") == version) & (field("retired_at") == 0))
        items, sids = found["item_index"].to_pylist(), torch.tensor(found["sid"].to_pylist())
        self.codes = torch.zeros(max(items) + 2, sids.shape[1], dtype=torch.long)  # by item, the last row of none
        self.codes[items] = 1 + sids + (1 + sids.max()) * torch.arange(sids.shape[1])  # 0: no code
        users = lake.table("user_sequences", columns=["user_id", "item_index", "dt"]).to_pandas().sort_values("dt")
        users = users[users.dt <= feed.run_date].drop_duplicates("user_id", keep="last")  # a slice has who changed
        self.place = {user: row for row, user in enumerate(users.user_id)}  # of others: -1, the last row
        self.past = pad(torch.tensor([*map(list, users.item_index)]).clamp(max=max(items) + 1), (0, 0, 0, 1), value=-1)
        self.vectors = torch.nn.Parameter(0.1 * torch.randn(1 + int(self.codes.max()), 2 * WIDTH + 1))

    def forward(self, users: list[str], items: torch.Tensor) -> torch.Tensor:
        history = self.codes[self.past[[self.place.get(user, -1) for user in users]]].flatten(1)
        user = embedding_bag(history, self.vectors, mode="mean", padding_idx=0)[:, :WIDTH]
        item = embedding_bag(self.codes[items.clamp(max=len(self.codes) - 1)], self.vectors, mode="sum", padding_idx=0)
        return (user * item[:, WIDTH:-1]).sum(1) + item[:, -1] - 3  # few pairs are clicked


def main(config: str, day: date) -> None:
    lake = gpl.open_lakehouse(config)
    feed = lake.feed(day)
    feed.refuse_alarms()
    after = lake.table("impressions", day + timedelta(days=1)).to_pandas()
    for lambda_ in (0.0, lake.config.prerank.lambda_):  # what the labels of unexposed pairs count: 0 is clicks alone
        torch.manual_seed(0)
        model = Towers(lake, feed)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for batch in (batch for _ in range(EPOCHS) for batch in feed.batches(1024, ["user_id", "item_index", *LOSS])):
            logits = model(batch["user_id"], batch["item_index"])
            loss = gpl.dual_label_loss(logits, **{name: batch[name] for name in LOSS}, lambda_=lambda_)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores = model(after.user_id.tolist(), torch.tensor(after.item_index.to_numpy())).detach()
        print(f"lambda {lambda_:g}: AUC {roc_auc_score(after.clicked, scores):.4f}")


if __name__ == "__main__":
    main(sys.argv[1], date.fromisoformat(sys.argv[2]))
