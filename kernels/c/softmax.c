/* Softmax with tabled exponentials, counted from the largest code; the sum is float, element by element. */
#include "planish.h"

void planish_softmax(const planish_softmax_layer *l, const int8_t *x, int8_t *y)
{
    /* copies: y might lie over the layer, for all that the compiler knows */
    int32_t size = l->size, inner = l->inner, zero_point = l->y_zero_point, outer = l->outer;
    float low = (float)(l->low - zero_point), high = (float)(l->high - zero_point), inverse_scale = l->inverse_scale;
    int32_t o, i, k;
    for (o = 0; o < outer; o++) {
        for (i = 0; i < inner; i++) {
            const int8_t *in = x + o * size * inner + i;
            int8_t *out = y + o * size * inner + i;
            const float *exponentials;
            int32_t largest = -128;
            float sum = 0.0f;
            for (k = 0; k < size; k++) {
                largest = in[k * inner] > largest ? in[k * inner] : largest;
            }
            exponentials = l->exponentials + 255 - largest; /* the largest code meets the last one */
            for (k = 0; k < size; k++) {
                sum += exponentials[in[k * inner]];
            }
            for (k = 0; k < size; k++) {
                float code = exponentials[in[k * inner]] * inverse_scale;
                code = code / sum;
                out[k * inner] = (int8_t)(planish_round(planish_clamp(code, low, high)) + zero_point);
            }
        }
    }
}
