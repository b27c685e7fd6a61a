/* The windows of two output pixels as pairs of 16-bit numbers (dsp/product.h), for groups whose channels fill whole words, also
 * where they are packed (X_BITS 4 or 2). A tap in the padding is read from `work`.
 */
#ifndef PLANISH_DSP_GATHER_H
#define PLANISH_DSP_GATHER_H

#include "dsp/pixels.h"
#include "dsp/product.h"

static inline void prepare(const planish_dsp_conv2d_layer *l, int8_t *work)
{
    enum { MASK = (1 << X_BITS) - 1, ONES = 255 / MASK };
    int32_t bytes = l->in_channels * X_BITS / 8 / l->groups, i;
    for (i = 0; i < bytes; i++) {
        work[i] = (int8_t)((l->x_zero_point & MASK) * ONES);
    }
}

/* whether `taps` taps from `start` on lie in 0 .. size - 1 */
static inline int covered(int32_t start, int32_t taps, int32_t dilation, int32_t size)
{
    return start >= 0 && start + (taps - 1) * dilation < size;
}

static inline void gather(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t a, pixel_t b, uint32_t *pairs,
                          int8_t *work)
{
    int32_t bytes = l->in_channels * X_BITS / 8, words = bytes / l->groups / 4;
    int32_t row_bytes = l->dilation_height * l->in_width * bytes;
    int whole_rows = l->dilation_width == 1 && l->groups == 1 && covered(a.left, l->kernel_width, 1, l->in_width)
                     && covered(b.left, l->kernel_width, 1, l->in_width);
    int32_t at_a = (a.top * l->in_width + a.left) * bytes, at_b = (b.top * l->in_width + b.left) * bytes, i, j;
    if (whole_rows && covered(a.top, l->kernel_height, l->dilation_height, l->in_height)
        && covered(b.top, l->kernel_height, l->dilation_height, l->in_height)) {
        words *= l->kernel_width;
        (void)PLANISH_NAME(planish_expand_, X_BITS)(x + at_a, x + at_b, pairs, words, l->kernel_height, row_bytes - 4 * words);
        return;
    }
    for (i = 0; i < l->kernel_height; i++) {
        int in_a = inside(a.top + i * l->dilation_height, l->in_height);
        int in_b = inside(b.top + i * l->dilation_height, l->in_height);
        if (whole_rows && in_a && in_b) {
            pairs = PLANISH_NAME(planish_expand_, X_BITS)(x + at_a, x + at_b, pairs, l->kernel_width * words, 1, 0);
        } else {
            for (j = 0; j < l->kernel_width; j++) {
                int32_t column = j * l->dilation_width;
                const int8_t *from_a = in_a && inside(a.left + column, l->in_width) ? x + (at_a + column * bytes) : work;
                const int8_t *from_b = in_b && inside(b.left + column, l->in_width) ? x + (at_b + column * bytes) : work;
                pairs = PLANISH_NAME(planish_expand_, X_BITS)(from_a, from_b, pairs, words, 1, 0);
            }
        }
        at_a += row_bytes;
        at_b += row_bytes;
    }
}

#endif
