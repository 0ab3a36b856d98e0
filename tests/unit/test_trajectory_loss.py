import math

import pytest
import torch

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.contract import Contract
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.order import SampleOrder
from dllm_core.errors import DllmError
from dllm_core.methods.protocol import Resources
from dllm_core.methods.repr_align.method import Method as ReprAlignMethod
from dllm_core.methods.repr_align.options import Options as ReprAlignOptions
from dllm_core.methods.trajectory.method import Method
from dllm_core.methods.trajectory.options import Options
from dllm_core.methods.trajectory.subset import looped, subset
from tests.method_tools import DictAnchors, DictTrajectories, corrupt, nll_rows, split_losses, step_info
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import tiny_backbone, tiny_model

LAYERS = ("embed", "1", "final")
TOKENS = 4  # so few that a random model is right now and then, and the entropy term takes part


def _stores(method: Method, batch) -> Resources:
    generator = torch.Generator().manual_seed(2)
    hidden = method.backbone.hidden_size
    states = {k: {n: torch.randn(batch.length, hidden, generator=generator) for n in LAYERS}
              for k in batch.sequence_keys}  # fmt: skip
    steps = torch.randint(6, batch.response_BL.shape, generator=generator).masked_fill(~batch.response_BL, -1)
    order = dict(zip(batch.sequence_keys, steps, strict=True))
    return Resources(anchors=DictAnchors(states), trajectories=DictTrajectories(order))


def _method(**options) -> Method:
    options = {"block_sizes": (4, 5, 6), "entropy_temperature": 0.5, **options}
    contract = Contract(mask_token_id=TOKENS, num_tokens=TOKENS)
    return Method(Backbone(tiny_model(vocab=64), contract).double(), Options(**options))


def _naive_rows(method: Method, batch, info, seed: int) -> list[dict]:
    """Re-derive each sequence's draws from the noise source; plain Python, one sequence at a time."""
    noise, options, found = NoiseSource(seed), method.options, []
    floor = options.ratio_max * info.phase_step / info.phase_steps
    sizes = options.block_sizes
    k = sizes[min(info.phase_step * len(sizes) // info.phase_steps, len(sizes) - 1)]
    for row in range(len(batch)):
        one = batch.rows(row, row + 1)
        rho = floor + float(noise.uniform(one, "ratio")) * (options.ratio_max - floor)
        is_random = float(noise.uniform(one, "kind")) < options.random_mask_fraction
        where = noise.uniform(one, "block", (batch.length,))[0]
        block, after = [], []
        for document in sorted(set(batch.document_BL[row].tolist()) - {-1}):
            own_L = batch.response_BL[row] & (batch.document_BL[row] == document)
            inside = [j for j in range(batch.length) if own_L[j]]
            blocks = [inside[i : i + k] for i in range(0, len(inside), k)]
            chosen = math.floor(float(where[document]) * len(blocks))
            block.append(blocks[chosen])
            after += [j for b in blocks[chosen + 1 :] for j in b]
        found.append({"rho": rho, "random": is_random, "blocks": block, "after": after})
    return found


def _entropy(logp_V: torch.Tensor, temperature: float) -> torch.Tensor:
    q = (logp_V / temperature).softmax(-1)
    return -(q * q.log()).sum()


def _naive_loss(method: Method, batch, info, resources: Resources, random_masks, seed: int = 0) -> torch.Tensor:
    """The loss of methods as written down: float64, one view of one sequence at a time."""
    options, shift = method.options, 1
    token_terms, align = [], {True: [], False: []}
    rows = _naive_rows(method, batch, info, seed)
    for row, draw in enumerate(rows):
        one = batch.rows(row, row + 1)
        steps = resources.trajectories.steps[batch.sequence_keys[row]]
        late, early = [], []
        for block in draw["blocks"]:
            ranked = sorted(block, key=lambda j: (int(steps[j]), j))
            kept = math.floor((1 - draw["rho"]) * len(block))
            early += ranked[:kept]
            late += ranked[kept:]
        if draw["random"]:
            views = [(random_masks[row].nonzero().flatten().tolist(), [])]
        else:
            views = [(late, draw["after"]), (early, draw["after"])]
        value = torch.zeros((), dtype=torch.float64)
        for masked, after in views:
            if not masked:
                continue
            noisy_BL, masked_BL = one.input_ids_BL.clone(), torch.zeros_like(one.response_BL)
            noisy_BL[0, masked + after] = TOKENS
            masked_BL[0, masked] = True
            with method.backbone.capture(LAYERS) as states:
                (predicted,) = nll_rows(method, one, noisy_BL, masked_BL)
            target = {j: int(one.input_ids_BL[0, j]) for j in masked}
            nll = {j: -predicted[j][target[j]] for j in masked}
            right = [j for j in masked if int(predicted[j].argmax()) == target[j]]
            if draw["random"]:
                path = sum(torch.exp(-v).detach() * v for v in nll.values()) / len(masked)
                value = value + sum(nll.values()) / len(masked) + options.path_weight * path
            else:
                entropy = sum((_entropy(predicted[j], options.entropy_temperature) for j in right), start=0.0)
                value = value + (sum(nll.values()) + options.entropy_weight * entropy) / len(masked) / 4
            for j in masked:
                for layer in LAYERS:
                    a = states[layer][0, j - shift].double()
                    b = resources.anchors.states[batch.sequence_keys[row]][layer][j - 1].double()
                    align[draw["random"]].append(1 - (a * b).sum() / a.norm() / b.norm())
        token_terms.append(value)
    total = torch.stack(token_terms).mean()
    for is_random, scale in ((True, 1.0), (False, 0.5)):
        if align[is_random]:
            share = sum(draw["random"] == is_random for draw in rows) / len(rows)
            total = total + options.weight * scale * share * torch.stack(align[is_random]).mean()
    return total


@pytest.mark.parametrize("step", [0, 4, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradient_equal_a_naive_loop(step, packed):
    method = _method(random_mask_fraction=0.3, path_weight=0.5)
    data = packed_sequences(6, (9, 7), 2, TOKENS) if packed else random_sequences(6, 18, 4, TOKENS)
    batch = data.batch_of(range(6))
    resources, info = _stores(method, batch), step_info("trajectory", step)
    corrupted, totals = corrupt(method, batch, info)
    kinds = corrupted.extras["random_B"]
    assert kinds.any()
    assert not kinds.all()
    loss, parts, grads = split_losses(method, corrupted, totals, [6], resources, info)
    assert parts["entropy_nats"] > 0
    method.zero_grad()
    expected = _naive_loss(method, batch, info, resources, corrupted.masked_BL)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in method.named_parameters():
        assert torch.allclose(grads[name], parameter.grad, rtol=1e-3, atol=1e-5), name


def test_splitting_a_batch_changes_neither_loss_nor_gradient():
    method = _method(token_fraction=0.5)
    batch = random_sequences(6, 18, 4, TOKENS).batch_of(range(6))
    resources, info = _stores(method, batch), step_info("trajectory", 6)
    corrupted, totals = corrupt(method, batch, info)
    loss, parts, grads = split_losses(method, corrupted, totals, [6], resources, info)
    for sizes in ([1] * 6, [2, 4]):
        again, split_parts, split_grads = split_losses(method, corrupted, totals, sizes, resources, info)
        assert again == pytest.approx(loss, rel=1e-6)
        assert split_parts == pytest.approx(parts, rel=1e-5)
        for name, grad in grads.items():
            assert torch.allclose(split_grads[name], grad, rtol=1e-4, atol=1e-7), name


def test_clean_before_the_block_masked_after_it_and_each_block_token_in_one_view():
    method = _method(random_mask_fraction=0.0)
    data = random_sequences(8, 18, 4, TOKENS)
    for epoch in range(5):
        batch = data.batch([(i, epoch) for i in range(8)])
        info = step_info("trajectory", 5)
        corrupted, totals = corrupt(method, batch, info)
        resources = _stores(method, batch)
        view = method.trajectory_view(corrupted, totals, method._ranks(corrupted, resources))
        seen = torch.zeros(8, 18, dtype=torch.long)
        for source, noisy_L, masked_L in zip(view.source_R.tolist(), view.noisy_RL, view.masked_RL, strict=True):
            seen[source] += masked_L
            block = corrupted.masked_BL[source].nonzero().flatten().tolist()
            is_mask = noisy_L == TOKENS
            assert torch.equal(noisy_L[~is_mask], batch.input_ids_BL[source][~is_mask])
            assert not bool(is_mask[: block[0]].any())
            assert bool(is_mask[block[-1] + 1 :].all())
            assert torch.equal(is_mask[block], masked_L[block])
            assert not bool(masked_L[block[-1] + 1 :].any())
        assert torch.equal(seen, corrupted.masked_BL.long())


def test_at_ratio_zero_one_view_is_empty_and_the_loss_is_finite():
    method = _method(random_mask_fraction=0.0, ratio_max=1e-9)
    batch = random_sequences(3, 18, 4, TOKENS).batch_of(range(3))
    resources, info = _stores(method, batch), step_info("trajectory", 0)
    corrupted, totals = corrupt(method, batch, info)
    corrupted.extras["kept_BL"] = corrupted.masked_BL.sum(1, keepdim=True).expand_as(corrupted.masked_BL)
    view = method.trajectory_view(corrupted, totals, method._ranks(corrupted, resources))
    assert len(view.source_R) == 3  # the other view would be empty, and is not forwarded
    loss, parts, grads = split_losses(method, corrupted, totals, [3], resources, info)
    assert math.isfinite(loss)
    assert all(bool(g.isfinite().all()) for g in grads.values())
    assert parts["ce_nats"] > 0


def test_cross_entropy_and_alignment_keep_their_ratio():
    """With both views full of the same loss, CE counts one half and so does alignment."""
    method = _method(random_mask_fraction=0.0, entropy_weight=0.0, path_weight=0.0, ratio_max=0.5)
    batch = random_sequences(4, 18, 4, TOKENS).batch_of(range(4))
    info = step_info("trajectory", 5)
    corrupted, totals = corrupt(method, batch, info)
    view = method.trajectory_view(corrupted, totals, method._ranks(corrupted, _stores(method, batch)))
    views_per_row = torch.bincount(view.source_R, minlength=4)
    assert bool((views_per_row == 2).all())
    assert float(view.ce_RL.sum()) == pytest.approx(0.5)
    assert float(view.align_RL.sum()) == pytest.approx(0.5)
    aligned = ReprAlignMethod(method.backbone, ReprAlignOptions(path_weight=0.0))
    plain = aligned.view(*corrupt(aligned, batch))
    assert float(plain.ce_RL.sum()) == pytest.approx(1.0)
    assert float(plain.align_RL.sum()) == pytest.approx(1.0)
    # alignment covers the loss block and nothing else
    assert torch.equal(view.align_RL > 0, view.masked_RL)


def test_the_student_phase_is_repr_align_and_shares_its_order():
    options = Options()
    method = Method(tiny_backbone(), options)
    aligned = ReprAlignMethod(tiny_backbone(), ReprAlignOptions())
    batch = random_sequences(4, 18, 4, TOKENS).batch_of(range(4))
    info = step_info("student", 3)
    (a, totals_a), (b, totals_b) = corrupt(method, batch, info), corrupt(aligned, batch, info)
    assert totals_a == totals_b
    assert torch.equal(a.noisy_BL, b.noisy_BL)
    resources = _stores(method, batch)
    first, second = (split_losses(m, a, totals_a, [4], resources, info) for m in (method, aligned))
    assert first[0] == second[0]
    order = SampleOrder(20, 0)
    assert method.select_samples(order, info) == aligned.select_samples(order, info)
    assert [(p.name, p.share) for p in method.phases()] == [("student", 0.4), ("trajectory", 0.6)]
    assert method.state_dict().keys() == aligned.state_dict().keys()


def test_curriculum_moves_blocks_and_ratio():
    method = Method(tiny_backbone(), Options())
    sizes = [method.block_size(step_info("trajectory", s, 9)) for s in range(9)]
    assert sizes == [16] * 3 + [24] * 3 + [32] * 3
    floors = [method.ratio_floor(step_info("trajectory", s, 8)) for s in range(8)]
    assert floors == pytest.approx([0.8 * s / 8 for s in range(8)])
    data = random_sequences(8, 60, 4, TOKENS)
    for step in (0, 7):
        ratios = []
        for epoch in range(20):
            batch = data.batch([(i, epoch) for i in range(8)])
            corrupted, _ = corrupt(method, batch, step_info("trajectory", step, 8))
            rows = ~corrupted.extras["random_B"]
            kept = corrupted.extras["kept_BL"].amax(1)[rows]
            size = corrupted.masked_BL.sum(1)[rows]
            ratios += (1 - kept / size).tolist()
        floor = 0.8 * step / 8
        # floor() keeps one token less at most, so the masked share is rho or up to 1/k above
        assert min(ratios) >= floor - 1e-6
        assert max(ratios) <= 0.8 + 1 / 4
        if step == 0:
            assert sum(ratios) / len(ratios) == pytest.approx(0.4, abs=0.1)


def test_a_quarter_of_the_sequences_keeps_random_masks():
    method = Method(tiny_backbone(), Options())
    batch = random_sequences(4, 40, 4, TOKENS).batch([(i % 4, i) for i in range(800)])
    corrupted, totals = corrupt(method, batch, step_info("trajectory", 0))
    share = float(corrupted.extras["random_B"].float().mean())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 800) ** 0.5
    assert totals["random_sequences"] == round(share * 800)


def test_the_phase_loops_over_a_fixed_subset_after_the_branch():
    order = SampleOrder(10, 0)
    chosen = subset(order, 8, 6)
    # the order continues over the end of the epoch; a sequence met twice counts once
    assert [s for s, _ in chosen] == list(dict.fromkeys(order[i][0] for i in range(8, 40)))[:6]
    assert chosen[0] == order[8]
    assert len(subset(order, 8, 64)) == 10
    second_round = [(sample_id, epoch + 1) for sample_id, epoch in chosen]
    assert looped(chosen, 4, 4) == [chosen[4], chosen[5], *second_round[:2]]
    method = Method(tiny_backbone(), Options(responses=6))
    seen = []
    for step in range(6):
        seen += method.select_samples(order, step_info("trajectory", step, 6, start=2, batch_size=4))
    assert seen == looped(chosen, 0, 24)
    assert len(set(seen)) == 24  # no (sample, epoch) repeats, so no noise repeats


def test_without_orders_the_phase_says_what_to_do():
    method = Method(tiny_backbone(), Options(random_mask_fraction=0.0))
    batch = random_sequences(2, 18, 4, TOKENS).batch_of(range(2))
    info = step_info("trajectory", 0)
    corrupted, totals = corrupt(method, batch, info)
    with pytest.raises(DllmError, match="no trajectory store"):
        method.loss(corrupted, totals, info, Resources())
