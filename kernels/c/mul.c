/* Product of two tensors. The zero point is added before rounding, counted as uint8. */
#include "planish.h"

static inline void mul(int32_t size, int32_t operand_size, int32_t a_zero_point, int32_t b_zero_point,
                       int32_t y_zero_point, float rescale, int32_t low, int32_t high, const int8_t *a, const int8_t *b,
                       int8_t *y)
{
    float least = (float)(low + 128), most = (float)(high + 128), zero = (float)(y_zero_point + 128);
    int32_t start, i;
    for (start = 0; start < size; start += operand_size) {
        for (i = 0; i < operand_size; i++) {
            int32_t product = (a[start + i] - a_zero_point) * (b[i] - b_zero_point);
            float code = (float)product * rescale;
            code = planish_clamp(code + zero, least, most);
            y[start + i] = (int8_t)(planish_round(code) - 128);
        }
    }
}

void planish_mul(const planish_mul_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    mul(l->size, l->operand_size, l->a_zero_point, l->b_zero_point, l->y_zero_point, l->rescale, l->low, l->high, a, b, y);
}

void planish_mul_constant(const planish_mul_constant_layer *l, const int8_t *a, int8_t *y)
{
    mul(l->size, l->operand_size, l->a_zero_point, l->b_zero_point, l->y_zero_point, l->rescale, l->low, l->high, a,
        l->operand, y);
}
