/* The windows of a 1 x 1 kernel of stride 1 without padding, one group whose channels fill whole words: pixel after pixel. */
#ifndef PLANISH_DSP_GATHER_H
#define PLANISH_DSP_GATHER_H

#include "dsp/conv2d.h"
#include "dsp/product.h"

/* a pixel and its bytes */
typedef struct {
    const int8_t *at;
    int32_t bytes;
} pixel_t;

static inline pixel_t first_pixel(const planish_dsp_conv2d_layer *l, const int8_t *x)
{
    pixel_t p;
    p.at = x;
    p.bytes = l->in_channels * X_BITS / 8;
    return p;
}

static inline pixel_t next_pixel(const planish_dsp_conv2d_layer *l, pixel_t p)
{
    (void)l;
    p.at += p.bytes;
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
    (void)l;
    (void)x;
    (void)work;
    (void)PLANISH_NAME(planish_expand_, X_BITS)(a.at, b.at, pairs, a.bytes / 4, 1, 0);
}

#endif
