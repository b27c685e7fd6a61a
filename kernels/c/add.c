/* Sum of two tensors with scales of their own. Codes are counted from 0 (as uint8), which the formula's rounding depends on. */
#include "planish.h"

static inline void add(int32_t size, int32_t operand_size, float ratio_a, float ratio_b, float fixed, int32_t low,
                       int32_t high, const int8_t *a, const int8_t *b, int8_t *y)
{
    float least = (float)(low + 128), most = (float)(high + 128);
    int32_t start, i;
    for (start = 0; start < size; start += operand_size) {
        for (i = 0; i < operand_size; i++) {
            float part = planish_fma((float)(b[i] + 128), ratio_b, fixed);
            float sum = planish_fma((float)(a[start + i] + 128), ratio_a, part);
            y[start + i] = (int8_t)(planish_round(planish_clamp(sum, least, most)) - 128);
        }
    }
}

void planish_add(const planish_add_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    add(l->size, l->operand_size, l->ratio_a, l->ratio_b, l->fixed, l->low, l->high, a, b, y);
}

void planish_add_packed(const planish_add_packed_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    float least = (float)(l->low + 128), most = (float)(l->high + 128);
    int32_t i;
    for (i = 0; i < l->size; i++) {
        float part = planish_fma((float)(planish_unpack(b, i, l->b_bits) + 128), l->ratio_b, l->fixed);
        float sum = planish_fma((float)(planish_unpack(a, i, l->a_bits) + 128), l->ratio_a, part);
        planish_pack(y, i, l->y_bits, planish_round(planish_clamp(sum, least, most)) - 128);
    }
}

void planish_add_constant(const planish_add_constant_layer *l, const int8_t *a, int8_t *y)
{
    add(l->size, l->operand_size, l->ratio_a, l->ratio_b, l->fixed, l->low, l->high, a, l->operand, y);
}
