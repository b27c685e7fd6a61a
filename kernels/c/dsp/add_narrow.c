/* dsp/add.c for codes of A_BITS, B_BITS and Y_BITS (8, 4 or 2), with SHIFT in place of PLANISH_DSP_ADD_SHIFT. Sizes are multiples of 4. */
#include "dsp/add.h"
#include "dsp/halves.h"

static inline uint32_t code_of(int32_t sum, int32_t low, int32_t high)
{
    int32_t code = sum >> SHIFT;
    code = code < low ? low : code;
    return (uint8_t)(code > high ? high : code);
}

void PLANISH_KERNEL(const planish_dsp_add_narrow_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    const uint32_t mask = 0xFF00FF00u;
    int32_t fa = l->factor_a, fb = l->factor_b, start = l->start, low = l->low, high = l->high;
    int32_t left = l->size, period = l->operand_size, i;
    for (; left > 0; left -= period) {
        const int8_t *second = b;
        for (i = period; i > 0; i -= 4) {
            uint32_t word_a = planish_unpack_four(a, A_BITS), word_b = planish_unpack_four(second, B_BITS);
            uint32_t even_a = word_a << 8 & mask, odd_a = word_a & mask;
            uint32_t even_b = word_b << 8 & mask, odd_b = word_b & mask;
            int32_t sum0 = planish_product_low(fa, even_a, planish_product_low(fb, even_b, start));
            int32_t sum1 = planish_product_low(fa, odd_a, planish_product_low(fb, odd_b, start));
            int32_t sum2 = planish_product_high(fa, even_a, planish_product_high(fb, even_b, start));
            int32_t sum3 = planish_product_high(fa, odd_a, planish_product_high(fb, odd_b, start));
            uint32_t lower = code_of(sum0, low, high) | code_of(sum1, low, high) << 8;
            uint32_t upper = code_of(sum2, low, high) | code_of(sum3, low, high) << 8;
            planish_pack_four(y, lower | upper << 16, Y_BITS);
            a += A_BITS / 2;
            second += B_BITS / 2;
            y += Y_BITS / 2;
        }
    }
}
