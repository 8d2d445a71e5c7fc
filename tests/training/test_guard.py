# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import json
import math

import pytest

from diffusers_greedy_grow.training.guard import GradientGuard


def test_gradient_guard():
    guard = GradientGuard(factor=10, limit=2)
    assert guard.accept(500) and all(guard.accept(1 + step / 100) for step in range(30))
    assert not guard.accept(12.5) and not guard.accept(math.nan)
    means = guard.compute()
    assert means["grad_norm_max"] == 500 and means["skipped_steps"] == 2 and 10 < means["grad_norm"] < 20

    resumed = GradientGuard(factor=10, limit=2)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for one in (guard, resumed):
        with pytest.raises(FloatingPointError, match="for 3 steps in a row; the last one was 12"):
            one.accept(12)
        assert one.accept(9) and one.skipped_in_a_row == 0 and one.skipped_steps == 3


def test_the_gradient_guard_remembers_a_hundred_norms():
    guard = GradientGuard(factor=10, limit=2)
    assert all(guard.accept(norm) for norm in [1.0] * 60 + [5.0] * 40) and not guard.accept(11)
    assert all(guard.accept(5.0) for _ in range(15)) and guard.accept(11)
