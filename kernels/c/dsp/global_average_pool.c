/* Mean of each channel over all pixels. Four channels are added at a time, as two words of two 16-bit sums. Compiled for inputs of
 * X_BITS, which are 8 where channels are no multiple of 4. */
#include "dsp/halves.h"
#include "dsp/pools.h"

enum { BLOCK = 255 }; /* pixels whose sums fit 16 bits */

static inline int8_t code_of(const planish_dsp_global_average_pool_layer *l, int32_t sum)
{
    int32_t code = planish_nearest((float)(sum - l->x_zero_point * l->pixels) * l->rescale) + l->y_zero_point;
    code = code < l->low ? l->low : code;
    return (int8_t)(code > l->high ? l->high : code);
}

/* sums of four channels over all pixels, `step` bytes apart */
static inline void add_words(const int8_t *x, int32_t pixels, int32_t step, int32_t *sum)
{
    sum[0] = sum[1] = sum[2] = sum[3] = 0;
    while (pixels > 0) {
        int32_t count = pixels < BLOCK ? pixels : BLOCK;
        uint32_t even = 0, odd = 0;
        pixels -= count;
        for (; count > 0; count--) {
            uint32_t word = planish_unpack_four(x, X_BITS);
            even = planish_add_even_bytes(even, word);
            odd = planish_add_odd_bytes(odd, word);
            x += step;
        }
        sum[0] += (int16_t)even;
        sum[1] += (int16_t)odd;
        sum[2] += (int32_t)even >> 16;
        sum[3] += (int32_t)odd >> 16;
    }
}

void PLANISH_KERNEL(const planish_dsp_global_average_pool_layer *l, const int8_t *x, int8_t *y)
{
    int32_t channel = 0, pixel, i;
    if (l->channels % 4 == 0) {
        PLANISH_ROLLED
        for (; channel < l->channels; channel += 4) {
            int32_t sum[4];
            add_words(x + channel * X_BITS / 8, l->pixels, l->channels * X_BITS / 8, sum);
            for (i = 0; i < 4; i++) {
                y[channel + i] = code_of(l, sum[i]);
            }
        }
    }
    PLANISH_ROLLED
    for (; channel < l->channels; channel++) {
        int32_t sum = 0;
        PLANISH_ROLLED
        for (pixel = 0; pixel < l->pixels; pixel++) {
            sum += x[pixel * l->channels + channel];
        }
        y[channel] = code_of(l, sum);
    }
}
