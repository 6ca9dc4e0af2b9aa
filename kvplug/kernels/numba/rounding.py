"""Compiled: rounding of keys with error feedback, as `kvplug/codecs/feedback.py` specifies it."""

import numpy as np
from numba import njit

TINY = np.float32(1e-30)


# sums may be taken in any order, by vectors
@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"})
def round_blocks(x, scale, zero, order, weights, top, codes):
    """Write codes [R, D, G] of blocks x [R, D, G], with scale and zero [R, D].

    order [M, D] and weights [M, D, D] serve R / M neighbouring blocks each; top: the largest code.
    One thread: all blocks of a prompt take a hundredth of its prefill.
    """
    R, D, G = x.shape
    top = np.float32(top)
    errors = np.empty((D, G), np.float32)
    lost = np.empty(G, np.float32)
    for r in range(R):
        m = r * len(order) // R
        for j in range(D):
            lost[:] = 0
            weight = weights[m, j]
            for i in range(0, j - j % 4, 4):  # one pass over `lost` for four channels
                a, b, c, d = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
                for t in range(G):
                    lost[t] += (a * errors[i, t] + b * errors[i + 1, t]) + (
                        c * errors[i + 2, t] + d * errors[i + 3, t]
                    )
            for i in range(j - j % 4, j):
                for t in range(G):
                    lost[t] += weight[i] * errors[i, t]
            channel = order[m, j]
            step, low = scale[r, channel], zero[r, channel]
            inverse = np.float32(1) / max(step, TINY)
            for t in range(G):
                own = x[r, channel, t]
                number = (own - low) * inverse
                code = np.rint(number - lost[t] * inverse)
                code = min(max(code, np.floor(number)), np.ceil(number))
                code = min(max(code, np.float32(0)), top)
                errors[j, t] = code * step + low - own
                codes[r, channel, t] = np.uint8(code)
