"""How many tokens go through the model at once, where the configuration leaves it to the memory of the GPU.

By the plan (grpo/plan.py) and the device's total memory, not by what is free: micro-batches are summed one
after the other, and bits shall not depend on what else runs. The number is written into the run's
configuration, so that a resumed run has the same.
"""

from __future__ import annotations

import dataclasses

from duologue.grpo.config import Config
from duologue.grpo.plan import make_plan, memory_limits, shape_of
from duologue.grpo.sections import TrainSection
from duologue.grpo.world import ALONE, World
from duologue.model.config import ModelConfig

# Tokens. More gain nothing: at 16,384 of a 4B model, reading and writing the sums takes 1 % of a micro-batch
# (bench/gpu_model.py).
STEP, MOST = 1_024, 32_768
SHARE = 0.9  # of the memory: the rest is for what the allocator cannot use between its blocks


def fitted(config: Config, ranks: int = 1, world: World = ALONE) -> Config:
    """`config` with a number in place of train.tokens_per_microbatch = 0: for `ranks` of the smallest memory
    among those of `world`.
    """
    if config.train.tokens_per_microbatch:
        return config
    memory = min(world.each(memory_limits(config.model.device)[0]))  # world
    shape = shape_of(config)
    if not memory or shape is None:
        return with_tokens(config, TrainSection().tokens_per_microbatch)
    return with_tokens(config, tokens_that_fit(config, shape, ranks, memory))


def tokens_that_fit(config: Config, shape: ModelConfig, ranks: int, memory: int) -> int:
    """The most tokens of which the plan fits the memory; the least where none do, of which check_memory says
    so.
    """
    fit, too_many = 1, MOST // STEP + 1  # in steps
    while too_many - fit > 1:
        n = (fit + too_many) // 2
        plan = make_plan(with_tokens(config, n * STEP), shape, ranks=ranks, memory=memory)
        needed = plan.peak if config.rollout.cache_tokens else plan.update  # a pool that takes what is free
        if needed <= SHARE * memory:
            fit = n
        else:
            too_many = n
    return fit * STEP


def with_tokens(config: Config, tokens: int) -> Config:
    train = dataclasses.replace(config.train, tokens_per_microbatch=tokens)
    return dataclasses.replace(config, train=train)
