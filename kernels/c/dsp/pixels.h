/* Output pixels one after the other, and where their windows begin. */
#ifndef PLANISH_DSP_PIXELS_H
#define PLANISH_DSP_PIXELS_H

#include "dsp/conv2d.h"

/* the first tap of an output pixel's window, in the input; column counts the outputs of its row */
typedef struct {
    int32_t top, left, column;
} pixel_t;

static inline pixel_t first_pixel(const planish_dsp_conv2d_layer *l, const int8_t *x)
{
    pixel_t p = {-l->pad_top, -l->pad_left, 0};
    (void)x;
    return p;
}

static inline pixel_t next_pixel(const planish_dsp_conv2d_layer *l, pixel_t p)
{
    p.left += l->stride_width;
    if (++p.column == l->out_width) {
        p.column = 0;
        p.left = -l->pad_left;
        p.top += l->stride_height;
    }
    return p;
}

static inline int inside(int32_t position, int32_t size)
{
    return (uint32_t)position < (uint32_t)size;
}

#endif
