"""What the program that derives decode's bound takes instructions for."""

from __future__ import annotations

import pytest

from benchmarks.decode_bound import CORE, LOOP, kinds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vpmaddwd ymm1,ymm2,ymm3", {"vector": 1, "product": 1}),
        ("vpaddd ymm1,ymm2,ymm3", {"vector": 1}),
        ("vpaddd ymm1,ymm2,YMMWORD PTR [rax]", {"vector": 1, "load": 1}),
        ("{evex} vpdpbusd ymm1,ymm2,ymm3", {"vector": 1, "product": 1}),
        ("vpaddd zmm1,zmm2,zmm3", {"vector": 1.5}),
        ("vmovups zmm1,ZMMWORD PTR [rax]", {"load": 1.5}),
        ("vmovaps YMMWORD PTR [rsp+0x20],ymm1", {"store": 1}),
        ("vpbroadcastd ymm1,DWORD PTR [rdx+0x4]", {"load": 1}),
        ("vextractf128 xmm0,ymm1,0x1", {"vector": 1, "crossing": 1}),
        ("vpackssdw ymm0,ymm1,ymm2", {"vector": 1, "crossing": 1}),
        ("prefetcht1 BYTE PTR [rax]", {"load": 1}),
        ("lea rax,[rdx+rax*8]", {}),
        ("cmp QWORD PTR [rsp-0x18],r10", {"load": 1}),
        ("vzeroupper", {}),
    ],
)  # fmt: skip
def test_what_an_instruction_occupies(text: str, expected: dict[str, float]) -> None:
    assert dict(kinds(text)) == {"issue": 1, **expected}
    assert set(expected) <= set(CORE.limits)


def test_the_loop_of_the_clock_jumps_to_its_begin() -> None:
    back = LOOP.index(b"\x0f\x85")
    assert int.from_bytes(LOOP[back + 2 : back + 6], "little", signed=True) == -(back + 6)
    assert LOOP[:4] == bytes.fromhex("c5fdfec7")  # vpaddd ymm0, ymm0, ymm7
    assert LOOP[20:24] == bytes.fromhex("c5d5feef")  # vpaddd ymm5, ymm5, ymm7
