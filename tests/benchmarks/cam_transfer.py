"""Count how many CAM pictures of a run hold what they must, in their own model and in the others. Prints JSON.

    python tests/benchmarks/cam_transfer.py [RUN_DIR] [--latents top:8] [--start noise] [--steps 256]

What is not given is as the run's config has it. Without a run folder it does the demo in a temporary one. Of the best
picture of every mode and model: whether it is above every natural image in its own model (`above_all`), above 90 % of
the control latents in the others (`above_controls`), and of joint pictures whether they are above the 99th percentile
everywhere (`joint_99`). A latent counts when all its pictures do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from usae_probe import Run, RunConfig
from usae_probe.demo import prepare_demo
from usae_probe.pipeline import RunRecord
from usae_probe.world import one_thread


def held(card: dict[str, Any]) -> dict[str, Any]:
    alone = [picture for picture in card["pictures"] if picture["mode"] == "independent"]
    joint = [picture for picture in card["pictures"] if picture["mode"] == "joint"]
    elsewhere = {
        f"{picture['sites'][0]} in {site}": round(score["transfer"], 3)
        for picture in alone
        for site, score in picture["scores"].items()
        if site not in picture["sites"]
    }
    return {
        "latent": card["latent"],
        "above_all": all(picture["scores"][picture["sites"][0]]["above_all"] for picture in alone),
        "above_controls": all(share >= 0.9 for share in elsewhere.values()),
        "joint_99": all(score["percentile"] > 99 for picture in joint for score in picture["scores"].values()),
        "share_of_controls_below": elsewhere,
        "verdict": card["verdict"]["judgement"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", nargs="?", type=Path)
    parser.add_argument("--latents", default="top:8")
    parser.add_argument("--start", choices=["noise", "exemplar"])
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, one_thread():
        folder = args.run_dir or Path(temporary) / "demo"
        if args.run_dir is None:
            Run(prepare_demo(folder), folder).run(("harvest", "train", "evaluate"))
        config: RunConfig = RunRecord(folder).config()
        given = {"latents": args.latents, "start": args.start, "steps": args.steps}
        how = config.cam.model_dump() | {key: value for key, value in given.items() if value is not None}
        changed = config.model_copy(update={"cam": type(config.cam)(**how)})
        cam = Run(changed, folder).run(("cam",)).cam or {}
    cards = [held(card) for card in cam["cards"]]
    counts = {key: sum(card[key] for card in cards) for key in ("above_all", "above_controls", "joint_99")}
    counts["above_all and above_controls"] = sum(card["above_all"] and card["above_controls"] for card in cards)
    of = {"latents": len(cards), **how, "modes": cam["modes_counted"], "verdicts": cam["verdicts"]}
    print(json.dumps({"benchmark": "cam_transfer", **of, "counts": counts, "cards": cards}, indent=2))


if __name__ == "__main__":
    main()
