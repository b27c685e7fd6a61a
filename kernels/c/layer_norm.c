/* Layer normalization of rows: sums in integers, then float with one rounding an operation. */
#include "planish.h"
#include "square_root.h"

void planish_layer_norm(const planish_layer_norm_layer *l, const int8_t *x, int8_t *y)
{
    int32_t size = l->size;
    float low = (float)(l->low - l->y_zero_point), high = (float)(l->high - l->y_zero_point);
    int32_t row, i;
    for (row = 0; row < l->rows; row++) {
        int32_t sum = 0, squares = 0;
        uint64_t variance;
        float inverse;
        for (i = 0; i < size; i++) {
            sum += x[i];
            squares += x[i] * x[i];
        }
        variance = (uint64_t)(uint32_t)size * (uint32_t)squares - (uint64_t)((int64_t)sum * sum);
        inverse = (float)(uint32_t)(variance >> 32) * 4294967296.0f;
        inverse = inverse + (float)(uint32_t)variance;
        inverse = 1.0f / planish_square_root(inverse + l->epsilon);
        for (i = 0; i < size; i++) {
            float value = (float)(size * x[i] - sum) * inverse;
            value = value * l->gain[i];
            value = value + l->shift[i];
            y[i] = (int8_t)(planish_round(planish_clamp(value, low, high)) + l->y_zero_point);
        }
        x += size;
        y += size;
    }
}
