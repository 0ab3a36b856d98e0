"""Variants of a row are named once, and their settings come after those that hold for all."""

from __future__ import annotations

import pytest

import params
from benchmarks.row_variants import arguments, parsed


def test_a_variant_is_a_name_and_settings_of_the_grid() -> None:
    args = arguments(["--cell", "vfm", "--variants", "base; lr = cells.vfm.train.lr=3e-4,budget.value=7 ;"])
    found = parsed(args.variants)
    assert found == {"base": "", "lr": "cells.vfm.train.lr=3e-4,budget.value=7"}
    spec = params.load(args.preset, cells=args.cell, overrides=f"budget.value=5,{found['lr']}")
    assert spec.budget is not None
    assert spec.budget.value == 7
    assert spec.rows()[0].train.lr == 3e-4


@pytest.mark.parametrize("text", ["base;base=budget.value=1", "cells.vfm.train.lr=3e-4"])
def test_settings_without_a_name_of_their_own_are_refused(text: str) -> None:
    with pytest.raises(SystemExit, match="name of its own"):
        parsed(text)
