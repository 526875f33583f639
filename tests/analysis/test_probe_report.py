"""What probing found, as tables, files and pictures."""

from __future__ import annotations

import csv
from pathlib import Path

from cpfean.analysis.probe_report import (
    CurvePanel,
    ProbeResult,
    draw_curves,
    draw_objects,
    rsum_table,
    write_results,
)
from cpfean.metrics.retrieval import RetrievalMetrics

PNG = b"\x89PNG"


def results(variant: str, *rsums: float, **at: str | int | float) -> list[ProbeResult]:
    return [
        ProbeResult(
            variant=variant,
            model=f"{variant}-{number}",
            at=at,
            metrics=RetrievalMetrics.from_dict(
                {f"{way}_r{k}": rsum / 6 for way in ("i2t", "t2i") for k in (1, 5, 10)}
            ),
        )
        for number, rsum in enumerate(rsums)
    ]


def test_tables_show_the_mean_of_seeds_with_its_interval_and_files_show_each(
    tmp_path: Path,
) -> None:
    found = [
        *results("full", 300, 306, kind="x", share=0.0),
        *results("full", 200, 206, kind="x", share=0.5),
        *results("scan", 120, kind="x", share=0.0),
    ]
    table = rsum_table(found, rows=["kind"], columns=lambda each: str(each.at["share"]))
    # t(0.975; 1) s / sqrt(2) = 12.706 x 3
    assert table.splitlines() == [
        "| kind | variant | 0.0 | 0.5 |",
        "| --- | --- | ---: | ---: |",
        "| x | full | 303.0 ± 38.1 | 203.0 ± 38.1 |",
        "| x | scan | 120.0 |  |",
    ]
    with write_results(found, tmp_path / "deep/results.csv").open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [float(row["rsum"]) for row in written] == [300, 306, 200, 206, 120]
    assert list(written[0])[:4] == ["variant", "model", "kind", "share"]


def test_pictures_take_one_seed_or_many_and_more_variants_than_colours(tmp_path: Path) -> None:
    variants = [f"variant {number}" for number in range(9)]
    points = [
        (x, [each for name in variants for each in results(name, 100 - x, 110 - x)])
        for x in (0.0, 50.0)
    ]
    single = [(x, results("full", 100 - x)) for x in (0.0, 50.0)]
    panels = [
        CurvePanel(title="many", x_label="%", points=points),
        CurvePanel(title="one", x_label="%", points=single),
    ]
    file = draw_curves(panels, heading="heading", file=tmp_path / "a/curves.png")
    assert file.read_bytes()[:4] == PNG
    found = [
        each
        for name in variants
        for label in ("1", "2-5")
        for each in results(name, 100, 120, counted="objects", bin=label, images=4)
    ]
    titles = {"objects": "objects in an image"}
    file = draw_objects(found, titles=titles, heading="heading", file=tmp_path / "objects.png")
    assert file.read_bytes()[:4] == PNG
