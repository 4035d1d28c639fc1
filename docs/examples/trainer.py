"""A trainer to copy: learns from one pinned date of the feed, with and without labels, judged on the day after.
python docs/examples/trainer.py quickstart 2026-01-03
"""

import sys
from datetime import date, timedelta
from zlib import crc32

import torch
from sklearn.metrics import roc_auc_score

import gpl_core as gpl

USERS, WIDTH, EPOCHS = 4096, 16, 5  # hash buckets of users, size of a vector, passes
COLUMNS = ["user_id", "item_index", "is_exposed", "target", "sample_weight"]


class Towers(torch.nn.Module):
    """Logit of a pair: the product of a user's and an item's vector, and the item's bias."""

    def __init__(self, items: int):
        super().__init__()
        self.user, self.item = torch.nn.Embedding(USERS, WIDTH), torch.nn.Embedding(items, WIDTH)
        self.bias = torch.nn.Embedding.from_pretrained(torch.full((items, 1), -3.0), freeze=False)

    def forward(self, users: list[str], items: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor([crc32(user.encode()) % USERS for user in users])
        return (self.user(rows) * self.item(items)).mean(1) + self.bias(items)[:, 0]


def train(feed: gpl.FeedReader, items: int, lambda_: float) -> Towers:
    """lambda_: what the labels of unexposed pairs count; 0 learns from clicks alone."""
    model = Towers(items)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(EPOCHS):
        for batch in feed.batches(1024, COLUMNS):
            logits = model(batch["user_id"], batch["item_index"])
            loss = gpl.dual_label_loss(logits, batch["target"], batch["is_exposed"], batch["sample_weight"], lambda_)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def main(config: str, day: date) -> None:
    lake = gpl.open_lakehouse(config)
    feed = lake.feed(day)
    feed.refuse_alarms()
    items = 1 + max(lake.table("items", columns=["item_index"])["item_index"].to_pylist())
    after = lake.table("impressions", day + timedelta(days=1)).to_pandas()
    pairs = after.user_id.tolist(), torch.tensor(after.item_index.to_numpy())
    for lambda_ in (0.0, lake.config.prerank.lambda_):
        torch.manual_seed(0)
        scores = train(feed, items, lambda_)(*pairs).detach()
        print(f"lambda {lambda_:g}: AUC {roc_auc_score(after.clicked, scores):.4f}")


if __name__ == "__main__":
    main(sys.argv[1], date.fromisoformat(sys.argv[2]))
