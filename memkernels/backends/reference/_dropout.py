"""Which weights of attention are dropped: a hash of (seed[b], head h, query q, key k).

All words have 32 bits, sums and products are modulo 2^32, `>>` is logical:
    mix(x): x ^= x >> 16; x *= 0x85EBCA6B; x ^= x >> 13; x *= 0xC2B2AE35; x ^= x >> 16
    a = mix(mix(low(seed) + q * 0x9E3779B9) + h * 0x9E3779B9);  c = mix(a ^ high(seed))               one pair a row
    x = a + k * 0x9E3779B9; x ^= x >> 16; x *= 0x85EBCA6B; x ^= c; x ^= x >> 13; x *= 0xC2B2AE35; x ^= x >> 16
    kept if x >= floor(dropout_p * 2^32), a kept weight is multiplied by 1 / (1 - dropout_p); dropout_p = 1 keeps nothing.
"""

import torch

WORD, GOLDEN, FIRST, SECOND = 0xFFFFFFFF, 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def kept(seed, dropout_p, scores):
    """What each weight is multiplied by: 0 or 1 / (1 - dropout_p)."""
    if not dropout_p:
        return 1.0
    if dropout_p == 1:
        return 0.0
    _, n_head, n_query, n_key = scores.shape
    head, query, key = (torch.arange(n, device=seed.device) for n in (n_head, n_query, n_key))
    seed = seed[:, None, None]
    a = mix((mix(((seed & WORD) + query * GOLDEN) & WORD) + head[:, None] * GOLDEN) & WORD)
    c = mix(a ^ (seed >> 32 & WORD))
    x = (a[..., None] + key * GOLDEN) & WORD
    x = ((x ^ (x >> 16)) * FIRST & WORD) ^ c[..., None]
    x = (x ^ (x >> 13)) * SECOND & WORD
    return ((x ^ (x >> 16)) >= int(dropout_p * 2**32)).to(scores.dtype) / (1 - dropout_p)


def mix(x):
    x = (x ^ (x >> 16)) * FIRST & WORD
    x = (x ^ (x >> 13)) * SECOND & WORD
    return x ^ (x >> 16)
