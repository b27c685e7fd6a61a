/* Weights of 4 and 2 bits without unpacking: a byte holds the weights of several outputs, and products with parts of it tell them apart.
 *
 *     4 bits:  v = 16 w1 + u0              u = w + 8 (0 to 15), the uppermost weight signed as the byte is
 *     2 bits:  v = 64 w3 + 16 u2 + 4 u1 + u0                     u = w + 2 (0 to 3)
 *
 * The sums over x of x v, and of x times v's lower 2, 4 or 6 bits, differ by one weight's product, times 4, 16 or 64; exact powers
 * of two that the factor of the output takes back. What u adds is a multiple of the sum of x, which start values subtract. The
 * same byte costs no more instructions than whole weights would: a mask takes the place of a load.
 */
#ifndef PLANISH_MVE_NARROW_H
#define PLANISH_MVE_NARROW_H

#include <stdint.h>

#if PLANISH_BITS == 4
enum { LEVELS = 2, OFFSET = 8 };
#elif PLANISH_BITS == 2
enum { LEVELS = 4, OFFSET = 2 };
#else
enum { LEVELS = 1, OFFSET = 0 };
#endif

/* a weight out of its byte, times the power of two of its place there: what the form in C multiplies by */
static inline int32_t weight_in_place(int32_t byte, int32_t level)
{
    int32_t shift = PLANISH_BITS * level, below = byte & ((1 << shift) - 1);
    if (level == LEVELS - 1) {
        return byte - below;
    }
    return (byte & ((1 << (shift + PLANISH_BITS)) - 1)) - below - (OFFSET << shift);
}

#if PLANISH_BITS < 8

/* sum of `size` codes */
static inline int32_t sum_of(const int8_t *x, int32_t size)
{
#if defined(__ARM_FEATURE_MVE)
    register int32_t sum __asm__("r0") = 0;
    __asm__ volatile(
        "dlstp.8 lr, %2\n"
        "1:\n"
        "vldrb.u8 q0, [%1], #16\n"
        "vaddva.s8 %0, q0\n"
        "letp lr, 1b\n"
        : "+r"(sum), "+r"(x)
        : "r"(size)
        : "memory", "cc", "lr", "q0");
    return sum;
#else
    int32_t sum = 0;
    while (size-- > 0) {
        sum += *x++;
    }
    return sum;
#endif
}

#endif

#endif
