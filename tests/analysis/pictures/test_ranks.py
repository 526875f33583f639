"""The ranks of two models on a page."""

from pathlib import Path

import numpy as np

from cpfean.analysis.pictures.ranks import NamedQuery, RankPanel, lay_out_ranks


def test_ranks_are_drawn_with_the_queries_that_changed_most(tmp_path: Path) -> None:
    ranks = np.array([[1, 1], [1, 1], [2, 9], [30, 3], [2, 9]])
    better = [NamedQuery((2, 9), "worth $2"), NamedQuery((2, 9), "two")], [NamedQuery((30, 3), "3")]
    panel = RankPanel(title="t", ranks=ranks, candidates=40, better=better)
    sheet = lay_out_ranks([panel, panel], names=("one", "other"), heading="h")
    written = [text.get_text() for text in sheet.page.texts]
    for text in ("better with one", "better with other", "worth $2", "30 \N{RIGHTWARDS ARROW} 3"):
        assert written.count(text) == 2
    assert written.count("1, 2") == 2  # one point, two queries
    dots = sheet.figure.axes[1].collections[0]
    assert len(dots.get_offsets()) == 3
    sizes = dict(zip(map(tuple, dots.get_offsets()), dots.get_sizes(), strict=True))
    assert sizes[1, 1] == sizes[2, 9] > sizes[30, 3]
    assert sheet.save(tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
