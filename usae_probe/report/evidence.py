"""What a run's figures stand beside, as tables: controls, reference, tax, fidelity.

Everything is read from the content of `metrics.json`; what is not there is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from .facts import Facts
from .r2_table import finite, short

Metrics = Mapping[str, Any]
_MOST_PAIRS = 8


def beside(metrics: Metrics) -> str:
    """Say in brackets what the number of universal latents stands beside; empty where nothing is known.

    `(shuffled 0, within class 78, mispaired 5, untrained 63)`.
    """
    said = said_of_nulls(metrics)
    return f"({', '.join(said)})" if said else ""


def said_of_nulls(metrics: Metrics) -> list[str]:
    """Say of each null and control how many latents are universal there: `shuffled 0`, `untrained 63`."""
    said = [f"{_null_name(null)} {_mean(null['universal'])}" for null in metrics.get("nulls", [])]
    trained = metrics.get("controls", {})
    return said + [f"{name} {control['counts']['universal']:,}" for name, control in _less(trained).items()]


def seeds(metrics: Metrics) -> str:
    """Return the range of the universal latents over trainings; empty for a single one."""
    found = metrics.get("stability", {}).get("universal", [])
    return f"{min(found):,}–{max(found):,} over {len(found)} seeds" if len(found) > 1 else ""


def evidence(metrics: Metrics) -> list[Facts]:
    """Return everything that the classes and R² stand beside, as far as it is there."""
    parts = (_alike(metrics), _controls(metrics), _tax(metrics), _fidelity(metrics), _labels(metrics))
    return [part for part in parts if part]


def _alike(metrics: Metrics) -> Facts | None:
    """Return R² beside the linear reference and what is alike without a USAE, for every ordered pair of class sites."""
    rows = metrics.get("platonic")
    if not rows or all(row["r2_ridge"] is None and row["cka"] is None for row in rows):
        return None
    facts = Facts(
        "What is alike", ["code of → decoded to", "R² ± 95 %", "linear", "share", "CKA", "k-NN", "energy"], [], []
    )
    shown = sorted(rows, key=lambda row: -(row["r2"] if finite(row["r2"]) else -9))[:_MOST_PAIRS]
    intervals = metrics.get("r2_interval") or {}
    for row in shown:
        ends = intervals.get(row["source"], {}).get(row["target"])
        span = f" ±{short((ends[1] - ends[0]) / 2)}" if ends and finite(ends[0]) and finite(ends[1]) else ""
        facts.rows.append(
            [
                f"{row['source']}\n→ {row['target']}",
                f"{short(row['r2'])}{span}",
                short(row["r2_ridge"]),
                short(row["r2_share"]),
                _with_null(row["cka"], row["cka_null"]),
                _with_null(row["mutual_knn"], row["mutual_knn_null"]),
                short(row["universal_energy"]),
            ]
        )
    similarity = metrics.get("similarity")
    said = "linear: ridge regression, share: of it reached; energy: the target's in universal latents"
    if similarity:
        said += (
            f"; debiased CKA and mutual {similarity['k']}-NN of {similarity['n_images']:,} held-out images (in "
            f"brackets: largest of {similarity['nulls']} shuffled pairings)"
        )
    left = len(rows) - len(shown)
    more = f"; the {left} other pairs are in metrics.json" if left else ""
    facts.notes.append(said + more)
    return facts


def _controls(metrics: Metrics) -> Facts | None:
    nulls, trained = metrics.get("nulls", []), metrics.get("controls", {})
    if not trained:
        return None
    sites = metrics["class_sites"]
    facts = Facts("Controls", ["universal latents", "", "of live", "cross-R²"], [], [])
    rows, stable = facts.rows, metrics.get("stability", {})
    own = _cross(metrics["r2"], sites)
    rows.append(["this run", f"{metrics['counts']['universal']:,}", f"{metrics['n_live']:,}", own])
    if len(stable.get("universal", [])) > 1:
        spans = [f"{min(stable[key]):,}–{max(stable[key]):,}" for key in ("universal", "live")]
        rows.append([f"{len(stable['universal'])} seeds", *spans, ""])
    for null in nulls:
        rows.append([f"{_null_name(null)}, at evaluation", _mean(null["universal"]), f"{metrics['n_live']:,}", ""])
    for name, control in trained.items():
        cross = _cross(control["r2"], control["sites"])
        rows.append([name, f"{control['counts']['universal']:,}", f"{control['n_live']:,}", cross])
    matched = metrics.get("posthoc", [])
    for found in matched:
        matched_on = "held-out" if found["matched_on"] == "holdout" else "training"
        name = f"independent SAEs, matched on {matched_on} rows"
        rows.append([name, f"{found['counts']['universal']:,}", f"{found['n_pairs']:,} pairs", ""])
    equal = f"firing entropy ≥ {short(metrics['thresholds']['entropy'])} alone: {metrics['n_equal_rates']:,}"
    shuffled = [found["null"] for found in matched if finite(found["null"])]
    if shuffled:
        equal += f"; matched SAEs, images shuffled: {', '.join(_mean([null]) for null in shuffled)}"
    again = [found for found in stable.get("found_again", []) if finite(found["share"]) and finite(found["median"])]
    if again:
        shares, medians = (_span([found[key] for found in again]) for key in ("share", "median"))
        equal += (
            f"; found again with another seed (cosine ≥ .7 in all decoders): {shares}, median cosine of the matched "
            f"{medians}"
        )
    facts.notes.append(equal)
    return facts


def _tax(metrics: Metrics) -> Facts | None:
    independent, tax = metrics.get("independent_r2"), metrics.get("alignment_tax")
    if not independent or not tax:
        return None
    lengths = ("SAE\nsteps", "tax", "SAE\nupdates", "tax", "SAE\nn/M", "tax")
    facts = Facts("Alignment tax", ["held-out R² of itself", "USAE", *lengths], [], [])
    for site in metrics["sites"]:
        steps = independent.get("steps", {}).get(site)
        own = steps["mean"] - tax["steps"][site]["mean"] if steps else metrics["r2"][site][site]
        cells = [_three(own)]
        for kind in ("steps", "encoder", "parts"):
            found = independent.get(kind, {}).get(site)
            cells += [_three(found["mean"]), _three(tax[kind][site]["mean"])] if found else ["–", "–"]
        facts.rows.append([site, *cells])
    n = next(iter(next(iter(tax.values())).values()))["n"]
    said = f"independent SAEs: as many steps, as many encoder updates, n_latents / M each; mean of {n} seed"
    counterparts = metrics.get("counterparts") or {}
    shares = ", ".join(f"{site} {short(c['share'])} (random {short(c['random'])})" for site, c in counterparts.items())
    facts.notes.append(f"{said}{'' if n == 1 else 's'}")
    if shares:
        facts.notes.append(f"their latents with a universal counterpart (cosine ≥ .7): {shares}")
    return facts


def _fidelity(metrics: Metrics) -> Facts | None:
    found = metrics.get("fidelity")
    if not found:
        return None
    sites = metrics["class_sites"]
    facts = Facts("Fidelity in the live models", ["code of ↓ in the place of →", *sites], [], [])
    for source in sites:
        facts.rows.append([source, *(_recovered(found, source, target) for target in sites)])
    denominators = [
        f"{site} {short(found['kl_mean'].get(site))} nats, {short(found['top1_mean'].get(site))}"
        for site in sites
        if finite(found["kl_mean"].get(site))
    ]
    said = f"share of the output recovered over mean ablation: KL (top-1), {found['n_images']:,} held-out images"
    if denominators:
        said += f"; mean ablation: {'; '.join(denominators)} top-1 agreement"
    facts.notes.append(said)
    if n := sum(finite(one["correlation"]) for one in found["latents"]):
        medians, together = found["medians"], sum(finite(one["both_firing"]) for one in found["latents"])
        said = (
            f"ablated in all models, {n} universal latents: their effects on an image correlate at "
            f"{short(medians['correlation'])} in the median (random latents of equal energy "
            f"{short(medians['null_correlation'])})"
        )
        if together:
            said += f"; of {together}, over images in which both fire, at {short(medians['both_firing'])}"
        facts.notes.append(said)
    return facts


def _labels(metrics: Metrics) -> Facts | None:
    found = metrics.get("labels")
    if not found or not finite(found["bound"]):
        return None
    said = f"Labels permuted {found['permutations']} times, the best latent reaches AUROC {short(found['bound'])}."
    if finite(found["agreement"]):
        said += (
            f" Of {found['n_agreement']:,} universal latents {100 * found['agreement']:.0f} % have the same best label "
            f"in all models ({100 * found['agreement_chance']:.0f} % by chance)."
        )
    return Facts("", [], [], [said])


def _recovered(found: Metrics, source: str, target: str) -> str:
    share, top = found["share_recovered"][source][target], found["top1_recovered"][source][target]
    if finite(share) or finite(top):
        return f"{short(share)} ({short(top)})"
    cosine = found["cosine"][source][target]
    return f"cosine {short(cosine)}" if finite(cosine) else "–"


def _less(trained: Metrics) -> dict[str, Any]:
    """Return the controls that should share less than the run, which its headline stands beside."""
    return {name: control for name, control in trained.items() if not name.endswith(" twice")}


def _null_name(null: Metrics) -> str:
    return f"shuffled within {null['within']}" if null["within"] else "shuffled"


def _cross(r2: Mapping[str, Mapping[str, float | None]], sites: Sequence[str]) -> str:
    cells = [r2[source][target] for source, target in permutations(sites, 2)]
    if len(cells) <= 2:
        return " ".join(short(cell) for cell in cells)
    return _span([cell for cell in cells if finite(cell)])


def _span(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low}–{high}"


def _mean(values: Sequence[float | int]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:,.0f}" if mean == round(mean) or mean >= 9.95 else f"{mean:.1f}"


def _three(value: float | None) -> str:
    if not finite(value):
        return "–"
    return f"{value:.3f}".replace("0.", ".", 1).replace("-", "−")


def _with_null(value: float | None, null: float | None) -> str:
    return f"{short(value)} ({short(null)})" if finite(value) and finite(null) else short(value)
