"""Clouds of points with labels, by numpy alone and by its frozen generator, so that other programs see the same."""

from __future__ import annotations

import numpy as np

# name: classes, features, spread of the classes' centres, whether the features are correlated
CLOUDS = {"few classes": (4, 10, 0.7, False), "many classes": (12, 20, 0.6, False), "correlated": (6, 12, 0.5, True)}
COUNT = 3000  # samples of training and of the test, of which a point of accuracy is thirty
PENALTIES = (1e-1, 1e-3, 1e-5)


def cloud(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training features (n, D) and classes (n,), and those of the test."""
    classes, width, spread, correlated = CLOUDS[name]
    draw = np.random.RandomState(0)
    centres = spread * draw.standard_normal((classes, width))
    mix = draw.standard_normal((width, width)) / width**0.5 if correlated else np.eye(width)
    ids = draw.randint(classes, size=2 * COUNT)
    x = ((centres[ids] + draw.standard_normal((2 * COUNT, width))) @ mix + 0.3).astype(np.float32)
    return x[:COUNT], ids[:COUNT], x[COUNT:], ids[COUNT:]


def sklearn_accuracies() -> dict[str, list[float]]:
    """Those of scikit-learn's multinomial logistic regression on standardised features: with each of the penalties, and
    with one that it chooses by cross-validation."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = {}
    for name in CLOUDS:
        x, ids, asked, truth = cloud(name)
        models = [LogisticRegression(C=1 / (p * len(x)), max_iter=2000, tol=1e-8) for p in PENALTIES]
        options = {"l1_ratios": (0,), "use_legacy_attributes": False, "scoring": "accuracy", "max_iter": 2000}
        models.append(LogisticRegressionCV(**options))
        found[name] = [round(make_pipeline(StandardScaler(), m).fit(x, ids).score(asked, truth), 4) for m in models]
    return found
