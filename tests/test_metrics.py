"The interval of a mean: known answers, seeds, and numbers that stand in records."
import numpy as np
import pytest

from dd3g.metrics import bootstrap

X = np.random.RandomState(0).normal(18, 3, 29) # one number an object

def test_known_answers():
    low, high = bootstrap(np.arange(29.)); se = np.std(np.arange(29.))/29**.5
    assert low == pytest.approx(14-1.96*se, abs=.25) and high == pytest.approx(14+1.96*se, abs=.25)
    assert bootstrap([3.]) == (3., 3.) == bootstrap([3., 3., 3.]) and bootstrap([0., 1.]) == (0., 1.)
    assert bootstrap(X+5) == pytest.approx(np.add(bootstrap(X), 5)) and bootstrap(2*X) == pytest.approx(np.multiply(bootstrap(X), 2))

@pytest.mark.parametrize('n', [400, 1000, 2500, 10_000])
@pytest.mark.parametrize('draws', [lambda: np.random.default_rng(3).integers, lambda: np.random.RandomState(0).randint])
def test_resamples_in_parts(n, draws):
    "Resamples are made a thousand at a time; how many at a time changes nothing."
    assert bootstrap(X, n, draw=draws()) == tuple(np.percentile(X[draws()(len(X), size=(n, len(X)))].mean(1), [2.5, 97.5]))

def test_seeds():
    assert bootstrap(X) == bootstrap(list(X)) != bootstrap(X, seed=1)

def test_numbers_that_stand_in_records():
    "Scores, evaluations and tables were recorded with these draws: other ones would change them all."
    assert bootstrap(X) == pytest.approx((18.011032719429682, 20.36468844074906), abs=1e-9)
    assert bootstrap(X, draw=np.random.RandomState(0).randint) == pytest.approx((18.027529542403194, 20.404189501476726), abs=1e-9)
