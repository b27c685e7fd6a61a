/* Requantization without floating point, equal to the float32 contract bit for bit.
 *
 *     code = saturate(round_half_even(float32(float32(sum) * rescale)) + zero_point)
 *
 * A channel's rescale is one word: 24 bits of mantissa (its first bit set) above 8 bits that say how far the sum is shifted
 * right before it meets the mantissa's first bits in one 32-bit product. Truncating both makes the product too small by less
 * than a bound that is known at export: `half` (the zero point, a half, and that bound) is added, and only where the
 * fraction is then below `window` can the code be in doubt. There the product is computed in full and rounded twice, as
 * float32 would. requantize.py chooses the numbers and holds the proof.
 */
#ifndef PLANISH_ARMV6M_REQUANTIZE_H
#define PLANISH_ARMV6M_REQUANTIZE_H

#include <stdint.h>

typedef struct {
    uint32_t limit;        /* shifted sums beyond it saturate (or, with `fraction` 22, take the exact way) */
    uint32_t before;       /* the sum is shifted left by it first */
    uint32_t half;         /* added to the product */
    uint32_t window;       /* fractions below it, moved to the top of the word, take the exact way */
    int32_t exponent;      /* rescale = (word >> 8) * 2^-(exponent + (word & 255)) */
    int32_t zero_point, low, high;
    int32_t fraction;      /* bits of fraction of the product: 23 where the lowest code is the zero point, else 22 */
} planish_scale;

/* The code of a sum, computed in full. */
int32_t planish_exact_code(int32_t sum, uint32_t word, const planish_scale *scale);

/* The code of a sum: one product where that is enough. */
static inline int32_t planish_code(int32_t sum, uint32_t word, const planish_scale *q)
{
    int32_t shifted = (int32_t)((uint32_t)sum << q->before) >> (word & 255u);
    uint32_t product;
    if (q->fraction == 23) {
        if ((uint32_t)shifted > q->limit) {
            return shifted < 0 ? q->low : q->high;
        }
        product = (uint32_t)shifted * (word >> 16) + q->half;
        if (product >> 31) {
            return q->high;
        }
        if (product << 9 < q->window) {
            return planish_exact_code(sum, word, q);
        }
        return (int32_t)(product >> 23) - 128;
    }
    if (shifted != (int16_t)shifted) {
        return planish_exact_code(sum, word, q);
    }
    product = (uint32_t)shifted * (word >> 16) + q->half;
    if (product << 10 < q->window || product >> 30) {
        return planish_exact_code(sum, word, q);
    }
    shifted = (int32_t)(product >> 22) - 128;
    shifted = shifted < q->low ? q->low : shifted;
    return shifted > q->high ? q->high : shifted;
}

#endif
