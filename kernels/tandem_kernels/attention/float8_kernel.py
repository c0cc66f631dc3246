"""float8 values in pairs, and float16 queries to go with them.

Bytes can't be transposed on their way from shared memory to the matrix units; 16-bit pairs can.
"""

import triton
import triton.language as tl


@triton.jit
def halve_pairs(pairs, CONVERTS: tl.constexpr):
    """Two float8_e4m3fn in each int16: the lower and the upper ones as float16, exactly."""
    if CONVERTS:
        # Four bytes in a register: even ones before odd ones, then two conversions of pairs.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 even, odd;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {even, odd}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, even;
            cvt.rn.f16x2.e4m3x2 $1, odd;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        # The same bits as in a float16, whose exponent counts from 8 lower.
        lower = (((pairs & 0x7F) << 7) | ((pairs & 0x80) << 8)).to(tl.float16, bitcast=True)
        upper = (((pairs & 0x7F00) >> 1) | (pairs & -0x8000)).to(tl.float16, bitcast=True)
        return lower * 256.0, upper * 256.0


@triton.jit
def scale_rows(q):
    """float16 rows of at most 2 and the powers of 2 [rows] that they were divided by."""
    wide = q.to(tl.float32)
    bits = tl.max(tl.abs(wide), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(bits.to(tl.float32, bitcast=True), 1.0e-30)
    return (wide / power[:, None]).to(tl.float16), power
