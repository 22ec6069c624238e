"""Policy losses of one token in Python floats, written from the formulas by cases: what the fast ones must equal."""

from __future__ import annotations

import math
from typing import NamedTuple

LOW, HIGH, DUAL, BOUND = 0.2, 0.3, 3.0, 0.2
TAU_POSITIVE, TAU_NEGATIVE = 1.0, 1.05


class Slow(NamedTuple):
    """What one token should give: loss, d loss / d logprob, and the bounds that act."""

    loss: float
    gradient: float
    low: bool = False
    high: bool = False
    dual: bool = False


def slow_clip(log_ratio: float, advantage: float, dual_clip: float, largest: float, least: float = -math.inf) -> Slow:
    """PPO's clip of one token by cases: which term it is, and whether that one moves with the log-probability."""
    clamped = max(least, min(largest, log_ratio))
    ratio, moves = math.exp(clamped), clamped == log_ratio
    if advantage > 0 and ratio > 1 + HIGH:
        return Slow(-advantage * (1 + HIGH), 0.0, high=True)
    if advantage < 0 and ratio < 1 - LOW:
        return Slow(-advantage * (1 - LOW), 0.0, low=True)
    if advantage < 0 and dual_clip and ratio > dual_clip:
        return Slow(-advantage * dual_clip, 0.0, dual=True)
    return Slow(-advantage * ratio, -advantage * ratio if moves else 0.0)


def slow_cispo(logprob: float, log_ratio: float, advantage: float) -> Slow:
    ratio = math.exp(max(-20.0, min(20.0, log_ratio)))
    weight = max(1 - LOW, min(1 + HIGH, ratio))
    return Slow(-weight * advantage * logprob, -weight * advantage, ratio < 1 - LOW, ratio > 1 + HIGH)


def slow_sapo(log_ratio: float, advantage: float) -> Slow:
    clamped = max(-20.0, min(20.0, log_ratio))
    ratio = math.exp(clamped)
    tau = TAU_POSITIVE if advantage > 0 else TAU_NEGATIVE
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    slope = gate * (1 - gate) * ratio if clamped == log_ratio else 0.0
    return Slow(-advantage * 4 / tau * gate, -advantage * 4 * slope)


def slow_dppo(then: float, now: float, advantage: float, divergence: float) -> Slow:
    """`then` and `now` are probabilities."""
    ratio = min(now / then, 20.0)
    if divergence > BOUND and advantage > 0 and now > then:
        return Slow(0.0, 0.0, high=True)
    if divergence > BOUND and advantage < 0 and now < then:
        return Slow(0.0, 0.0, low=True)
    return Slow(-advantage * ratio * math.log(now), -advantage * ratio)


def slow_binary_kl(then: float, now: float) -> float:
    others_then, others_now = max(1 - then, 1e-8), max(1 - now, 1e-8)
    return then * math.log(then / now) + others_then * math.log(others_then / others_now)


def slow_reinforce(logprob: float, advantage: float) -> Slow:
    return Slow(-advantage * logprob, -advantage)
