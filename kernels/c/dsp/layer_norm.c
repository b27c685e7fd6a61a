/* Layer normalization of rows in whole words: the sums by SMLAD, four codes at a time. */
#include "dsp/layer_norm.h"
#include "dsp/halves.h"
#include "square_root.h"

/* four codes from four differences; low and high are the bounds of the code */
static inline void four(const int32_t *differences, float inverse, const float *gain, const float *shift, int32_t zero_point,
                        int32_t low, int32_t high, int8_t *y)
{
    int32_t i;
    for (i = 0; i < 4; i++) {
        float value = (float)differences[i] * inverse;
        int32_t code;
        value = value * gain[i];
        value = value + shift[i];
        code = planish_nearest(value) + zero_point;
        code = code < low ? low : code;
        y[i] = (int8_t)(code > high ? high : code);
    }
}

void planish_dsp_layer_norm(const planish_dsp_layer_norm_layer *l, const int8_t *x, int8_t *y)
{
    int32_t size = l->size, zero_point = l->y_zero_point, low = l->low, high = l->high, row, i;
    for (row = 0; row < l->rows; row++) {
        const float *gain = l->gain, *shift = l->shift;
        int32_t sum = 0, squares = 0;
        uint64_t variance;
        float inverse;
        for (i = 0; i < size; i += 4) {
            uint32_t word = planish_load_word(x + i), even = planish_even_bytes(word), odd = planish_odd_bytes(word);
            sum = planish_dot(even, 0x00010001u, sum);
            sum = planish_dot(odd, 0x00010001u, sum);
            squares = planish_dot(even, even, squares);
            squares = planish_dot(odd, odd, squares);
        }
        variance = (uint64_t)(uint32_t)size * (uint32_t)squares - (uint64_t)((int64_t)sum * sum);
        inverse = (float)(uint32_t)(variance >> 32) * 4294967296.0f;
        inverse = inverse + (float)(uint32_t)variance;
        inverse = 1.0f / planish_square_root(inverse + l->epsilon);
        PLANISH_ROLLED
        for (i = 0; i < size; i += 4) {
            int32_t differences[4], k;
            for (k = 0; k < 4; k++) {
                differences[k] = size * x[k] - sum;
            }
            four(differences, inverse, gain, shift, zero_point, low, high, y);
            x += 4;
            y += 4;
            gain += 4;
            shift += 4;
        }
    }
}
