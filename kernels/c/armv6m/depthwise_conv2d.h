/* Depthwise convolution of two pixels in one multiplication, for cores with a 32-bit product and nothing more. */
#ifndef PLANISH_ARMV6M_DEPTHWISE_CONV2D_H
#define PLANISH_ARMV6M_DEPTHWISE_CONV2D_H

#include "armv6m/requantize.h"

/* Rows and columns are the image's, or its columns and rows where those are longer. Steps are in bytes. */
typedef struct {
    int32_t channels, in_rows, in_columns, in_row_step, in_column_step, out_rows, out_columns, out_row_step, out_column_step;
    int32_t pad_rows, pad_columns, row_stride, x_zero_point;
    planish_scale scale;
    const uint8_t *weight;  /* (channels, rows, columns), WEIGHT_BITS each, first in the lowest bits; each channel in whole bytes */
    const int32_t *channel; /* (channels, 2): bias less x_zero_point * sum of weights, word of the rescale */
} planish_armv6m_depthwise_conv2d_layer;

#endif
