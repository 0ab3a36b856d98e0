import pytest
from pydantic import ValidationError

from dllm_core.errors import DllmError
from dllm_core.methods.layer_rule import layer_indices, layer_names
from dllm_core.methods.registry import room_method, room_names, room_options
from dllm_core.methods.requirements import RoomOptions


def test_rooms_are_the_packages_below_methods():
    assert {"ar", "random_mask", "repr_align", "trajectory"} <= set(room_names())
    for room in room_names():
        assert issubclass(room_options(room), RoomOptions)
        assert room_method(room).__module__ == f"dllm_core.methods.{room}.method"


@pytest.mark.parametrize("word", ["repr_aling", "protocol", "", "../ar", "ar.options"])
def test_an_unknown_room_is_refused_with_a_suggestion(word):
    with pytest.raises(DllmError, match="Unknown method") as error:
        room_options(word)
    assert len(str(error.value).splitlines()) == 2
    if word == "repr_aling":
        assert "Did you mean 'repr_align'?" in error.value.remedy


@pytest.mark.parametrize(
    ("room", "options"),
    [
        ("ar", {}),
        ("random_mask", {"path_wieght": 1.0}),
        ("random_mask", {"path_weight": -1}),
        ("repr_align", {"layers": "most"}),
        ("repr_align", {"layers": [-1]}),
        ("repr_align", {"token_fraction": 0.0}),
        ("trajectory", {"prefix_share": 1.0}),
        ("trajectory", {"mode": "guess"}),
        ("trajectory", {"block_sizes": []}),
        ("trajectory", {"ratio_max": 1.2}),
    ],
)
def test_unknown_keys_and_values_out_of_range_are_refused(room, options):
    with pytest.raises(ValidationError):
        room_options(room)(**options)


def test_layer_rules():
    assert layer_indices("quarters", 28) == (7, 14, 21, 28)
    assert layer_indices("quarters", 30) == (8, 15, 23, 30)
    assert layer_indices("quarters", 2) == (1, 2)
    assert layer_indices("all", 2) == (0, 1, 2)
    assert layer_names((28, 7, 0), 28) == ("embed", "7", "final")
    # layer N is the same post-norm tensor in both sets
    assert layer_names("quarters", 28)[-1] == layer_names("all", 28)[-1] == "final"
    for rule, num_layers, message in (((31,), 30, "do not all exist"), ((), 30, "empty"), ((7, 7), 30, "twice")):
        with pytest.raises(DllmError, match=message):
            layer_indices(rule, num_layers)


def test_what_each_room_needs_and_can_be_asked():
    ar, tuned = room_options("ar")(tuned=False), room_options("ar")(tuned=True)
    assert not ar.capabilities().trains
    assert tuned.capabilities().trains
    assert ar.capabilities().exact_likelihood
    assert not ar.capabilities().nelbo
    align, trajectory = room_options("repr_align")(), room_options("trajectory")()
    need = align.requirements(30).anchors
    assert need is not None
    assert len(need.layers) == 31
    assert need.positions == "response_predictors"
    assert room_options("repr_align")(teacher="live").requirements(30).anchors is None
    every = trajectory.requirements(30)
    assert every.anchors == need
    assert every.prefix is not None
    assert (every.prefix.cell, every.prefix.share) == ("repr_align_all", 0.4)
    assert every.trajectories is not None
    assert (every.trajectories.responses, every.trajectories.commit_steps) == (64, 8)
    groups = {room_options(room)().capabilities().speed_group for room in ("random_mask", "repr_align", "trajectory")}
    assert groups == {"token_space"}
    assert room_options("random_mask")().cost_factor() == 1.0
    assert room_options("repr_align")(teacher="live").cost_factor() == pytest.approx(4 / 3)
    # 0.4 of the budget with one view, 0.6 with 1.75 on average
    assert trajectory.cost_factor() == pytest.approx(0.4 + 0.6 * 1.75)


def test_a_layer_that_the_model_lacks_is_refused_before_anything_runs():
    with pytest.raises(DllmError, match="do not all exist in a model of 2 layers"):
        room_options("repr_align")(layers=[7, 14]).requirements(2)
