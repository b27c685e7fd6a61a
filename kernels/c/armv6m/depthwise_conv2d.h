/* Depthwise convolution of two pixels in one multiplication, for cores with a 32-bit product and nothing more. */
#ifndef PLANISH_ARMV6M_DEPTHWISE_CONV2D_H
#define PLANISH_ARMV6M_DEPTHWISE_CONV2D_H

#include "armv6m/requantize.h"

/* Rows and columns are the image's, or its columns and rows where those are longer. Steps are in bytes. */
typedef struct {
    int16_t channels, in_rows, in_columns, out_rows, out_columns, kernel_rows, kernel_columns, pad_rows, pad_columns;
    int16_t row_stride, column_stride, weight_bits, x_zero_point;
    int32_t in_row_step, in_column_step, out_row_step, out_column_step;
    planish_scale scale;
    const uint8_t *weight;  /* (channels, rows, columns), weight_bits each, first in the lowest bits; each channel in whole bytes */
    const int32_t *channel; /* (channels, 2): bias less x_zero_point * sum of weights, word of the rescale */
} planish_armv6m_depthwise_conv2d_layer;

enum { PLANISH_DEPTHWISE_ROWS = 5 }; /* of a kernel, at most */

/* what a row of outputs needs: the assembler knows this order */
typedef struct {
    uint32_t half, limit;
    int8_t *y;
    int32_t y_step;
    uint32_t before;
    int32_t bias;
    uint32_t word;
    int32_t low, high;
    const planish_scale *scale;
    uint32_t window;
    int32_t end; /* bytes of words in which the pairs of outputs begin */
    const int32_t *weight;
    int32_t odd; /* 1: half a pair more */
    const int32_t *rows[PLANISH_DEPTHWISE_ROWS];
    int32_t fill; /* words are copied by fives */
} planish_depthwise_row;

typedef void planish_depthwise_outputs(const planish_depthwise_row *row);

/* All channels: their rows as words in scratch, and outputs by `whole` where the products of a row of the kernel always fit 16 bits,
 * else by `parts`. */
void planish_armv6m_depthwise(const planish_armv6m_depthwise_conv2d_layer *layer, const int8_t *x, int8_t *y, int8_t *scratch,
                              planish_depthwise_outputs *whole, planish_depthwise_outputs *parts);

#endif
