/* Softmax with tabled exponentials, counted from the largest code; the sum is float, element by element. */
#include "planish.h"

void planish_softmax(const planish_softmax_layer *l, const int8_t *x, int8_t *y)
{
    float low = (float)(l->low - l->y_zero_point), high = (float)(l->high - l->y_zero_point);
    int32_t o, i, k;
    for (o = 0; o < l->outer; o++) {
        for (i = 0; i < l->inner; i++) {
            const int8_t *in = x + o * l->size * l->inner + i;
            int8_t *out = y + o * l->size * l->inner + i;
            int32_t largest = -128, offset;
            float sum = 0.0f;
            for (k = 0; k < l->size; k++) {
                largest = in[k * l->inner] > largest ? in[k * l->inner] : largest;
            }
            offset = 255 - largest; /* the largest code meets the last exponential */
            for (k = 0; k < l->size; k++) {
                sum += l->exponentials[offset + in[k * l->inner]];
            }
            for (k = 0; k < l->size; k++) {
                float code = l->exponentials[offset + in[k * l->inner]] * l->inverse_scale;
                code = code / sum;
                out[k * l->inner] = (int8_t)(planish_round(planish_clamp(code, low, high)) + l->y_zero_point);
            }
        }
    }
}
