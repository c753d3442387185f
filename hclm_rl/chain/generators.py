"""What the links of a chain draw from."""

import zlib

import torch


def link_generator(seed: int, step: int, stage: str, link: str) -> torch.Generator:
    """A generator that depends on these alone: no state to save, the same on every process and under every trainer."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{step}/{stage}/{link}".encode()))
