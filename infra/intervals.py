"""Statistics with 95 % bootstrap intervals, and their cells of the table."""
import numpy as np


def bootstrap(statistic, *columns, resamples=2000, seed=0):
    """(value, low, high): a statistic of columns (N,), N >= 1, and its 95 % bootstrap interval.

    statistic takes one array (..., N) per column and reduces the last axis, as `mean` does.
    """
    columns = [np.asarray(column, dtype=float) for column in columns]
    count = len(columns[0])
    indices = np.random.default_rng(seed).integers(count, size=(resamples, count))
    low, high = np.percentile(statistic(*(column[indices] for column in columns)), (2.5, 97.5))
    return float(statistic(*columns)), float(low), float(high)


def mean(values):
    return values.mean(-1)


def ratio(values, counts):
    """A mean per token, say: the sum of values over the sum of counts."""
    return values.sum(-1) / counts.sum(-1)


def equal_length(gaps, length_gaps):
    """The score gap (..., N) -> (...) between two systems whose answers are equally long.

    The intercept of a linear regression of gaps on length gaps; the mean if all lengths agree.
    """
    x = length_gaps - length_gaps.mean(-1, keepdims=True)
    slope = (x * gaps).sum(-1) / np.maximum((x * x).sum(-1), 1e-9)
    return gaps.mean(-1) - slope * length_gaps.mean(-1)


def cell(form, statistic, *columns):
    """A statistic and its interval as text, over rows without nan; "-" if there is no such row."""
    known = ~np.isnan(sum(columns))  # (N,)
    if not known.any():
        return "-"
    numbers = bootstrap(statistic, *(column[known] for column in columns))
    value, low, high = (format(number, form) for number in numbers)
    return f"{value} [{low}, {high}]"
