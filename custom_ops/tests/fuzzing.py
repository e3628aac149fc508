"""What the fuzzers of the ops share: the loop that spoils valid calls, and numbers that fit nowhere."""

import collections
import os
import re
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf

INT64 = np.iinfo(np.int64)
INT32 = np.iinfo(np.int32)


def rogue(rng, below, above, limits):
    """A number below `below` or not below `above`: near the edge, or as far as the type goes."""
    near = int(rng.integers(1, 100))
    low = [below - near, limits.min, limits.min + near]
    high = [above + near - 1, limits.max, limits.max - near, above]
    return int(rng.choice([v for v in low if v < below] + [v for v in high if v >= above]))


def other_size(rng, size):
    """A size that is not `size`: none, one less, one more, or far more."""
    return int(rng.choice([n for n in (0, size - 1, size + 1, 3 * size + 2) if 0 <= n != size]))


def campaign(library, calls, seed, problem, spoilers):
    """Makes `calls` malformed calls, each of which must be refused for the right reason.

    `problem(rng)` returns the name of an op, its arguments, and a function that raises unless it is
    given the right result. A spoiler changes the arguments in place and returns a pattern of the
    message that it expects. In between, valid problems must give the right result, so that an op
    that refuses everything does not pass.
    """
    rng = np.random.default_rng(seed)
    refused = collections.Counter()
    valid = 0
    while refused.total() < calls:
        op, arguments, check = problem(rng)
        where = f"call {refused.total()} of seed {seed}, {op}"
        if rng.random() < 0.05:
            try:
                check(getattr(library, op)(**arguments))
            except AssertionError as error:
                sys.exit(f"{where}: a valid call gave a wrong result: {error}")
            valid += 1
            continue
        spoil = spoilers[rng.integers(len(spoilers))]
        pattern = spoil(arguments, rng)
        try:
            getattr(library, op)(
                **{
                    k: v if isinstance(v, int | str) else tf.constant(v)
                    for k, v in arguments.items()
                }
            )
        except tf.errors.InvalidArgumentError as error:
            if not re.search(pattern, error.message):
                sys.exit(f"{where}, {spoil.__name__}: expected {pattern!r}, got: {error.message}")
            refused[spoil.__name__] += 1
        else:
            sys.exit(f"{where}, {spoil.__name__}: accepted")
    print(f"{refused.total()} malformed calls refused, {valid} valid ones right")
    print(dict(refused))
