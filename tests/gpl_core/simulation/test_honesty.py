"""What would make a simulation flattering, looked at item by item on the simulated tables (decision 008)."""

import ast
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_predict
from sklearn.preprocessing import OneHotEncoder

import gpl_core.simulation.recall as cascade
from gpl_core.labels.calibration import sigmoid
from gpl_core.sids.item_content import ItemContent
from gpl_core.simulation.item_world import ItemWorld, item_text, make_items, make_taste
from gpl_core.simulation.recall import text_features
from gpl_core.simulation.simulation_settings import WORLDS, SimulationSettings
from gpl_core.simulation.topics import topics
from tests.gpl_core.simulation.made import auc, world

SETTINGS = SimulationSettings(users=600, pictures=False)


def items() -> ItemWorld:
    return make_items(SETTINGS, make_taste(SETTINGS.seed))


def numbers(item_ids: pd.Series) -> np.ndarray:
    return item_ids.str[1:].astype(int).to_numpy()


def shown_attributes(made: ItemWorld) -> np.ndarray:
    """One-hot [N x .] of everything that texts and pictures are made from: the most that any encoder could see."""
    department = made.topic // 5
    columns = [department, made.topic, made.product + 5 * made.topic]
    columns += [word + 5 * department for word in (made.adjective, made.material, made.use, made.brand)]
    return OneHotEncoder(sparse_output=False).fit_transform(np.column_stack(columns))


def truth(name: str = "plain") -> pd.DataFrame:
    return world(name).table("truth").to_pandas()


def unconfounded_effect(outcome: np.ndarray, cause: np.ndarray, controls: np.ndarray) -> float:
    """Correlation of what `controls` leave unexplained of `outcome` and of `cause`."""
    design = np.column_stack([np.ones(len(outcome)), controls])

    def rest(values: np.ndarray) -> np.ndarray:
        return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]

    return float(np.corrcoef(rest(outcome), rest(cause))[0, 1])


def test_recall_and_logging_policy_cannot_import_what_is_true() -> None:
    tree = ast.parse(Path(cascade.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name and name.startswith("gpl_core")} == {"gpl_core.simulation.rng"}


def test_exposure_does_not_follow_quality_beyond_what_popularity_shows() -> None:
    rows = truth().merge(
        world().table("raw_impressions").to_pandas().groupby("request_id").is_random.first(), on="request_id"
    )
    rows = rows[~rows.is_random]
    item = numbers(rows.item_id)
    positives = world().table("raw_interactions").to_pandas()
    before = positives[positives.dt < SETTINGS.start_date].item_id.value_counts()
    popularity = np.log1p(rows.item_id.map(before).fillna(0).to_numpy())
    # Of two equally popular items the worse one lies in the more wanted topic, which the ranker may see: topics too.
    topic = items().topic[item]
    controls = np.column_stack(
        [v == k for v in (popularity, topic) for k in np.unique(v)[1:]]
    ).astype(float)  # fmt: skip
    quality = items().quality[item]
    exposed = rows.is_exposed.to_numpy().astype(float)
    assert np.corrcoef(exposed, quality)[0, 1] > 0.02  # popular items are somewhat better: as in life
    assert abs(unconfounded_effect(exposed, quality, controls)) < 0.015


def test_exposure_tells_little_of_true_relevance() -> None:
    rows = truth()
    assert 0.52 < auc(rows.true_probability.to_numpy(), rows.is_exposed.to_numpy()) < 0.70


def test_true_affinity_is_not_the_maximum_cosine_to_the_history() -> None:
    """A sharp reading of the history by seen content must help, and must not be the answer."""
    titles = world().table("raw_items").to_pandas().drop_duplicates("item_id").set_index("item_id")
    features = text_features((titles.title + " " + titles.category).tolist())
    at = pd.Series(np.arange(len(titles)), index=titles.index)
    positives = world().table("raw_interactions").to_pandas()
    positives = positives[positives.dt < SETTINGS.start_date]
    history = {user: at[rows.item_id].to_numpy() for user, rows in positives.groupby("user_id")}
    rows = truth()
    rows = rows[rows.user_id.isin(history)].sample(20_000, random_state=0)
    cosine = [
        float((features[history[user]] @ features[item]).max()) for user, item in zip(rows.user_id, at[rows.item_id])
    ]
    assert 0.1 < spearmanr(cosine, rows.true_probability).statistic < 0.6


def test_quality_is_hidden_from_content_and_matters() -> None:
    made = items()
    predicted = cross_val_predict(Ridge(10.0), shown_attributes(made), made.quality, cv=5)
    assert abs(np.corrcoef(predicted, made.quality)[0, 1]) < 0.15
    rows = truth()
    logit = np.log(rows.true_probability / (1 - rows.true_probability))
    mean = logit.groupby(numbers(rows.item_id)).mean()
    assert np.corrcoef(mean, made.quality[mean.index])[0, 1] > 0.5


def test_the_best_content_model_of_an_items_click_rate_misses_most_of_it() -> None:
    made = items()
    rows = truth()
    logit = np.log(rows.true_probability / (1 - rows.true_probability))
    mean = logit.groupby(numbers(rows.item_id)).mean()
    predicted = cross_val_predict(Ridge(3.0), shown_attributes(made)[mean.index], mean, cv=5)
    assert np.corrcoef(predicted, mean)[0, 1] < 0.75


def test_seen_content_is_like_true_content_but_is_not_it() -> None:
    made = items()
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, made.size, (2, 40_000))
    keep = left != right
    left, right = left[keep], right[keep]
    seen = shown_attributes(made)
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    true = (made.content[left] * made.content[right]).sum(1)
    shown = (seen[left] * seen[right]).sum(1)
    assert 0.1 < np.corrcoef(true, shown)[0, 1] < 0.8
    twins = (made.product[left] == made.product[right]) & (made.topic[left] == made.topic[right])
    # Even items of one product differ: part of the true content is shown nowhere.
    assert 0.4 < true[twins].mean() < 0.9


def test_a_sentence_encoder_sees_topics_and_a_part_of_the_true_content() -> None:
    encoders = pytest.importorskip("gpl_core.sids.encoders")
    made = items()
    texts = [f"{t.title}. {t.description}" for t in (item_text(made, n) for n in range(400))]
    content = [ItemContent(n, text) for n, text in enumerate(texts)]
    seen = encoders.build_encoder([encoders.EncoderPart("minilm", 1.0)]).encode(content).vectors
    cosine = seen @ seen.T
    np.fill_diagonal(cosine, -1)
    nearest = np.argsort(-cosine, axis=1)[:, :3]
    same = (made.topic[nearest] == made.topic[:400, None]).mean()
    assert same > 0.5  # chance is 1 in 60
    left, right = np.triu_indices(400, 1)
    true = (made.content[left] * made.content[right]).sum(1)
    assert 0.2 < np.corrcoef(true, cosine[left, right])[0, 1] < 0.8
    # Words mean something: topics of two departments that go together do so for who reads English, and in truth.
    taste, tree = make_taste(SETTINGS.seed), topics()
    names = [ItemContent(n, ", ".join(topic.products)) for n, topic in enumerate(tree)]
    words = encoders.build_encoder([encoders.EncoderPart("minilm", 1.0)]).encode(names).vectors
    left, right = np.triu_indices(len(tree), 1)
    apart = np.array([tree[a].department != tree[b].department for a, b in zip(left, right)])
    left, right = left[apart], right[apart]
    together = np.array([bool({*tree[a].themes} & {*tree[b].themes}) for a, b in zip(left, right)])
    assert auc((words[left] * words[right]).sum(1), together) > 0.7
    assert 0.7 < auc((taste.topic[left] * taste.topic[right]).sum(1), together) < 0.95


@pytest.mark.parametrize("name", WORLDS)
def test_popularity_has_a_long_tail_without_collapsing(name: str) -> None:
    shown = world(name, 1500).table("raw_impressions").to_pandas()
    size = SETTINGS.items + SETTINGS.days * SETTINGS.new_items_per_day
    clicks = shown[shown.clicked == 1].item_id.value_counts()
    exposures = np.sort(np.r_[shown.item_id.value_counts().to_numpy(), np.zeros(size - shown.item_id.nunique())])[::-1]
    assert 1 - len(clicks) / size < 0.65
    assert 0.25 < exposures[: size // 10].sum() / exposures.sum() < 0.85


@pytest.mark.parametrize("name", WORLDS)
def test_the_worlds_can_be_learnt_and_not_perfectly(name: str) -> None:
    rows = truth(name)
    rows = rows[~rows.is_exposed]
    drawn = np.random.default_rng(0).random(len(rows)) < rows.true_probability
    assert 0.78 < auc(rows.true_probability.to_numpy(), drawn.to_numpy()) < 0.9
    assert 0.02 < rows.true_probability.mean() < 0.10


def test_worlds_differ_in_what_they_are_named_for() -> None:
    def head_share(name: str) -> float:
        counts = world(name).table("raw_impressions").to_pandas().item_id.value_counts()
        return counts.head(120).sum() / counts.sum()

    assert head_share("popularity_bias") > 1.5 * head_share("plain")

    def stays(name: str) -> float:
        """Share of events whose topic the user had already taken up in the first ten days."""
        rows = world(name).table("raw_interactions").to_pandas()
        rows["topic"] = items().topic[numbers(rows.item_id)]
        early = rows[rows.dt < min(rows.dt) + pd.Timedelta(days=10).to_pytimedelta()]
        known = set(zip(early.user_id, early.topic))
        late = rows[rows.dt >= SETTINGS.start_date]
        late = late[late.user_id.isin(set(early.user_id))]
        return float(np.mean([pair in known for pair in zip(late.user_id, late.topic)]))

    assert stays("fast_drift") < 0.7 * stays("plain")

    def spread_over_users(name: str) -> float:
        logit = truth(name).true_probability.clip(1e-6).map(lambda p: np.log(p / (1 - p)))
        return float(logit.groupby(truth(name).user_id).mean().std())

    assert spread_over_users("user_bias") > 1.4 * spread_over_users("plain")

    def insight(name: str) -> float:
        """AUC by which exposure follows the true probability within a request."""
        rows = truth(name)
        rank = rows.groupby("request_id").true_probability.rank(pct=True)
        return auc(rank.to_numpy(), rows.is_exposed.to_numpy())

    assert insight("confounded") > insight("plain") + 0.05


def test_clicks_are_drawn_from_the_true_probability_and_the_stated_position_bias() -> None:
    rows = world("plain", 1500).table("raw_impressions").to_pandas()
    rows = rows.merge(truth_of(1500)[["request_id", "item_id", "true_probability"]], on=["request_id", "item_id"])
    expected = rows.true_probability * (rows.position + 1.0) ** -SETTINGS.rules.position_decay
    assert (expected.mean() - rows.clicked.mean()) ** 2 < 16 * expected.mean() / len(rows)
    decile = pd.qcut(expected, 10, labels=False)
    for _, part in rows.assign(expected=expected).groupby(decile):
        spread = np.sqrt((part.expected * (1 - part.expected)).sum())
        assert abs(part.clicked.sum() - part.expected.sum()) < 4 * spread


def truth_of(users: int) -> pd.DataFrame:
    return world("plain", users).table("truth").to_pandas()


def test_random_traffic_is_a_uniform_sample_of_the_candidates() -> None:
    shown = world("plain", 1500).table("raw_impressions").to_pandas()
    random = set(shown[shown.is_random].request_id)
    assert 0.01 < len(random) / shown.request_id.nunique() < 0.03
    rows = truth_of(1500)
    rows = rows[rows.request_id.isin(random)]
    exposed, rest = rows[rows.is_exposed].true_probability, rows[~rows.is_exposed].true_probability
    error = np.sqrt(exposed.var() / len(exposed) + rest.var() / len(rest))
    assert abs(exposed.mean() - rest.mean()) < 3 * error
    biased = truth_of(1500)
    biased = biased[biased.is_exposed & ~biased.request_id.isin(random)].true_probability
    assert biased.mean() > exposed.mean() + 2 * error


def test_mean_probability_of_random_pairs_is_the_one_asked_for() -> None:
    from gpl_core.simulation.users import click_logits, find_intercept, make_shoppers

    made, taste = items(), make_taste(SETTINGS.seed)
    shoppers = make_shoppers(SETTINGS, taste, 0)
    intercept = find_intercept(shoppers, made, SETTINGS)
    user = np.arange(shoppers.size)
    everything = np.broadcast_to(np.arange(0, made.initial, 3), (shoppers.size, (made.initial + 2) // 3))
    rate = sigmoid(click_logits(shoppers, user, everything, made, SETTINGS.rules) + intercept).mean()
    assert rate == pytest.approx(SETTINGS.rules.random_pair_rate, rel=0.1)
