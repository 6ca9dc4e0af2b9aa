"""Slow and obvious oracles: three loops each."""

import math

import torch


def attention(query, keys, values, visible, scale):
    """Query [B, Q, S, Dk], keys [B, H, T, Dk], values [B, H, T, Dv]; visible(b, h, s, t) is added.

    Returns output [B, Q, S, Dv] and log-sum-exp [B, Q, S], in float64, one number at a time.
    """
    B, Q, S, _ = query.shape
    H, T, Dv = keys.shape[1], keys.shape[2], values.shape[-1]
    out = torch.zeros(B, Q, S, Dv, dtype=torch.float64)
    lse = torch.full((B, Q, S), -math.inf, dtype=torch.float64)
    for b in range(B):
        for h in range(Q):
            for s in range(S):
                scores = []
                for t in range(T):
                    dot = sum(
                        float(x) * float(y)
                        for x, y in zip(query[b, h, s], keys[b, h * H // Q, t], strict=True)
                    )
                    scores.append(dot * scale + visible(b, h, s, t))
                total = sum(math.exp(x) for x in scores)
                if total == 0:
                    continue
                lse[b, h, s] = math.log(total)
                for t in range(T):
                    out[b, h, s] += math.exp(scores[t]) / total * values[b, h * H // Q, t].double()
    return out, lse
