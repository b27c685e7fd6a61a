/* The square root of a float, the same bits on every core. */
#ifndef PLANISH_SQUARE_ROOT_H
#define PLANISH_SQUARE_ROOT_H

#include <stdint.h>

/* Square root of a normal positive number, rounded to nearest: an instruction, or digit by digit of 25 bits. The last of them says
 * which way to round; a tie would need an odd square that is a multiple of 2^25. */
static inline float planish_square_root(float v)
{
    union { float f; uint32_t u; } bits;
    bits.f = v;
#if defined(__arm__) && defined(__ARM_FP) && (__ARM_FP & 4)
    __asm__("vsqrt.f32 %0, %1" : "=t"(v) : "t"(bits.f)); /* the built-in may become a library call */
    return v;
#else
    {
        int32_t exponent = (int32_t)(bits.u >> 23) - 127;
        uint32_t digits = (bits.u & 0x7FFFFFu) | 0x800000u, root = 0, rest = 0;
        uint64_t square;
        int32_t i;
        if ((uint32_t)exponent & 1u) {
            digits <<= 1;
            exponent--;
        }
        square = (uint64_t)digits << 25; /* at most 50 bits, taken two at a time */
        for (i = 0; i < 25; i++) {
            rest = rest << 2 | ((uint32_t)(square >> 48) & 3u);
            square <<= 2;
            root <<= 1;
            if (rest > 2u * root) {
                rest -= 2u * root + 1u;
                root++;
            }
        }
        bits.u = ((uint32_t)(exponent / 2 + 127) << 23) + ((root + 1u) >> 1) - 0x800000u;
        return bits.f;
    }
#endif
}

#endif
