/* The windows of a 1 x 1 kernel without padding, one group: the channels of a pixel, which fill whole words. */
#ifndef PLANISH_DSP_GATHER_H
#define PLANISH_DSP_GATHER_H

#include "dsp/conv2d.h"
#include "dsp/product.h"

/* the input of an output pixel; column counts the outputs of its row */
typedef struct {
    const int8_t *at;
    int32_t column;
} pixel_t;

static inline pixel_t first_pixel(const planish_dsp_conv2d_layer *l, const int8_t *x)
{
    pixel_t p;
    p.at = x;
    p.column = 0;
    (void)l;
    return p;
}

static inline pixel_t next_pixel(const planish_dsp_conv2d_layer *l, pixel_t p)
{
    int32_t bytes = l->in_channels * X_BITS / 8;
    p.at += l->stride_width * bytes;
    if (++p.column == l->out_width) {
        p.column = 0;
        p.at += (l->stride_height * l->in_width - l->out_width * l->stride_width) * bytes;
    }
    return p;
}

static inline void prepare(const planish_dsp_conv2d_layer *l, int8_t *work)
{
    (void)l;
    (void)work;
}

static inline void gather(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t a, pixel_t b, uint32_t *pairs,
                          int8_t *work)
{
    (void)x;
    (void)work;
    (void)PLANISH_NAME(planish_expand_, X_BITS)(a.at, b.at, pairs, l->units * X_BITS / 8, 1, 0);
}

#endif
