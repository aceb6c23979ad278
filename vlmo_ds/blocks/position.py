"""Positions. Relative position bias: which row of the table belongs to a pair of tokens; initial absolute positions of images.

One parameter [distances, layers x heads] serves all layers and all three kinds of sequence (VLMo, section 3;
BEiT, arXiv:2106.08254). With w patches per side, R = (2w-1)^2 + 3 and T = 2 * max_text_len_of_initckpt:

    rows 0 .. R-4            image patch to image patch, by (row, column) of query minus key
    R-3, R-2, R-1            class token to patch, patch to class token, class token to itself
    R, R+1                   text to image, image to text
    R+2 .. R+T+1             text: to text by key minus query; the last three rows are its class token's
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def num_image_distances(window: int) -> int:
    return (2 * window - 1) ** 2 + 3


def num_distances(window: int, max_text_len_of_initckpt: int) -> int:
    """Rows of the whole table."""
    return num_image_distances(window) + 2 * max_text_len_of_initckpt + 2


def with_class_token(index_LL: Tensor, class_to_other: int) -> Tensor:
    """Puts a class token before the other tokens; its three rows begin at class_to_other."""
    length = len(index_LL) + 1
    full = index_LL.new_empty(length, length)
    full[1:, 1:] = index_LL
    full[0, :] = class_to_other
    full[:, 0] = class_to_other + 1
    full[0, 0] = class_to_other + 2
    return full


def image_position_index(window: int) -> Tensor:
    """[w*w + 1, w*w + 1] int64: class token, then the patches row by row."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    down = row[:, None] - row[None, :] + window - 1
    right = column[:, None] - column[None, :] + window - 1
    return with_class_token(down * (2 * window - 1) + right, num_image_distances(window) - 3)


def text_position_index(window: int, text_len: int, max_text_len_of_initckpt: int) -> Tensor:
    """[text_len, text_len] int64: class token, then the other text tokens."""
    position = torch.arange(text_len - 1)
    offset = max_text_len_of_initckpt - 2 + num_image_distances(window) + 2
    index = position[None, :] - position[:, None] + offset
    return with_class_token(index, num_distances(window, max_text_len_of_initckpt) - 3)


def joint_position_index(window: int, text_len: int, max_text_len_of_initckpt: int) -> Tensor:
    """[text_len + w*w + 1] squared, int64: text tokens, then image tokens. Its diagonal blocks are the two above."""
    text = text_position_index(window, text_len, max_text_len_of_initckpt)
    image = image_position_index(window)
    text_to_image = text.new_full((len(text), len(image)), num_image_distances(window))
    image_to_text = text.new_full((len(image), len(text)), num_image_distances(window) + 1)
    return torch.cat((torch.cat((text, text_to_image), 1), torch.cat((image_to_text, image), 1)), 0)


def sincos_positions(side: int, width: int) -> Tensor:
    """[side * side, width] float32 with a mean square of 1: sines and cosines of the row in one half, of the column in the other, of wavelengths
    from 2 pi to 10,000 * 2 pi (arXiv:2205.01580). width: a multiple of 4."""
    frequency = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    angle_SF = torch.arange(side)[:, None] * frequency
    along_SW = torch.cat((angle_SF.sin(), angle_SF.cos()), dim=1) * 2**0.5
    rows, columns = along_SW[:, None].expand(-1, side, -1), along_SW[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=2).flatten(0, 1)


@torch.no_grad()
def begin_positions(positions: Tensor, kind: str, std: float) -> None:
    """Initial positions of a class token, then of the patches of a square, [..., 1 + P, D], in place. kind: "normal", or "sincos" for
    sincos_positions times std (the class token's are zero)."""
    if kind == "normal":
        torch.nn.init.normal_(positions, std=std)
        return
    table = positions.view(positions.shape[-2:])
    table[0] = 0
    table[1:] = std * sincos_positions(math.isqrt(len(table) - 1), table.shape[1])
