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
    uint32_t half;         /* added to the product */
    uint32_t window;       /* fractions below it, moved to the top of the word, take the exact way */
    uint32_t limit;        /* shifted sums beyond it saturate (or, with `fraction` 22, take the exact way) */
    int16_t zero_point, low, high;
    uint8_t before;        /* the sum is shifted left by it first */
    uint8_t exponent;      /* rescale = (word >> 8) * 2^-(exponent + (word & 255)) */
    uint8_t fraction;      /* bits of fraction of the product: 23 where the lowest code is the zero point, else 22 */
} planish_scale;

enum { PLANISH_IN_DOUBT = 1024 };

/* The code of a sum by one product, or PLANISH_IN_DOUBT. */
int32_t planish_quick_code(int32_t sum, uint32_t word, const planish_scale *scale);

/* The code of a sum: one product where that is enough. */
int32_t planish_code(int32_t sum, uint32_t word, const planish_scale *scale);

/* The code of a sum, computed in full. */
int32_t planish_exact_code(int32_t sum, uint32_t word, const planish_scale *scale);

/* loops that are not worth more code */
#if defined(__clang__)
#define PLANISH_SMALL_LOOP _Pragma("clang loop unroll(disable) vectorize(disable)")
#else
#define PLANISH_SMALL_LOOP
#endif

#endif
