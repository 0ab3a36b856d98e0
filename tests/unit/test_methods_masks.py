from collections import Counter
from itertools import combinations

import pytest
import torch

from dllm_core.corruption.masks import (
    choose_blocks,
    complementary_views,
    kept_in_block,
    masks_of_count,
    ranks_in_block,
    subset_weights,
    uniform_masks,
)
from dllm_core.corruption.noise import NoiseSource
from tests.sequences import packed_sequences, random_sequences


def test_given_a_mask_the_count_is_uniform_and_every_subset_of_a_count_is_equally_likely():
    data = random_sequences(1, 5, 2, 9)
    batch = data.batch([(0, epoch) for epoch in range(6000)])
    masked_BL = uniform_masks(batch, NoiseSource(3))
    assert bool(masked_BL.any(1).all())
    seen = Counter(tuple(row.nonzero().flatten().tolist()) for row in masked_BL)
    for count in (1, 2, 3):
        subsets = list(combinations((2, 3, 4), count))
        for subset in subsets:
            expected = 6000 / 3 / len(subsets)
            # five standard deviations of a binomial count
            assert abs(seen[subset] - expected) < 5 * expected**0.5, (subset, seen[subset], expected)
    assert sum(seen.values()) == 6000


def test_masks_depend_on_the_row_alone_and_change_with_epoch_and_seed():
    data = random_sequences(6, 20, 4, 9)
    whole = uniform_masks(data.batch_of(range(6)), NoiseSource(0))
    assert torch.equal(uniform_masks(data.batch_of([4, 1]), NoiseSource(0)), whole[[4, 1]])
    assert not torch.equal(uniform_masks(data.batch([(i, 1) for i in range(6)]), NoiseSource(0)), whole)
    assert not torch.equal(uniform_masks(data.batch_of(range(6)), NoiseSource(1)), whole)


def test_rows_without_response_tokens_stay_unmasked():
    batch = packed_sequences(2, (1, 1), 2, 9).batch_of([0, 1])
    assert not bool(uniform_masks(batch, NoiseSource(0)).any())


def test_masks_of_count_are_exact_and_stay_in_the_response():
    response_BL = random_sequences(4, 12, 3, 9).batch_of(range(4)).response_BL
    noise = NoiseSource(0)
    counts = torch.tensor([0, 1, 5, 9])
    masked_BL = masks_of_count(response_BL, counts, [noise.generator(i, 0, "m") for i in range(4)])
    assert masked_BL.sum(1).tolist() == [0, 1, 5, 9]
    assert not bool((masked_BL & ~response_BL).any())
    alone = masks_of_count(response_BL[2:3], [5], [noise.generator(2, 0, "m")])
    assert torch.equal(alone[0], masked_BL[2])
    with pytest.raises(AssertionError, match="10 masks asked for"):
        masks_of_count(response_BL[:1], [10], [noise.generator(0, 0, "m")])


def test_subset_weights_estimate_the_sum_without_bias():
    data = random_sequences(1, 9, 2, 9)
    batch = data.batch([(0, epoch) for epoch in range(4000)])
    positions_BL = batch.response_BL
    weight_BL = subset_weights(positions_BL, batch, NoiseSource(0), 0.25, "align")
    assert ((weight_BL > 0).sum(1) == 2).all()  # ceil(7 / 4)
    assert torch.allclose(weight_BL.sum(1), torch.full((4000,), 7.0))
    mean_L = weight_BL.mean(0)
    assert torch.allclose(mean_L[2:], torch.ones(7), atol=0.15)
    assert (mean_L[:2] == 0).all()
    assert torch.equal(subset_weights(positions_BL, batch, NoiseSource(0), 1.0, "align"), positions_BL.float())


@pytest.mark.parametrize("block_size", [16, 24, 32, 100])
def test_blocks_cover_the_response_and_ranks_match_sorting(block_size):
    # 37 response tokens: every size leaves a ragged last block
    batch = random_sequences(3, 40, 3, 9).batch_of(range(3))
    generator = torch.Generator().manual_seed(0)
    steps_BL = torch.randint(8, (3, 40), generator=generator, dtype=torch.int32).masked_fill(~batch.response_BL, -1)
    covered = torch.zeros(3, 40, dtype=torch.long)
    num_blocks = -(-37 // block_size)
    for index in range(num_blocks):
        uniform_BL = torch.full((3, 40), (index + 0.5) / num_blocks)
        blocks = choose_blocks(batch.response_BL, batch.document_BL, block_size, uniform_BL)
        start = 3 + index * block_size
        stop = min(start + block_size, 40)
        assert blocks.block_BL[0].nonzero().flatten().tolist() == list(range(start, stop))
        assert blocks.after_BL[0].nonzero().flatten().tolist() == list(range(stop, 40))
        assert blocks.size_BL[0, start:stop].tolist() == [stop - start] * (stop - start)
        rank_BL = ranks_in_block(steps_BL, blocks.block_BL, batch.document_BL)
        for row in range(3):
            order = sorted(range(start, stop), key=lambda j: (int(steps_BL[row, j]), j))
            assert [int(rank_BL[row, j]) for j in order] == list(range(stop - start))
            assert (rank_BL[row, :start] == -1).all()
        covered += blocks.block_BL
    assert torch.equal(covered, batch.response_BL.long())


def test_reranking_masks_the_last_committed_first():
    # forwards of 2 tokens each, in blocks of 4; re-ranked in one block of 8 the order is kept and ties go by position
    batch = random_sequences(1, 9, 1, 9).batch_of([0])
    steps_BL = torch.tensor([[-1, 1, 0, 0, 1, 3, 2, 3, 2]])
    blocks = choose_blocks(batch.response_BL, batch.document_BL, 8, torch.zeros(1, 9))
    rank_BL = ranks_in_block(steps_BL, blocks.block_BL, batch.document_BL)
    assert rank_BL.tolist() == [[-1, 2, 0, 1, 3, 6, 4, 7, 5]]
    late_BL, _ = complementary_views(rank_BL, blocks.block_BL, kept_in_block(blocks.size_BL, torch.tensor([0.5])))
    assert late_BL[0].nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_views_are_complementary_at_every_ratio_and_empty_at_the_ends():
    batch = random_sequences(4, 21, 1, 9).batch_of(range(4))
    blocks = choose_blocks(batch.response_BL, batch.document_BL, 20, torch.zeros(4, 21))
    rank_BL = ranks_in_block(torch.arange(21).expand(4, 21), blocks.block_BL, batch.document_BL)
    kept_BL = kept_in_block(blocks.size_BL, torch.tensor([0.0, 0.33, 0.8, 1.0]))
    late_BL, early_BL = complementary_views(rank_BL, blocks.block_BL, kept_BL)
    assert torch.equal(late_BL | early_BL, blocks.block_BL)
    assert not bool((late_BL & early_BL).any())
    # floor((1 - rho) 20) = 20, 13, 3 or 4 by rounding of the ratio, 0
    assert late_BL.sum(1).tolist()[:2] == [0, 7]
    assert late_BL.sum(1).tolist()[3] == 20
    assert early_BL.sum(1).tolist()[0] == 20


def test_every_document_of_a_packed_row_gets_a_block_of_its_own():
    batch = packed_sequences(1, (5, 8), 2, 9).batch_of([0])
    uniform_BL = torch.zeros(1, 15)
    uniform_BL[0, 1] = 0.99
    blocks = choose_blocks(batch.response_BL, batch.document_BL, 3, uniform_BL)
    assert blocks.block_BL[0].nonzero().flatten().tolist() == [1, 2, 3, 12]
    assert blocks.after_BL[0].nonzero().flatten().tolist() == [4]
    assert blocks.size_BL[0].tolist() == [0, 3, 3, 3] + [0] * 8 + [1, 0, 0]
    steps_BL = -torch.arange(15)[None]
    assert ranks_in_block(steps_BL, blocks.block_BL, batch.document_BL)[0, [1, 2, 3, 12]].tolist() == [2, 1, 0, 0]
