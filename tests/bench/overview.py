"""What docs/benchmarks.md says: what pays and what does not, with plots, from the results' JSON alone."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib

from gpl_core.labels.controls import CONTROLS
from tests.bench.harness import RESULTS

DEVICE = "cpu-2core"
AT = "@1/4"  # of ml_100k: the exposed click rate as mean label, lambda 4; the defaults
SHIPPED, BY_MODEL, NO_MODEL, NO_SHARE = "gpl_clicks", "gpl_prefix", "clicks_no_anchors", "clicks_no_share"
OURS = f"{SHIPPED}{AT}"
SETTINGS = ("@0.5/2", AT)  # that every label was trained with
WORLDS = ("plain", "popularity_bias", "user_bias", "confounded", "fast_drift")
_INK, _GOOD, _BAD, _QUIET = "#20242b", "#1b7a4b", "#b3372f", "#7a828e"


def words(page: str, **figures: Any) -> str:
    """A page of tests/bench/pages with its figures filled in."""
    return (RESULTS.parent / "pages" / page).read_text(encoding="utf-8").format(**figures)


@cache
def result(name: str) -> dict[str, Any]:
    """A benchmark's whole result file."""
    return json.loads((RESULTS / f"{name}.{DEVICE}.json").read_text(encoding="utf-8"))


def value(name: str, key: str) -> float:
    """One figure; says what to change when a benchmark no longer has it."""
    try:
        return result(name)["figures"][key]["value"]
    except KeyError as error:
        raise KeyError(f"results/{name}.{DEVICE}.json has no figure '{key}': see tests/bench/overview.py") from error


@dataclass(frozen=True)
class Interval:
    """A difference with its 95 % interval, and what follows from it."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "**better**" if self.low > 0 else "**worse**" if self.high < 0 else "no difference shown"

    @property
    def compared(self) -> str:
        """How the first compares with the second, in a sentence."""
        return "better than" if self.low > 0 else "worse than" if self.high < 0 else "not measurably different from"

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def over_exposed_only(row: str, column: str) -> Interval:
    """ml-100k: a variant minus the pre-ranker that is trained on clicks alone."""
    key = f"Paired differences to exposed_only, 95 % intervals over users and seeds | {row}: {column}"
    return Interval(value("ml_100k", key), value("ml_100k", f"{key} from"), value("ml_100k", f"{key} to"))


def difference(name: str, key: str) -> Interval:
    """A difference that a study has written, with its interval."""
    return Interval(*(value(name, k) for k in (key, f"  from ({key})", f"  to ({key})")))


def over_control(control: str, column: str) -> Interval:
    """ml-100k: our labels minus a control's, or minus other labels of ours; at the setting that `tuned` says."""
    return difference("ml_100k", f"{OURS} - {tuned(control)}, {column}")


def tuned(control: str) -> str:
    """ml-100k: a control at the target rate and lambda of higher GAUC; other labels of ours at the defaults."""
    at = [control + setting for setting in SETTINGS] if control in CONTROLS else [control + AT]
    return max(at, key=lambda row: mean(row, "unexposed/gauc"))


def mean(row: str, column: str) -> float:
    """ml-100k: a variant's figure, mean over the seeds."""
    return value("ml_100k", f"Means over seeds | {row}: {column}")


# ---- the table ---------------------------------------------------------------------------------------------


def _labels() -> list[tuple[str, str, str, str]]:
    """Rows of the first table: what is compared, the difference, its verdict, the benchmark."""
    rows: list[tuple[str, str, str, str]] = []

    def add(measured_in: str, text: str, found: Interval, verdict: str = "") -> None:
        rows.append((text, str(found), verdict or found.verdict, measured_in))

    movielens, day = "ml-100k", "quickstart"
    for text, column in (
        ("unexposed pairs, GAUC", "unexposed/gauc"), ("unexposed pairs, AUC", "unexposed/auc"),
        ("held-out exposed pairs, AUC", "exposed/auc"), ("HR@10 of recalled items", "recalled/hr@10"),
    ):  # fmt: skip
        add(movielens, f"Labels vs. clicks alone: {text}", over_exposed_only(OURS, column))
    tail = over_exposed_only(OURS, "top10/tail_share")  # of these more is not better
    verdict = "**more**" if tail.low > 0 else "**fewer**" if tail.high < 0 else ""
    add(movielens, "Labels vs. clicks alone: tail items in the top ten", tail, verdict)
    for text, control in (
        ("the same without the language model", NO_MODEL),
        ("the same with the language model as a feature only", NO_SHARE), ("a constant label", "constant"),
        ("cosine to the history", "cosine"), ("the user's click rate", "user_rate"),
        ("popularity as the label", "popularity"),
    ):  # fmt: skip
        add(movielens, f"Our labels vs. {text}: GAUC", over_control(control, "unexposed/gauc"))
    for text, left, right in (
        ("Shipped labels vs. clicks alone", SHIPPED, "exposed_only"),
        ("Labels ranked by the language model alone vs. clicks alone", BY_MODEL, "exposed_only"),
        ("Our labels vs. the same without the language model", SHIPPED, f"{NO_MODEL}@1"),
        ("Our labels vs. the same with the language model as a feature only", SHIPPED, f"{NO_SHARE}@1"),
    ):
        found = difference("preranker", f"{left}@1 - {right}, unexposed/gauc")
        add("preranker", f"{text}, purchases (semi-synthetic): GAUC", found)
    for label, text in ((BY_MODEL, "Labels ranked by the language model alone"), (SHIPPED, "Shipped labels")):
        for file in ("model_in_labels.ml-100k", "model_in_labels"):
            found = difference(file, f"{label}@1, content and walks - {label}@1, SIDs alone, unexposed/gauc")
            world = "" if "." in file else ", world plain (simulated)"
            add(file, f"{text}: a model that reads content vs. one of SIDs alone{world}: GAUC", found)
    key = "Trained through 2026-01-04, judged on the day after | gpl - exposed_only: exposed/"
    for metric in ("auc", "gauc"):
        found = Interval(*(value(day, f"{key}{metric}{end}") for end in ("", " from", " to")))
        add(day, f"Shipped labels vs. clicks alone: held-out exposed pairs, {metric.upper()}", found)
    found = Interval(*(value("tokenizer", f"industrial_256_gain{end}") for end in ("", "_95_low", "_95_high")))
    add("tokenizer", "RQ-VAE vs. RQ-k-means: share of true neighbors kept", found)
    return rows


_COSTS = {  # file -> figure -> what it is, how it is written
    "serving": {
        "exported bundle / item tower online": (
            "Serving the exported pre-ranker, time of an item tower online",
            "{:.3f}x",
        ),
        "bytes that pseudo-labels add to a bundle": ("Bytes that labels add to that bundle", "{:.0f}"),
    },
    "search": {
        "P 150, K 20: speed over generate": (
            "Beam search (150 tokens, 20 beams), speed over `generate`",
            "{:.1f}x",
        ),
    },
    "anchor_worker": {
        "nothing changed, worker's own check, share of the work": (
            "Anchors when nothing changed, share of the work",
            "{:.1%}",
        ),
        "1 % changed, share of the work beyond the fixed cost": (
            "Anchors when 1 % changed, beyond the fixed cost",
            "{:.1%}",
        ),
    },
    "interest_quality": {
        "ours: HR@10": ("Next item, HR@10 on Amazon Industrial", "{:.4f}"),
    },
    "score_candidates": {"share of the floor's speed": ("Scoring pairs, share of bare arithmetic's speed", "{:.3f}")},
    "spark_scale": {
        "all jobs: CPU of the floors', 16x": (
            "Spark's jobs over 21 million candidate rows, CPU over bare scans, shuffles and writes",
            "{:.2f}x",
        ),
        "all jobs: core-hours per 10^9 candidate rows": ("The same for 10^9 rows, extrapolated", "{:.1f} core-hours"),
    },
    "dates": {"Spark, raw tables to feed": ("Twenty dates of 10^4 impressions: seconds of Spark's steps", "{:.0f}")},
    "years": {"gpl status, 3000 / 10 commits": ("`gpl status` after 3,000 commits per table, over 10", "{:.2f}x")},
    "concurrency": {"tables with a key twice": ("Two runs at once: tables with a key twice", "{:.0f}")},
    "kill_campaign": {
        "rows that differ after the second run": (
            "`kill -9` in every Spark job: rows that differ after a second run",
            "{:.0f}",
        ),
    },
    "mutation_campaign": {"rows lost": ("Hostile values in raw rows: rows lost", "{:.0f}")},
    "damage": {
        "of these that ended wrong, but for bits in data files": (
            "Damaged files of ours: ends that were wrong",
            "{:.0f}",
        ),
    },
}  # fmt: skip


def table() -> str:
    """What pays and what does not, as two Markdown tables."""
    lines = ["| labels: which pre-ranker is better | difference [95%] | | measured in |", "|---|---|---|---|"]
    lines += [f"| {a} | {b} | {c} | [{d}]({_anchor(d)}) |" for a, b, c, d in _labels()]
    lines += [
        "",
        "| labels in simulated worlds | gap closed, AUC | GAUC | over clicks alone: unexposed GAUC | exposed GAUC "
        "| what the language model adds, GAUC | tail share of top tens: clicks alone, labels, truth |",
        "|---|---|---|---|---|---|---|",
        *_worlds(),
    ]
    lines += ["", "| cost and trust | | goal | | measured in |", "|---|---:|---|---|---|"]
    for name, key in ((name, key) for name, figures in _COSTS.items() for key in figures):
        text, form = _COSTS[name][key]
        shown, figure = form.format(value(name, key)), result(name)["figures"][key]
        verdict = {True: "holds", False: "**missed**", None: ""}[figure["holds"]]
        lines.append(f"| {text} | {shown} | {figure['goal']} | {verdict} | [{name}]({_anchor(name)}) |")
    return "\n".join(lines)


def _worlds() -> list[str]:
    """A row per simulated world: what the shipped labels are worth there."""
    lines = []
    for world in WORLDS:
        file = "simulation" if world == "plain" else f"simulation.{world}"

        def interval(key: str, form: str, file: str = file) -> str:
            found = difference(file, key)
            return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"

        cells = [
            *(interval(f"gpl_clicks@1 closes the {m} gap above the constant", ".2f") for m in ("auc", "gauc")),
            *(interval(f"gpl_clicks@1 - exposed_only, {part}/gauc", "+.3f") for part in ("unexposed", "exposed")),
            interval("gpl_clicks@1 - clicks_no_anchors@1, unexposed/gauc", "+.4f"),
            ", ".join(
                f"{value(file, f'Means over seeds | {name}: top10/tail_share'):.2f}"
                for name in ("exposed_only", "gpl_clicks@1", "bayes")
            ),
        ]
        lines.append(f"| [{world}]({_anchor(file)}) | {' | '.join(cells)} |")
    return lines


def _anchor(name: str) -> str:
    body = "ml_100k" if name == "ml-100k" else name.replace(".", "-")
    return f"benchmark-figures.md#{body}-{DEVICE}"


def findings() -> dict[str, str]:
    """What the table says of labels on real ratings, for a sentence: how one compares with the other."""
    return {
        "seeds": result("ml_100k")["about"].rpartition(", ")[2],
        "unexposed": over_exposed_only(OURS, "unexposed/gauc").compared,
        "exposed": over_exposed_only(OURS, "exposed/auc").compared,
        "truth": over_exposed_only("oracle_hard", "exposed/auc").compared,
        "ours_to_popularity": over_control("popularity", "unexposed/gauc").compared,
        "ours_to_constant": over_control("constant", "unexposed/gauc").compared,
    }


# ---- the plots ---------------------------------------------------------------------------------------------


_NAMES = {
    "oracle_hard": "the true outcome, sampled", "popularity": "popularity", SHIPPED: "ours, as shipped",
    BY_MODEL: "ours, ranked by the language model alone", NO_MODEL: "ours without the language model",
    NO_SHARE: "ours, language model as a feature only",
    "shuffled": "ours, shuffled", "user_rate": "the user's click rate", "constant": "a constant",
    "cosine": "cosine to history",
}  # fmt: skip


def labels_plot() -> str:
    """SVG: ml-100k, every label's gain over clicks alone, unexposed and exposed pairs, with intervals."""
    measured = result("ml_100k")["figures"]
    rows = ["oracle_hard", *(tuned(n) for n in _NAMES if f"Means over seeds | {n}{AT}: unexposed/gauc" in measured)]
    rows.sort(key=lambda r: over_exposed_only(r, "unexposed/gauc").mean)
    figure, axes = _canvas(9, 7, 2, 2)
    pairs = {"unexposed": "unexposed pairs", "exposed": "held-out exposed pairs"}
    columns = [(f"{p}/{m.lower()}", f"{title}, {m}") for p, title in pairs.items() for m in ("GAUC", "AUC")]
    for axis, (column, title) in zip(axes, columns, strict=True):
        for place, row in enumerate(rows):
            found = over_exposed_only(row, column)
            color = _GOOD if found.low > 0 else _BAD if found.high < 0 else _QUIET
            axis.plot([found.low, found.high], [place, place], color=color, linewidth=2.5)
            axis.plot([found.mean], [place], "o", color=color, markersize=7 if row == OURS else 5)
        axis.axvline(0, color=_INK, linewidth=0.8)
        axis.set_title(title, fontsize=10, color=_INK)
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_yticks(range(len(rows)), [_NAMES[r.partition("@")[0]] for r in rows])
    for text in (text for axis in axes[::2] for text in axis.get_yticklabels()):
        text.set_fontweight("bold" if text.get_text() == _NAMES[SHIPPED] else "normal")
    return _svg(figure, "Gain of each label over clicks alone on MovieLens 100k, with 95% intervals")


def goals_plot() -> str:
    """SVG: how many goals hold and how many are missed, per benchmark."""
    counted = {}
    for path in sorted(RESULTS.glob(f"*.{DEVICE}.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        goals = [f["holds"] for f in body["figures"].values() if f["holds"] is not None]
        if goals:
            counted[path.name.removesuffix(f".{DEVICE}.json")] = (goals.count(True), goals.count(False))
    figure, (axis,) = _canvas(9, 5.2, 1)
    names = sorted(counted, key=lambda n: (counted[n][0] / sum(counted[n]), n))
    for place, name in enumerate(names):
        held, missed = counted[name]
        axis.barh(place, held / (held + missed), color=_GOOD)
        axis.barh(place, missed / (held + missed), left=held / (held + missed), color=_BAD)
        axis.text(1.01, place, f"{held} of {held + missed}", va="center", fontsize=8, color=_INK)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 1.12)
    axis.set_xticks([])
    return _svg(figure, "Goals met, per benchmark")


def _canvas(width: float, height: float, panels: int, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, panels, sharey=True, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(labelsize=9, labelcolor=_INK, left=False)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """The same bytes for the same figures, text as text."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gpl", "font.family": "sans-serif"}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
