/* Product of two tensors by an integer factor of 28 bits. */
#include "armv6m/elementwise.h"

static void mul(const planish_armv6m_mul_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    int32_t zero_a = l->a_zero_point, zero_b = l->b_zero_point, upper = l->upper, lower = l->lower, start = l->start;
    int32_t shift = l->shift, size = l->operand_size, done, i;
    for (done = 0; done < l->size; done += size) {
        for (i = 0; i < size; i++) {
            int32_t product = (a[i] - zero_a) * (b[i] - zero_b);
            int32_t sum = start + product * upper + (product * lower >> 14);
            int32_t code = sum >> shift;
            if (l->even && (uint32_t)sum << (32 - shift) == 0) {
                code &= ~1;
            }
            code = code < l->low ? l->low : code;
            y[i] = (int8_t)(code > l->high ? l->high : code);
        }
        a += size;
        y += size;
    }
}

void planish_armv6m_mul(const planish_armv6m_mul_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    mul(l, a, b, y);
}

void planish_armv6m_mul_constant(const planish_armv6m_mul_constant_layer *l, const int8_t *a, int8_t *y)
{
    planish_armv6m_mul_layer same = {l->size,  l->operand_size, l->a_zero_point, l->b_zero_point, l->upper, l->lower,
                                     l->start, l->shift,        l->even,         l->low,          l->high};
    mul(&same, a, l->operand, y);
}
