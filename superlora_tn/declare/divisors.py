"""Whole numbers: exact roots, and divisors without trying them one by one."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache

SMALL_PRIMES = tuple(p for p in range(2, 1000) if all(p % d for d in range(2, math.isqrt(p) + 1)))
# Miller-Rabin with these as bases is exact below 3.3e24 (Sorenson and Webster 2015).
WITNESSES = SMALL_PRIMES[:13]
# Pollard's steps between two greatest common divisors, which cost as much as some tens of steps.
STRIDE = 64


def root(size: int, order: int) -> int:
    """The largest whole number whose `order`-th power is at most `size`, by Newton's steps from above."""
    if order == 1:
        return size
    guess = 1 << -(-size.bit_length() // order)
    while True:
        better = ((order - 1) * guess + size // guess ** (order - 1)) // order
        if better >= guess:
            return guess
        guess = better


def largest_divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`, in about the fourth root of `size` steps."""
    if size % most == 0:
        return most
    divisors = [1]
    for prime, count in Counter(primes(size)).items():
        powers = [prime**k for k in range(1, count + 1)]
        divisors += [d * power for d in divisors for power in powers if d * power <= most]
    return max(divisors)


@lru_cache(maxsize=4096)
def primes(size: int) -> tuple[int, ...]:
    """The prime factors of a whole number, each as often as it divides."""
    found = []
    for prime in SMALL_PRIMES:
        while size % prime == 0:
            found.append(prime)
            size //= prime
        if size < prime * prime:
            break
    left = [size] if size > 1 else []
    while left:
        part = left.pop()
        if is_prime(part):
            found.append(part)
        else:
            factor = _factor(part)
            left += [factor, part // factor]
    return tuple(found)


def is_prime(size: int) -> bool:
    """Whether a whole number is prime (Miller and Rabin)."""
    if size < 2 or any(size % prime == 0 for prime in WITNESSES):
        return size in WITNESSES
    odd, twos = size - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(size, witness, odd, twos) for witness in WITNESSES)


def _passes(size: int, witness: int, odd: int, twos: int) -> bool:
    """Whether a witness, with ``size - 1 = odd * 2**twos``, says nothing against a prime."""
    power = pow(witness, odd, size)
    for _ in range(twos):
        if power in (1, size - 1):
            break
        power = power * power % size
    return power == size - 1 or (power == 1 and pow(witness, odd, size) == 1)


def _factor(size: int) -> int:
    """A proper factor of a number that is not prime and has no small factor (Pollard's rho, after Brent)."""
    if (side := math.isqrt(size)) ** 2 == size:
        return side
    shift = 1
    while True:
        ahead, reach, common, held, product = 2, 1, 1, 2, 1
        start = ahead
        while common == 1:
            held = ahead
            for _ in range(reach):
                ahead = (ahead * ahead + shift) % size
            done = 0
            while done < reach and common == 1:
                start = ahead
                for _ in range(min(STRIDE, reach - done)):
                    ahead = (ahead * ahead + shift) % size
                    product = product * abs(held - ahead) % size
                common, done = math.gcd(product, size), done + STRIDE
            reach *= 2
        if common == size:  # several factors in one stride: step by step
            common = 1
            while common == 1:
                start = (start * start + shift) % size
                common = math.gcd(abs(held - start), size)
        if common != size:
            return common
        shift += 1
