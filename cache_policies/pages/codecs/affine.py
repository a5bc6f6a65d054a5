"""Min-max quantized pages: the part that KIVI, FlexGen and the rotated codecs share.

Values are always quantized per token, in groups of channels. Keys are quantized per
channel in groups of tokens (KIVI) or per token in groups of channels (the others).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from cache_policies.pages.codecs import packing
from cache_policies.pages.codecs.base import Codec, Views
from cache_policies.pages.field import Field


@dataclass(frozen=True)
class AffineCodec(Codec):
    """A codec whose pages hold packed codes with a float16 scale and minimum per group."""

    @property
    @abstractmethod
    def key_bits(self) -> int:
        """Bits of a key code."""

    @property
    @abstractmethod
    def value_bits(self) -> int:
        """Bits of a value code."""

    @property
    @abstractmethod
    def keys_per_channel(self) -> bool:
        """True: key groups run over tokens. False: over channels, like value groups."""

    @property
    def groups_tokens(self) -> bool:
        return self.keys_per_channel

    @property
    def takes_key_offset(self) -> bool:
        return not self.keys_per_channel  # the minimum of a channel is one

    def channel_group(self, head_size: int) -> int:
        """Channels of a token that share a scale."""
        return self.divisor

    def fields(
        self,
        head_size: int,
        page_tokens: int,
        model_dtype: torch.dtype,
        packed: str = packing.LANES,
    ) -> tuple[Field, ...]:
        by_token = (head_size // self.channel_group(head_size), page_tokens)
        by_channel = (page_tokens // self.divisor, head_size)
        key_scales = by_channel if self.keys_per_channel else by_token
        return (
            packing.key_field(packed, page_tokens, head_size, self.key_bits),
            Field("key_scale", torch.float16, key_scales),
            Field("key_min", torch.float16, key_scales),
            packing.value_field(packed, page_tokens, head_size, self.value_bits),
            Field("value_scale", torch.float16, by_token),
            Field("value_min", torch.float16, by_token),
        )

    def write(self, views: Views, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        end = start + key.shape[1]
        keys = packing.unpack_keys(views["key"], self.key_bits)
        if self.keys_per_channel:
            codes, scale, minimum = packing.quantize(
                key.unflatten(1, (-1, self.divisor)), self.key_bits, axis=2
            )
            keys[:, start:end] = codes.flatten(1, 2)
            groups = slice(start // self.divisor, end // self.divisor)
            views["key_scale"][:, groups] = scale.squeeze(2)
            views["key_min"][:, groups] = minimum.squeeze(2)
        else:
            keys[:, start:end] = self._write_by_token(views, "key", self.key_bits, start, key)
        views["key"].copy_(packing.pack_keys(keys, self.key_bits, views["key"].dtype))
        values = packing.unpack_values(views["value"], self.value_bits)
        values[:, start:end] = self._write_by_token(views, "value", self.value_bits, start, value)
        packed = packing.pack_values(values, self.value_bits, views["value"].dtype)
        views["value"].copy_(packed)

    def _write_by_token(
        self, views: Views, name: str, bits: int, start: int, x: torch.Tensor
    ) -> torch.Tensor:
        groups = x.unflatten(2, (-1, self.channel_group(x.shape[2])))
        codes, scale, minimum = packing.quantize(groups, bits, axis=3)
        span = slice(start, start + x.shape[1])
        views[f"{name}_scale"][:, :, span] = scale.squeeze(3).transpose(1, 2)
        views[f"{name}_min"][:, :, span] = minimum.squeeze(3).transpose(1, 2)
        return codes.flatten(2)

    def read(self, views: Views, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = packing.unpack_keys(views["key"], self.key_bits)[:, :count].float()
        values = packing.unpack_values(views["value"], self.value_bits)[:, :count].float()
        if self.keys_per_channel:
            scale = views["key_scale"].float().repeat_interleave(self.divisor, 1)[:, :count]
            minimum = views["key_min"].float().repeat_interleave(self.divisor, 1)[:, :count]
            keys = keys * scale + minimum
        else:
            keys = self._scale_by_token(views, "key", keys)
        return keys, self._scale_by_token(views, "value", values)

    def _scale_by_token(self, views: Views, name: str, codes: torch.Tensor) -> torch.Tensor:
        count = codes.shape[1]
        scale = views[f"{name}_scale"].float()[:, :, :count].transpose(1, 2)[..., None]
        minimum = views[f"{name}_min"].float()[:, :, :count].transpose(1, 2)[..., None]
        groups = codes.unflatten(2, (-1, self.channel_group(codes.shape[2])))
        return (groups * scale + minimum).flatten(2)

    def copy(self, source: Views, first: int, target: Views, to: int, count: int) -> None:
        """Copy tokens as they are stored, without decoding them.

        Args:
            source: typed views of one page.
            first: the first token's position in it.
            target: typed views of another page, or the same; written.
            to: the first token's position there.
            count: tokens. All three are multiples of ``PAGE_STEP`` and of a group of tokens.

        """
        for name, bits in (("key", self.key_bits), ("value", self.value_bits)):
            pack, unpack = _PACKING[name]
            codes, there = (unpack(views[name], bits) for views in (source, target))
            there[:, to : to + count] = codes[:, first : first + count]
            target[name].copy_(pack(there, bits, target[name].dtype))
            by_channel = name == "key" and self.keys_per_channel
            step = self.divisor if by_channel else 1
            axis = 1 if by_channel else 2
            for part in (f"{name}_scale", f"{name}_min"):
                kept = source[part].narrow(axis, first // step, count // step)
                target[part].narrow(axis, to // step, count // step).copy_(kept)


_PACKING = {
    "key": (packing.pack_keys, packing.unpack_keys),
    "value": (packing.pack_values, packing.unpack_values),
}
