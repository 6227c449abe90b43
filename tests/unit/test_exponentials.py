"""exp and log of the kernels against the C library's, to units in the last place."""

from __future__ import annotations

import numpy as np


def test_they_are_within_two_units_in_the_last_place():
    from optimer_engine.kernels.blocks import loop
    from optimer_engine.kernels.exponentials import exp_down, log_near

    @loop
    def over(x, y, exps, logs):
        for j in range(len(x)):
            exps[j] = exp_down(x[j])
            logs[j] = log_near(y[j])

    random = np.random.default_rng(0)
    count = 200_000
    x = -np.exp(random.uniform(-40, np.log(699), count))
    x[:2] = 0.0, -0.0
    close = 1 + random.uniform(-1, 1, count) * 10.0 ** random.uniform(-16, 0, count)
    y = np.where(np.arange(count) % 2, np.abs(close) + 1e-9, np.exp(random.uniform(-18, 18, count)))
    y[:6] = 1.0, 2.0, 0.5, np.sqrt(0.5), np.nextafter(1, 0), np.nextafter(1, 2)
    exps, logs = np.empty(count), np.empty(count)
    over(x, y, exps, logs)
    for found, exact in ((exps, np.exp(x)), (logs, np.log(y))):
        assert (np.abs(found - exact) / np.spacing(np.abs(exact))).max() <= 2.5
    beyond = np.array([-700.5, -np.inf, np.nan])
    over(beyond, np.ones(3), exps[:3], logs[:3])
    assert (exps[:3] < 1e-300).all() and (logs[:3] == 0).all()
