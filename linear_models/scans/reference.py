"""Recurrences in plain torch, token by token, as their papers define them: the oracles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import silu, softplus

if TYPE_CHECKING:
    from linear_models.scans.batch import Batch


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    batch: Batch,
    out: torch.Tensor,
    *,
    activate: bool = True,
) -> None:
    """Depthwise convolution over the last ``width`` tokens, then SiLU.

    Args:
        x: ``[tokens, channels]``.
        weight: ``[channels, width]``, the newest token's last.
        bias: ``[channels]``, or none.
        states: ``[slots, width - 1, channels]``, the last inputs of a request; written.
        batch: requests of the step.
        out: ``[tokens, channels]``; written.
        activate: whether SiLU follows.

    """
    for i, (first, last) in enumerate(batch.spans):
        slot = int(batch.slots[i])
        before = torch.zeros(states.shape[1:], dtype=torch.float32)
        if slot >= 0 and batch.has_state[i]:
            before = states[slot].float()
        seen = torch.cat([before, x[first:last].float()])
        for t in range(last - first):
            y = (seen[t : t + weight.shape[1]] * weight.float().T).sum(0)
            y = y if bias is None else y + bias.float()
            out[first + t] = (silu(y) if activate else y).to(out.dtype)
        if slot >= 0:
            states[slot] = seen[last - first :].to(states.dtype)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    states: torch.Tensor,
    batch: Batch,
    out: torch.Tensor,
) -> None:
    """Mamba 1 (arXiv 2312.00752): ``h = exp(dt a) h + dt b x``, ``out = (c h + d x) silu(gate)``.

    Args:
        x: input, ``[tokens, channels]``.
        dt: step before its bias and softplus, ``[tokens, channels]``.
        a: ``[channels, size]``, negative.
        b: ``[tokens, size]``.
        c: ``[tokens, size]``.
        d: ``[channels]``.
        bias: of ``dt``, ``[channels]``, or none.
        gate: ``[tokens, channels]``, or none.
        states: ``[slots, channels, size]``; written.
        batch: requests of the step.
        out: ``[tokens, channels]``; written.

    """
    step = softplus(dt.float() if bias is None else dt.float() + bias.float())
    for i, (first, last) in enumerate(batch.spans):
        slot = int(batch.slots[i])
        h = torch.zeros(states.shape[1:], dtype=torch.float32)
        if slot >= 0 and batch.has_state[i]:
            h = states[slot].float()
        for t in range(first, last):
            inner = (step[t] * x[t].float())[:, None] * b[t].float()
            h = torch.exp(step[t][:, None] * a.float()) * h + inner
            y = h @ c[t].float() + d.float() * x[t].float()
            out[t] = (y if gate is None else y * silu(gate[t].float())).to(out.dtype)
        if slot >= 0:
            states[slot] = h.to(states.dtype)


def wkv5(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    bonus: torch.Tensor,
    states: torch.Tensor,
    batch: Batch,
    out: torch.Tensor,
) -> None:
    """RWKV-5 (arXiv 2404.05892): ``out = r (bonus k v + s)``, then ``s = decay s + k v``.

    Args:
        r: receptances, ``[tokens, heads * size]``.
        k: keys, the same shape.
        v: values, the same shape.
        decay: ``[heads, size]``, of a key's item, in 0..1.
        bonus: ``[heads, size]``, of the current token.
        states: float32 ``[slots, heads, size, size]``, key items by value items; written.
        batch: requests of the step.
        out: ``[tokens, heads * size]``; written.

    """
    heads, size = decay.shape
    for i, (first, last) in enumerate(batch.spans):
        slot = int(batch.slots[i])
        s = torch.zeros(states.shape[1:], dtype=torch.float32)
        if slot >= 0 and batch.has_state[i]:
            s = states[slot]
        for t in range(first, last):
            rt, kt, vt = (x[t].float().view(heads, 1, size) for x in (r, k, v))
            kv = kt.mT @ vt
            y = rt @ (bonus[..., None] * kv + s)
            out[t] = y.flatten().to(out.dtype)
            s = kv + decay[..., None] * s
        if slot >= 0:
            states[slot] = s


def wkv7(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    removed: torch.Tensor,
    rate: torch.Tensor,
    states: torch.Tensor,
    batch: Batch,
    out: torch.Tensor,
) -> None:
    """RWKV-7 (arXiv 2503.14456): ``s = decay s - (rate removed) (removed s) + k v``, ``out = r s``.

    The decay of a key's item is ``exp(-exp(-1/2) sigmoid(w))``.

    Args:
        r: receptances, ``[tokens, heads * size]``.
        w: of the decays, before their sigmoid; the same shape, as are all inputs.
        k: keys that are added.
        v: values that are added.
        removed: keys whose values are taken away, of length one in a head.
        rate: how much of these, in 0..1.
        states: float32 ``[slots, heads, size, size]``, key items by value items; written.
        batch: requests of the step.
        out: ``[tokens, heads * size]``; written.

    """
    heads, size = states.shape[1:3]
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w.float()))
    for i, (first, last) in enumerate(batch.spans):
        slot = int(batch.slots[i])
        s = torch.zeros(states.shape[1:], dtype=torch.float32)
        if slot >= 0 and batch.has_state[i]:
            s = states[slot]
        for t in range(first, last):
            rt, vt, key, gone, dt, at = (
                x[t].float().view(heads, 1, size) for x in (r, v, k, removed, decay, rate)
            )
            s = dt.mT * s - (at * gone).mT @ (gone @ s) + key.mT @ vt
            out[t] = (rt @ s).flatten().to(out.dtype)
        if slot >= 0:
            states[slot] = s


def rg_lru(
    x: torch.Tensor,
    input_gate: torch.Tensor,
    gate: torch.Tensor,
    rate: torch.Tensor,
    states: torch.Tensor,
    batch: Batch,
    out: torch.Tensor,
) -> None:
    """RG-LRU of Griffin (arXiv 2402.19427): ``h = a h + sqrt(1 - a^2) sigmoid(input_gate) x``.

    The decay is ``a = exp(rate sigmoid(gate))``. A request's first token has no root.

    Args:
        x: ``[tokens, channels]``.
        input_gate: before its sigmoid, ``[tokens, channels]``.
        gate: of the recurrence, before its sigmoid, ``[tokens, channels]``.
        rate: ``-8 softplus(parameter)``, ``[channels]``.
        states: ``[slots, channels]``; written.
        batch: requests of the step.
        out: ``[tokens, channels]``; written.

    """
    log_a = rate * torch.sigmoid(gate.float())
    inner = x.float() * torch.sigmoid(input_gate.float())
    for i, (first, last) in enumerate(batch.spans):
        slot = int(batch.slots[i])
        has_state = slot >= 0 and bool(batch.has_state[i])
        h = (
            states[slot].float()
            if has_state
            else torch.zeros(states.shape[1:], dtype=torch.float32)
        )
        for t in range(first, last):
            a = torch.exp(log_a[t])
            # sqrt(1 - a^2), also where the decay is almost one
            scale = torch.sqrt(-torch.expm1(2 * log_a[t])) if has_state or t > first else 1.0
            h = a * h + scale * inner[t]
            out[t] = h.to(out.dtype)
        if slot >= 0:
            states[slot] = h.to(states.dtype)
