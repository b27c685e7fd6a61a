/* Sum of two tensors by integer factors. */
#include "armv6m/elementwise.h"

static void add(const planish_armv6m_add_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    int32_t factor_a = l->factor_a, factor_b = l->factor_b, start = l->start, shift = l->shift, low = l->low, high = l->high;
    int32_t even = l->even, size = l->operand_size, done, i;
    for (done = 0; done < l->size; done += size) {
        for (i = 0; i < size; i++) {
            int32_t sum = a[i] * factor_a + b[i] * factor_b + start;
            int32_t code = sum >> shift;
            if (even && (uint32_t)sum << (32 - shift) == 0) {
                code &= ~1;
            }
            code = code < low ? low : code;
            y[i] = (int8_t)(code > high ? high : code);
        }
        a += size;
        y += size;
    }
}

void planish_armv6m_add(const planish_armv6m_add_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    add(l, a, b, y);
}

void planish_armv6m_add_constant(const planish_armv6m_add_constant_layer *l, const int8_t *a, int8_t *y)
{
    planish_armv6m_add_layer same = {l->size, l->operand_size, l->factor_a, l->factor_b, l->start, l->shift, l->even, l->low, l->high};
    add(&same, a, l->operand, y);
}
