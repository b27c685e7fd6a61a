/* Depthwise convolution of multiplier 1 on cores with SMLAD: the layer of dsp/depthwise_conv2d.c. */
#ifndef PLANISH_DSP_DEPTHWISE_CONV2D_H
#define PLANISH_DSP_DEPTHWISE_CONV2D_H

#include "planish.h"

/* Rows and columns may be exchanged (the kernel's too): a row is what the inner loop runs along. Steps are in bytes. */
typedef struct {
    int32_t in_rows, in_columns, out_rows, out_columns, channels;
    int32_t in_row_step, in_column_step, out_row_step, out_column_step;
    int32_t row_stride, pad_top, pad_left, x_zero_point, y_zero_point, low, high;
    const uint32_t *weight; /* (channels / 4, taps), one byte a channel; narrower weights: several taps a word, low bits first */
    const int32_t *bias;    /* (channels), less x_zero_point * sum of weights */
    /* (channels); below 2^31: code = (sum * factor + (2 * y_zero_point + 1) * 2^31) >> 32, else the bits of the float factor with
     * the top bit set, for channels of which no integer gives the codes of the float formula */
    const uint32_t *factor;
} planish_dsp_depthwise_conv2d_layer;

#endif
