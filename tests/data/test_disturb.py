"""Disturbances do what their definitions say, by hand and for any captions and shares."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpfean.data.disturb import (
    drop_words,
    noisy_features,
    replace_labels,
    replace_words,
    shuffle_words,
    touched,
    words_of,
)

SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5, 0.9, 1.0])
SEEDS = st.integers(0, 2**16)
COUNTS = st.lists(st.integers(0, 15), min_size=1, max_size=40)
# Every word another one, so that it can be followed; some with punctuation around.
LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=30)


def captions_of(lengths: list[int]) -> list[str]:
    words = iter(range(sum(lengths)))
    return [" ".join(f"w{next(words)}" for _ in range(length)) + " ." for length in lengths]


def rows(flat: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(counts)[:-1])


@given(counts=COUNTS, share=SHARES, seed=SEEDS)
def test_the_share_is_exact_and_every_row_has_its_own(
    counts: list[int], share: float, seed: int
) -> None:
    chosen = touched(np.array(counts), share, seed=seed)
    assert chosen.sum() == round(share * sum(counts))
    # A row's own share, rounded; the threshold that makes the whole exact moves it a little.
    for row, count in zip(rows(chosen, counts), counts, strict=True):
        assert abs(row.sum() - share * count) < 2


@given(counts=COUNTS, seed=SEEDS, spared=st.integers(0, 1), together=st.integers(1, 2))
def test_what_a_small_share_touches_a_larger_one_does_too(
    counts: list[int], seed: int, spared: int, together: int
) -> None:
    before = np.zeros(sum(counts), dtype=bool)
    for share in np.linspace(0, 1, 11):
        chosen = touched(np.array(counts), share, seed=seed, spared=spared, together=together)
        assert not (before & ~chosen).any()
        before = chosen


@given(counts=COUNTS, share=SHARES, seed=SEEDS)
def test_spared_positions_stay_and_couples_come_together(
    counts: list[int], share: float, seed: int
) -> None:
    chosen = touched(np.array(counts), share, seed=seed, spared=1)
    open_to_it = sum(max(0, count - 1) for count in counts)
    assert chosen.sum() == min(round(share * sum(counts)), open_to_it)
    assert all(not row.all() for row in rows(chosen, counts) if len(row))

    chosen = touched(np.array(counts), share, seed=seed, together=2)
    wanted = min(round(share * sum(counts)), sum(count for count in counts if count > 1))
    assert wanted - chosen.sum() in (0, 1)
    assert all(row.sum() != 1 for row in rows(chosen, counts))


@given(seed=SEEDS)
def test_every_position_is_as_likely_as_any_other(seed: int) -> None:
    # 300 rows of 7, a share of 2/7: each place of a row is taken about 86 times.
    chosen = touched(np.full(300, 7), 2 / 7, seed=seed).reshape(300, 7)
    assert (chosen.sum(axis=1) <= 3).all()
    assert np.abs(chosen.mean(axis=0) - 2 / 7).max() < 5 * np.sqrt(2 / 7 * 5 / 7 / 300)


@pytest.mark.parametrize("disturb", [drop_words, replace_words, shuffle_words])
def test_no_share_leaves_every_letter(disturb: object) -> None:
    captions = ["A  dog's tail,\tthen -- nothing .", "the dog", "?!"]
    assert disturb(captions, 0.0, seed=3) == captions  # type: ignore[operator]


def test_words_are_runs_of_letters_and_digits() -> None:
    assert words_of("A man's T-shirt, 2 dogs .") == ["A", "man's", "T", "shirt", "2", "dogs"]


@given(lengths=LENGTHS, share=SHARES, seed=SEEDS)
def test_dropping_leaves_the_other_words_in_order(
    lengths: list[int], share: float, seed: int
) -> None:
    captions = captions_of(lengths)
    left = drop_words(captions, share, seed=seed)
    total = sum(lengths)
    gone = total - sum(len(words_of(caption)) for caption in left)
    assert gone == min(round(share * total), total - len(lengths))
    for before, after in zip(captions, left, strict=True):
        assert after.endswith(".")
        kept = set(words_of(after))
        assert kept
        assert words_of(after) == [word for word in words_of(before) if word in kept]
        assert "  " not in after


@given(lengths=LENGTHS.filter(lambda x: sum(x) > 1), share=SHARES, seed=SEEDS)
def test_replacing_changes_exactly_its_share_of_places(
    lengths: list[int], share: float, seed: int
) -> None:
    captions = captions_of(lengths)
    known = {word for caption in captions for word in words_of(caption)}
    changed = 0
    for before, after in zip(captions, replace_words(captions, share, seed=seed), strict=True):
        assert len(words_of(after)) == len(words_of(before))
        assert set(words_of(after)) <= known
        changed += sum(a != b for a, b in zip(words_of(before), words_of(after), strict=True))
    assert changed == round(share * sum(lengths))


def test_a_word_is_replaced_by_the_same_one_at_any_share() -> None:
    captions = captions_of([7] * 20)
    half, all_of_them = (replace_words(captions, share, seed=1) for share in (0.5, 1.0))
    for before, some, every in zip(captions, half, all_of_them, strict=True):
        for old, one, other in zip(*map(words_of, (before, some, every)), strict=True):
            assert one in (old, other)


def test_a_word_is_never_replaced_by_itself_in_other_letters() -> None:
    after = replace_words(["Dog dog cat"] * 50, 1.0, seed=0)
    assert set(after) == {"cat cat dog", "cat cat Dog"}
    with pytest.raises(ValueError, match="no other one"):
        replace_words(["dog Dog", "DOG"], 0.5, seed=0)


@given(lengths=LENGTHS, share=SHARES, seed=SEEDS)
def test_shuffling_keeps_the_words_and_moves_exactly_its_share(
    lengths: list[int], share: float, seed: int
) -> None:
    captions = captions_of(lengths)
    moved = 0
    for before, after in zip(captions, shuffle_words(captions, share, seed=seed), strict=True):
        assert Counter(words_of(after)) == Counter(words_of(before))
        moved += sum(a != b for a, b in zip(words_of(before), words_of(after), strict=True))
    wanted = min(round(share * sum(lengths)), sum(n for n in lengths if n > 1))
    assert wanted - moved in (0, 1)


def test_punctuation_stays_where_it_is() -> None:
    (after,) = shuffle_words(["one, two; three."], 1.0, seed=0)
    assert "".join(c for c in after if not c.isalpha()) == ", ; ."


@given(share=SHARES, seed=SEEDS)
def test_labels_change_in_exactly_the_share_of_real_regions(share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 9, (12, 6)).astype(np.int32)
    counts = rng.integers(1, 7, 12)
    after = replace_labels(labels, share, counts=counts, num_labels=9, seed=seed)
    real = np.arange(6) < counts[:, None]
    assert after.dtype == labels.dtype
    assert ((after >= 0) & (after < 9)).all()
    assert (after != labels)[real].sum() == round(share * counts.sum())
    assert (after == labels)[~real].all()


def test_every_other_label_is_as_likely() -> None:
    labels = np.full((300, 10), 2)
    after = replace_labels(labels, 1.0, counts=np.full(300, 10), num_labels=4, seed=0)
    found = np.bincount(after.ravel(), minlength=4)
    assert found[2] == 0
    assert np.abs(found[[0, 1, 3]] - 1000).max() < 5 * np.sqrt(3000 * 2 / 9)
    with pytest.raises(ValueError, match="vocabulary has 1"):
        replace_labels(labels * 0, 0.5, counts=np.full(300, 10), num_labels=1, seed=0)


def test_noise_has_the_stated_size_for_vectors_of_any_size() -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(4, 3, 5000)) * [[[1], [10], [100]]]).astype(np.float32)
    noise = noisy_features(features, 0.5, seed=1) - features
    rms = np.sqrt(np.square(features).mean(axis=2))
    # Of 5000 draws the standard deviation is known to 1 %.
    np.testing.assert_allclose(noise.std(axis=2) / rms, 0.5, rtol=0.05)
    np.testing.assert_allclose(noise.mean(axis=2) / rms, 0, atol=0.05)
    twice = noisy_features(features, 1.0, seed=1) - features
    np.testing.assert_allclose(twice, 2 * noise, atol=1e-3)


def test_noise_of_the_first_regions_does_not_depend_on_how_many_follow() -> None:
    features = np.random.default_rng(0).normal(size=(3, 8, 6)).astype(np.float16)
    whole = noisy_features(features, 0.7, seed=5)
    assert whole.dtype == np.float16
    np.testing.assert_array_equal(noisy_features(features[:, :3], 0.7, seed=5), whole[:, :3])
    assert noisy_features(features, 0.0, seed=5) is features


@pytest.mark.parametrize("disturb", [drop_words, replace_words, shuffle_words])
def test_another_seed_disturbs_otherwise(disturb: object) -> None:
    captions = captions_of([9] * 10)
    first, again, other = (disturb(captions, 0.4, seed=seed) for seed in (0, 0, 1))  # type: ignore[operator]
    assert first == again
    assert first != other
