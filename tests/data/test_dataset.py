"""Batches: what is in them, what training disturbs, and that sharding changes nothing."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpfean.config import TextConfig
from cpfean.data.batch import Batch, ImageBatch
from cpfean.data.caption_groups import CaptionGroups
from cpfean.data.dataset import BatchRequest, GlobalBatches, RetrievalDataset, WordFeatures
from cpfean.data.regions import RegionStore
from cpfean.data.split import Split, open_split
from cpfean.data.tokens import CaptionTokenizer, ParsedToken, Tokens, load_tokenizer
from cpfean.errors import ConfigError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "flickr8k-regions"
SENTENCE = "a black dog runs along the sunny beach while two children look at it"
WORDS = SENTENCE.split(" ")


def chained(captions: Any) -> Any:
    """A parser for which every word depends on the one before it."""
    for caption in captions:
        starts = [0] + [i + 1 for i, c in enumerate(caption) if c == " "]
        stops = [i for i, c in enumerate(caption) if c == " "] + [len(caption)]
        yield [
            ParsedToken(a, b, max(i - 1, 0))
            for i, (a, b) in enumerate(zip(starts, stops, strict=True))
        ]


def made(
    *,
    images: int = 8,
    regions: int = 12,
    counts: bool = False,
    boxes: bool = True,
    units: str = "words",
    graph: str = "dense",
    seed: int = 0,
    **options: Any,
) -> RetrievalDataset:
    """A data set in memory whose captions have from 1 to 14 words."""
    rng = np.random.default_rng(seed)
    captions = [" ".join(rng.permutation(WORDS)[: rng.integers(1, 15)]) for _ in range(5 * images)]
    number = np.full(images, regions)
    if counts:
        number = rng.integers(1, regions + 1, images)
    store = RegionStore(
        features=rng.normal(size=(images, regions, 6)).astype(np.float16),
        geometry=rng.random((images, regions, 5), dtype=np.float32) if boxes else None,
        iou=rng.random((images, regions, regions)).astype(np.float16) if boxes else None,
        labels=rng.integers(0, 9, (images, regions), dtype=np.int32) if boxes else None,
        confidences=rng.random((images, regions), dtype=np.float32) if boxes else None,
        counts=number,
    )
    split = Split(
        name="train",
        regions=store,
        captions=captions,
        image_ids=[str(i) for i in range(images)],
        groups=CaptionGroups.even(images),
        label_names=None,
    )
    tokenizer, tokens = tokenized(captions, units=units, graph=graph)
    return RetrievalDataset(split, tokens, tokenizer, seed=seed, **options)


def tokenized(
    captions: list[str], *, units: str = "words", graph: str = "dense"
) -> tuple[CaptionTokenizer, Tokens]:
    tokenizer = load_tokenizer(
        TextConfig(units=units, scratch_vocabulary=100),  # type: ignore[arg-type]
        train_captions=captions,
        max_tokens=64,
        graph=graph,  # type: ignore[arg-type]
        parser=chained if graph == "syntax" else None,
    )
    return tokenizer, tokenizer.encode(captions)


def request(pairs: Any, *, start: int = 0, stop: int | None = None, step: int = 3) -> BatchRequest:
    pairs = np.asarray(pairs)
    return BatchRequest(2, step, pairs, start, len(pairs) if stop is None else stop)


def there(field: torch.Tensor | None) -> torch.Tensor:
    assert field is not None
    return field


def flat(batch: Any) -> list[torch.Tensor | None]:
    if isinstance(batch, torch.Tensor) or batch is None:
        return [batch]
    return [tensor for part in batch for tensor in flat(part)]


def assert_same(first: Any, second: Any) -> None:
    for a, b in zip(flat(first), flat(second), strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def words_of(data: RetrievalDataset, batch: Any, row: int) -> list[list[int]]:
    """A caption of a batch: the pieces of each of its words."""
    words: list[list[int]] = [[] for _ in range(int(batch.word_mask[row].sum()))]
    for piece, word in zip(batch.tokens[row].tolist(), batch.word_index[row].tolist(), strict=True):
        if word >= 0:
            words[word].append(piece)
    return words


def test_an_image_comes_out_the_same_in_every_batch() -> None:
    data = made(counts=True)
    alone = [data.image_batch([image]) for image in range(8)]
    together = data.image_batch(np.array([5, 2, 2, 7, 0]))
    for row, image in enumerate((5, 2, 2, 7, 0)):
        for name in set(ImageBatch._fields) - {"shown_labels"}:
            field, single = getattr(together, name), getattr(alone[image], name)
            assert torch.equal(there(field)[row], there(single)[0])
    assert together.features.dtype == torch.float16
    assert there(together.labels).dtype == torch.int64
    assert there(together.iou).dtype == torch.float16
    assert together.features.shape == (5, 12, 6)
    counts = data.split.regions.counts[[5, 2, 2, 7, 0]]
    assert together.region_mask.sum(dim=1).tolist() == counts.tolist()


def test_what_the_split_lacks_is_none() -> None:
    data = made(boxes=False, region_dropout=0.5)
    for images in (data.image_batch([0, 1]), data.training_batch(request([0, 1])).images):
        lacking = {name for name, field in images._asdict().items() if field is None}
        assert lacking == {"geometry", "iou", "labels", "shown_labels", "confidences"}


def test_captions_are_padded_to_the_longest_given() -> None:
    data = made()
    chosen = [3, 17, 30]
    batch = data.caption_batch(chosen)
    tokens = data.tokens
    lengths = np.diff(tokens.offsets)[chosen]
    assert batch.tokens.shape == (3, lengths.max())
    assert batch.word_mask.shape == (3, tokens.num_words[chosen].max())
    for row, (caption, length) in enumerate(zip(chosen, lengths, strict=True)):
        place = slice(tokens.offsets[caption], tokens.offsets[caption + 1])
        assert batch.tokens[row, :length].tolist() == tokens.pieces[place].tolist()
        assert batch.word_index[row, :length].tolist() == tokens.word_index[place].tolist()
        assert batch.token_mask[row].tolist() == [k < length for k in range(lengths.max())]
        assert batch.word_mask[row].sum() == tokens.num_words[caption]
        assert (batch.tokens[row, length:] == 0).all()
        assert (batch.word_index[row, length:] == -1).all()


def test_training_without_noise_is_the_plain_batch() -> None:
    data = made(counts=True)
    pairs = [33, 2, 4, 19]
    batch = data.training_batch(request(pairs))
    assert_same(batch.images, data.image_batch([6, 0, 0, 3]))
    assert_same(batch.captions, data.caption_batch(pairs))
    assert batch.image_ids.tolist() == [6, 0, 0, 3]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    graph=st.sampled_from(["dense", "syntax"]),
)
def test_shards_put_together_are_the_global_batch(seed: int, cuts: list[int], graph: str) -> None:
    data = made(region_dropout=0.4, word_noise=0.5, counts=True, seed=seed, graph=graph)
    pairs = np.random.default_rng(seed).permutation(40)[:12]
    whole = data.training_batch(request(pairs))
    edges = [0, *sorted(cuts), 12]
    shards = [data.training_batch(request(pairs, start=a, stop=b)) for a, b in pairwise(edges)]
    for k, field in enumerate(flat(whole)):
        parts = [flat(shard)[k] for shard in shards]
        if field is None:
            assert parts == [None] * len(shards)
            continue
        together = torch.cat([p for p in parts if p is not None])
        # The labels that each one shows, which the batch shows once.
        assert torch.equal(
            together.unique() if field is whole.images.shown_labels else together, field
        )


def test_draws_differ_by_seed_epoch_and_step_and_by_nothing_else() -> None:
    data = made(region_dropout=0.4, word_noise=0.5)
    again, other = (
        RetrievalDataset(
            data.split,
            data.tokens,
            tokenized(data.split.captions)[0],
            region_dropout=0.4,
            word_noise=0.5,
            seed=seed,
        )
        for seed in (0, 1)
    )
    pairs = np.arange(40)
    first = data.training_batch(BatchRequest(0, 0, pairs, 0, 40))
    data.training_batch(BatchRequest(5, 5, pairs, 0, 40))  # leaves no trace
    assert_same(first, data.training_batch(BatchRequest(0, 0, pairs, 0, 40)))
    assert_same(first, again.training_batch(BatchRequest(0, 0, pairs, 0, 40)))
    for different in (
        data.training_batch(BatchRequest(1, 0, pairs, 0, 40)),
        data.training_batch(BatchRequest(0, 1, pairs, 0, 40)),
        other.training_batch(BatchRequest(0, 0, pairs, 0, 40)),
    ):
        assert not torch.equal(first.images.features, different.images.features)
        assert first.captions.tokens.shape != different.captions.tokens.shape or not torch.equal(
            first.captions.tokens, different.captions.tokens
        )


@settings(max_examples=25)
@given(seed=st.integers(0, 99), dropout=st.floats(0.01, 0.99), counts=st.booleans())
def test_region_dropout_keeps_a_share_in_order(seed: int, dropout: float, counts: bool) -> None:
    data = made(region_dropout=dropout, counts=counts, seed=seed)
    pairs = np.random.default_rng(seed).permutation(40)[:9]
    images = data.training_batch(request(pairs)).images
    stored = data.split.regions
    expected = []
    for row, image in enumerate(pairs // 5):
        real = stored.counts[image]
        kept = max(1, round((1 - dropout) * real))
        expected.append(kept)
        assert images.region_mask[row].tolist() == [
            r < kept for r in range(images.features.shape[1])
        ]
        features = stored.features[image, :real]
        places = [
            int(np.flatnonzero((features == vector.numpy()).all(axis=1))[0])
            for vector in images.features[row, :kept]
        ]
        assert places == sorted(set(places))  # in order, none twice
        assert stored.geometry is not None
        assert stored.iou is not None
        assert stored.labels is not None
        assert stored.confidences is not None
        np.testing.assert_array_equal(
            there(images.geometry)[row, :kept], stored.geometry[image, places]
        )
        np.testing.assert_array_equal(
            there(images.labels)[row, :kept], stored.labels[image, places]
        )
        np.testing.assert_array_equal(
            there(images.confidences)[row, :kept], stored.confidences[image, places]
        )
        np.testing.assert_array_equal(
            there(images.iou)[row, :kept, :kept], stored.iou[image][np.ix_(places, places)]
        )
    assert images.features.shape[1] == max(expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_batch_lists_the_labels_that_it_shows(dropout: float) -> None:
    images = made(region_dropout=dropout).training_batch(request(np.arange(7, 12))).images
    assert there(images.shown_labels).tolist() == sorted(
        set(there(images.labels).flatten().tolist())
    )
    without = made(boxes=False, region_dropout=dropout)
    assert without.training_batch(request(np.arange(7, 12))).images.shown_labels is None


def test_every_region_is_dropped_equally_often() -> None:
    data = made(images=1, regions=12, region_dropout=1 / 3)
    assert data.split.regions.labels is not None
    data.split.regions.labels[0] = np.arange(12)
    times = np.zeros(12)
    for step in range(400):
        labels = there(data.training_batch(request(np.arange(5), step=step)).images.labels)
        assert labels.shape == (5, 8)
        times += np.bincount(labels.flatten(), minlength=12)
    # 2000 draws of 8 out of 12: three standard deviations are 0.032.
    np.testing.assert_allclose(times / 2000, 8 / 12, atol=0.04)


def test_pairs_of_one_image_draw_their_own_regions() -> None:
    data = made(images=1, regions=12, region_dropout=0.5)
    features = data.training_batch(request(np.arange(5))).images.features
    assert len({tuple(row.flatten().tolist()) for row in features}) > 1


@pytest.mark.parametrize("units", ["words", "pieces"])
def test_word_noise_masks_replaces_and_deletes_in_the_stated_shares(units: str) -> None:
    noise = 0.3
    data = made(images=40, word_noise=noise, units=units, seed=1)
    tokenizer, _ = tokenized(data.split.captions, units=units)
    special = set(tokenizer.special_ids.tolist())
    untouched = masked = replaced = deleted = total = 0
    for step in range(40):
        pairs = np.arange(200)
        batch = data.training_batch(request(pairs, step=step)).captions
        plain = data.caption_batch(pairs)
        for row in range(200):
            before, after = words_of(data, plain, row), words_of(data, batch, row)
            frame = before[:1] + before[-1:] if units == "pieces" else []
            if frame:
                assert after[:1] + after[-1:] == frame
                before, after = before[1:-1], after[1:-1]
            assert after
            if len(before) < 5:
                continue  # in short captions, the word that is never deleted shifts the shares
            total += len(before)
            deleted += len(before) - len(after)
            for word in after:
                if word[0] == tokenizer.mask_id:
                    assert set(word) == {tokenizer.mask_id}  # all pieces of a word, or none
                    masked += 1
                elif word in before:
                    untouched += 1
                else:
                    assert not set(word) & special
                    replaced += 1
    shares = np.array([untouched, masked, replaced, deleted]) / total
    # About 60,000 words; a random piece is the very one before once in a hundred times.
    np.testing.assert_allclose(
        shares, [1 - noise, noise * 0.5, noise * 0.1, noise * 0.4], atol=0.01
    )


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99), noise=st.floats(0.01, 0.99), units=st.sampled_from(["words", "pieces"])
)
def test_disturbed_captions_are_whole_captions(seed: int, noise: float, units: str) -> None:
    data = made(word_noise=noise, seed=seed, units=units)
    batch = data.training_batch(request(np.arange(40))).captions
    plain = data.caption_batch(np.arange(40))
    assert batch.word_mask.any(dim=1).all()
    assert (batch.word_index[~batch.token_mask] == -1).all()
    for row in range(40):
        length = int(batch.token_mask[row].sum())
        tokens, index = batch.tokens[row, :length], batch.word_index[row, :length]
        whole = plain.tokens[row, plain.token_mask[row]]
        assert (tokens[0], tokens[-1]) == (whole[0], whole[-1])
        words = index[index >= 0]
        assert (words.diff() >= 0).all()
        assert words.unique().tolist() == list(range(int(batch.word_mask[row].sum())))


def test_the_only_word_is_never_deleted() -> None:
    data = made(images=40, word_noise=0.99)
    short = np.flatnonzero(data.tokens.num_words == 1)
    assert len(short)
    for step in range(50):
        batch = data.training_batch(request(short, step=step)).captions
        assert batch.word_mask.sum(dim=1).tolist() == [1] * len(short)


def test_links_lose_the_deleted_words_and_keep_the_others() -> None:
    data = made(word_noise=0.6, graph="syntax")
    plain = data.caption_batch(np.arange(40))
    assert plain.word_links is not None
    for row in range(40):
        n = int(data.tokens.num_words[row])
        chain = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 1
        np.testing.assert_array_equal(plain.word_links[row, :n, :n], chain)
        assert not plain.word_links[row, n:].any()
    batch = data.training_batch(request(np.arange(40))).captions
    word_links = there(batch.word_links)
    for row in range(40):
        n = int(batch.word_mask[row].sum())
        links = word_links[row]
        assert links[:n, :n].diagonal().all()
        assert torch.equal(links, links.T)
        assert not links[n:].any()
        neighbours = links[:n, :n].sum() - n
        # A chain of words with gaps has at most the edges of one without, fewer if one was cut.
        assert neighbours <= 2 * (n - 1)
    kept = batch.word_mask.sum(dim=1)
    shorter = kept < plain.word_mask.sum(dim=1)
    edges = (word_links.sum(dim=(1, 2)) - kept)[shorter]
    assert (edges < 2 * (kept[shorter] - 1)).any()


def test_frozen_word_features_travel_with_their_captions() -> None:
    plain = made()
    tokens = plain.tokens
    offsets = np.concatenate([[0], np.cumsum(tokens.num_words)])
    values = np.random.default_rng(0).normal(size=(offsets[-1], 4)).astype(np.float32)
    tokenizer, _ = tokenized(plain.split.captions)
    features = WordFeatures(values, offsets)
    data = RetrievalDataset(plain.split, tokens, tokenizer, word_features=features)
    pairs = np.array([8, 31, 2, 8])
    whole = data.caption_batch(pairs)
    for row, caption in enumerate(pairs):
        n = tokens.num_words[caption]
        expected = values[offsets[caption] : offsets[caption + 1]]
        np.testing.assert_array_equal(there(whole.word_features)[row, :n], expected)
        assert not there(whole.word_features)[row, n:].any()
    shard = data.training_batch(request(pairs, start=1, stop=3)).captions
    assert torch.equal(there(shard.word_features), there(whole.word_features)[1:3])
    assert plain.caption_batch(pairs).word_features is None

    with pytest.raises(ConfigError, match=r"data\.word_noise must be 0"):
        RetrievalDataset(plain.split, tokens, tokenizer, word_noise=0.1, word_features=features)
    offsets = offsets.copy()
    offsets[1] += 1
    wrong = WordFeatures(values, offsets)
    with pytest.raises(ValueError, match="not of these tokens"):
        RetrievalDataset(plain.split, tokens, tokenizer, word_features=wrong)


def test_tokens_of_other_captions_are_refused() -> None:
    data = made()
    tokenizer, tokens = tokenized(data.split.captions[:-1])
    with pytest.raises(ValueError, match="39 tokenized captions of 40"):
        RetrievalDataset(data.split, tokens, tokenizer)


@settings(max_examples=50)
@given(
    num_pairs=st.integers(1, 60),
    batch_size=st.integers(1, 80),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_workers_share_every_batch_and_an_epoch_has_every_pair_once(
    num_pairs: int, batch_size: int, world_size: int, epoch: int
) -> None:
    size = min(batch_size, num_pairs)
    if size < world_size:
        with pytest.raises(ConfigError, match=r"optim\.batch_size"):
            GlobalBatches(num_pairs, batch_size, seed=0, epoch=epoch, world_size=world_size)
        return
    ranks = [
        GlobalBatches(num_pairs, batch_size, seed=0, epoch=epoch, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    steps = list(zip(*ranks, strict=True))
    assert len(steps) == len(ranks[0]) == num_pairs // size
    seen: list[int] = []
    for number, step in enumerate(steps):
        assert {(r.epoch, r.step) for r in step} == {(epoch, number)}
        assert all(np.array_equal(r.pairs, step[0].pairs) for r in step)
        assert len(step[0].pairs) == size
        # Shares follow each other and differ by one at most, the larger ones first.
        assert [r.start for r in step] == [0, *(r.stop for r in step[:-1])]
        assert step[-1].stop == size
        shares = [r.stop - r.start for r in step]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] - shares[-1] <= 1
        seen += step[0].pairs.tolist()
    assert len(set(seen)) == len(seen) == num_pairs // size * size
    assert set(seen) <= set(range(num_pairs))


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = GlobalBatches(40, 10, seed=seed, epoch=epoch)
        assert [r.pairs.tolist() for r in batches] == [r.pairs.tolist() for r in batches]
        return tuple(p for r in batches for p in r.pairs.tolist())

    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3


def test_a_batch_moves_whole() -> None:
    data = made(boxes=False, graph="syntax")
    batch = data.training_batch(request([0, 7, 9])).to("meta")
    assert isinstance(batch, Batch)
    tensors = [tensor for tensor in flat(batch) if tensor is not None]
    assert len(tensors) == 2 + 5 + 1
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.images.geometry is None
    assert batch.captions.word_features is None


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data set is not on this machine")
def test_a_batch_of_the_real_data_set_has_two_thirds_of_the_regions() -> None:
    split = open_split(REAL, "dev", num_regions=36)
    tokenizer, tokens = tokenized(split.captions)
    data = RetrievalDataset(split, tokens, tokenizer, region_dropout=1 / 3, word_noise=0.2)
    batch = data.training_batch(next(iter(GlobalBatches(len(data), 128, seed=0, epoch=0))))
    assert batch.images.features.shape == (128, 24, 256)
    assert batch.images.region_mask.all()
    assert torch.isfinite(batch.images.features).all()
    assert torch.equal(there(batch.images.iou).diagonal(dim1=1, dim2=2), torch.ones(128, 24).half())
