import pytest
import torch

from dllm_core.corruption.masks import subset_weights
from dllm_core.corruption.noise import NoiseSource
from dllm_core.errors import DllmError
from dllm_core.methods.layer_rule import layer_names
from dllm_core.methods.protocol import Corrupted, Resources
from dllm_core.methods.random_mask.method import Method as RandomMaskMethod
from dllm_core.methods.random_mask.options import Options as RandomMaskOptions
from dllm_core.methods.repr_align.alignment import alignment_loss
from dllm_core.methods.repr_align.method import Method
from dllm_core.methods.repr_align.options import Options
from tests.method_tools import DictAnchors, corrupt, nll_rows, split_losses, step_info
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone

ALL = ["embed", "1", "2", "final"]


def _teacher_states(backbone, batch) -> dict[str, dict[str, torch.Tensor]]:
    """Return key -> layer -> states [L, D] by transformers' own `output_hidden_states`, one sequence at a time."""
    found = {}
    for row, key in enumerate(batch.sequence_keys):
        spans = [batch.document_BL[row] == d for d in batch.document_BL[row].unique().tolist() if d >= 0]
        states = {name: torch.full((batch.length, backbone.hidden_size), torch.nan).double() for name in ALL}
        for span_L in spans:
            with torch.no_grad():
                out = backbone.model.model(
                    batch.input_ids_BL[row, span_L][None], is_causal=True, output_hidden_states=True
                )
            for name, layer in zip(ALL, (*out.hidden_states[:-1], out.last_hidden_state), strict=True):
                states[name][span_L] = layer[0].double()
        found[key] = states
    return found


def _naive_align(method, batch, noisy_BL, masked_BL, teacher, layers) -> torch.Tensor:
    shift = 1 if method.backbone.contract.alignment == "shifted" else 0
    with method.backbone.capture(layers) as states:
        method.backbone.hidden(noisy_BL, causal=False, document_BL=batch.document_BL, position_BL=batch.position_BL)
    terms = []
    for row, token in masked_BL.nonzero().tolist():
        for layer in layers:
            a = states[layer][row, token - shift].double()
            b = teacher[batch.sequence_keys[row]][layer][token - 1].double()
            terms.append(1 - (a * b).sum() / a.norm() / b.norm())
    return torch.stack(terms).mean()


def _setup(alignment="shifted", **options):
    backbone = tiny_backbone(layers=3, alignment=alignment).double()
    batch = packed_sequences(4, (7, 6), 3, NUM_TOKENS).batch_of(range(4))
    teacher = _teacher_states(backbone, batch)
    method = Method(backbone, Options(**options))
    with torch.no_grad():  # the student has moved away from the teacher
        for parameter in method.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    return method, batch, teacher, Resources(anchors=DictAnchors(teacher))


@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
@pytest.mark.parametrize("layers", ["all", "quarters", (0, 2)])
def test_loss_and_gradient_equal_a_naive_loop(alignment, layers):
    method, batch, teacher, resources = _setup(alignment, layers=layers, weight=10.0, path_weight=1.0)
    names = {"all": ALL, "quarters": ["1", "2", "final"], (0, 2): ["embed", "2"]}[layers]
    assert list(method.layers) == names
    corrupted, totals = corrupt(method, batch)
    loss, parts, grads = split_losses(method, corrupted, totals, [3, 1], resources)

    method.zero_grad()
    align = _naive_align(method, batch, corrupted.noisy_BL, corrupted.masked_BL, teacher, names)
    tokens = []
    for row, predicted in enumerate(nll_rows(method, batch, corrupted.noisy_BL, corrupted.masked_BL)):
        nll = torch.stack([-logp_V[int(batch.input_ids_BL[row, j])] for j, logp_V in predicted.items()])
        tokens.append((nll + torch.exp(-nll).detach() * nll).mean())
    expected = torch.stack(tokens).mean() + 10 * align
    expected.backward()
    assert parts["align"] == pytest.approx(float(align.detach()), rel=1e-5)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in method.named_parameters():
        assert torch.allclose(grads[name], parameter.grad, rtol=1e-3, atol=1e-6), name


def test_a_causal_student_on_clean_input_is_aligned_perfectly():
    method = Method(tiny_backbone("qwen3", layers=3), Options(teacher="live", path_weight=0.0))
    batch = packed_sequences(3, (7, 6), 2, NUM_TOKENS).batch_of(range(3))
    response_BL = batch.response_BL
    clean = Corrupted(batch, batch.input_ids_BL, response_BL, {"align_BL": response_BL.float()})
    for causal, is_zero in ((True, True), (False, False)):
        method.causal = causal
        out = method.loss(clean, method.totals(clean), step_info(), Resources())
        assert (abs(float(out.parts["align"])) < 1e-6) == is_zero
        assert out.teacher_flops > 0


def test_live_and_cached_teacher_agree_and_the_teacher_gets_no_gradient():
    backbone = tiny_backbone(layers=3)
    batch = random_sequences(3, 12, 4, NUM_TOKENS).batch_of(range(3))
    teacher = _teacher_states(backbone, batch)
    live = Method(backbone, Options(teacher="live"))
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.mul_(1.1)
    cached = Method(backbone, Options())
    corrupted, totals = corrupt(cached, batch)
    states = {key: {n: s.float().requires_grad_() for n, s in layers.items()} for key, layers in teacher.items()}
    loss, _, grads = split_losses(cached, corrupted, totals, [3], Resources(anchors=DictAnchors(states)))
    live_loss, _, live_grads = split_losses(live, corrupted, totals, [3])
    assert live_loss == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == live_grads.keys()
    for name in grads:
        assert torch.allclose(grads[name], live_grads[name], atol=1e-5), name
    assert all(s.grad is None for layers in states.values() for s in layers.values())
    own = live._teacher[0]
    assert all(p.grad is None and not p.requires_grad for p in own.parameters())
    # nor is it part of the model
    assert {id(p) for p in own.parameters()}.isdisjoint(id(p) for p in live.parameters())
    assert live.state_dict().keys() == cached.state_dict().keys()


def test_the_two_cells_differ_in_the_layer_set_alone():
    four, every = Options(layers="quarters"), Options(layers="all")
    assert {k for k, v in four.model_dump().items() if v != every.model_dump()[k]} == {"layers"}
    assert layer_names("quarters", 28) == ("7", "14", "21", "final")
    assert layer_names("quarters", 30) == ("8", "15", "23", "final")
    assert layer_names("all", 30) == ("embed", *map(str, range(1, 30)), "final")
    batch = random_sequences(3, 12, 4, NUM_TOKENS).batch_of(range(3))
    methods = [Method(tiny_backbone(layers=8), o) for o in (four, every)]
    (a, _), (b, _) = (corrupt(m, batch) for m in methods)
    assert torch.equal(a.noisy_BL, b.noisy_BL)
    assert torch.equal(a.extras["align_BL"], b.extras["align_BL"])
    # the same network at inference, and the same corruption as the baseline
    assert torch.equal(*(m.masked_nll(batch, a.masked_BL).nll_BL for m in methods))
    assert methods[0].capabilities == methods[1].capabilities
    baseline = RandomMaskMethod(methods[0].backbone, RandomMaskOptions())
    assert torch.equal(corrupt(baseline, batch)[0].noisy_BL, a.noisy_BL)


def test_aligned_on_a_subset_of_positions_is_unbiased_and_split_invariant():
    method, batch, teacher, resources = _setup(token_fraction=0.25, path_weight=0.0)
    corrupted, totals = corrupt(method, batch)
    full = float(_naive_align(method, batch, corrupted.noisy_BL, corrupted.masked_BL, teacher, ALL).detach())
    values = []
    for seed in range(30):
        drawn = method.corrupt(batch, step_info(), NoiseSource(seed))
        # the positions of another draw on the same mask
        corrupted.extras["align_BL"] = subset_weights(corrupted.masked_BL, batch, NoiseSource(seed), 0.25, "align")
        assert drawn.extras["align_BL"].gt(0).sum() < drawn.masked_BL.sum()
        values.append(split_losses(method, corrupted, totals, [4], resources)[1]["align"])
    values = torch.tensor(values)
    assert abs(float(values.mean()) - full) < 4 * float(values.std()) / len(values) ** 0.5
    assert float(values.std()) > 0
    whole = split_losses(method, corrupted, totals, [4], resources)
    parts = split_losses(method, corrupted, totals, [1, 3], resources)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)


def test_an_unbounded_row_read_would_show_as_nan():
    """Rows that are not needed may be missing from the store: only predictors of response tokens are read."""
    method, batch, teacher, _ = _setup()
    needed_BL = torch.zeros_like(batch.response_BL)
    needed_BL[:, :-1] = batch.response_BL[:, 1:]
    for row, key in enumerate(batch.sequence_keys):
        for states_LD in teacher[key].values():
            states_LD[~needed_BL[row]] = torch.nan
    corrupted, totals = corrupt(method, batch)
    loss, _, _ = split_losses(method, corrupted, totals, [4], Resources(anchors=DictAnchors(teacher)))
    assert loss == loss


def test_weight_zero_is_the_baseline_and_a_missing_store_is_an_error():
    batch = random_sequences(3, 12, 4, NUM_TOKENS).batch_of(range(3))
    off, base = Method(tiny_backbone(), Options(weight=0.0)), RandomMaskMethod(tiny_backbone(), RandomMaskOptions())
    corrupted, totals = corrupt(off, batch)
    assert split_losses(off, corrupted, totals, [3])[0] == split_losses(base, *corrupt(base, batch), [3])[0]
    assert Options(weight=0.0).requirements(2).anchors is None
    on = Method(tiny_backbone(), Options())
    with pytest.raises(DllmError, match="no anchor store") as error:
        split_losses(on, corrupted, totals, [3])
    assert len(str(error.value).splitlines()) == 2


def test_alignment_survives_activation_checkpointing():
    method, batch, _, resources = _setup()
    corrupted, totals = corrupt(method, batch)
    plain = split_losses(method, corrupted, totals, [4], resources)
    method.backbone.enable_activation_checkpointing()
    method.train()
    again = split_losses(method, corrupted, totals, [4], resources)
    assert again[0] == pytest.approx(plain[0], rel=1e-9)
    for name, grad in plain[2].items():
        assert torch.allclose(again[2][name], grad, rtol=1e-7, atol=1e-10), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_hand_made_gradient_is_that_of_the_cosine(dtype):
    generator = torch.Generator().manual_seed(0)
    states_RLD = torch.randn(3, 5, 8, generator=generator).to(dtype).requires_grad_()
    rows = (torch.tensor([2, 0, 0, 1]), torch.tensor([4, 0, 3, 2]))
    target_MD, weight_M = torch.randn(4, 8, generator=generator).to(dtype), torch.tensor([0.1, 0.4, 0.2, 0.3])
    found = alignment_loss({"1": states_RLD}, rows, {"1": target_MD}, weight_M)
    (3 * found).backward()
    exact_RLD = states_RLD.detach().double().requires_grad_()
    cosine_M = torch.nn.functional.cosine_similarity(exact_RLD[rows], target_MD.double(), dim=-1)
    expected = (weight_M.double() * (1 - cosine_M)).sum()
    (3 * expected).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert torch.allclose(states_RLD.grad.double(), exact_RLD.grad, rtol=tolerance, atol=tolerance)


def test_a_state_of_zeros_is_no_nan():
    states_RLD = torch.zeros(1, 2, 4, requires_grad=True)
    rows = (torch.tensor([0]), torch.tensor([1]))
    loss = alignment_loss({"1": states_RLD}, rows, {"1": torch.ones(1, 4)}, torch.ones(1))
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert bool(states_RLD.grad.isfinite().all())
