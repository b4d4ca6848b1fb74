"""Tensors that reach past 2^31 elements: how far, for the fixture `memory` and those who place tensors in it."""

REACH = 2**31 + 2**29  # from a tensor's first element to its last; less than 2^31 is one step: larger strides are 64-bit anyhow
ROOM = 2**20  # between two tensors that lie interleaved
