"""Whole-number arithmetic that several parts need."""


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up to a whole number."""
    return -(-a // b)
