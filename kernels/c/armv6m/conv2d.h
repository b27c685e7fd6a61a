/* Convolution of two pixels in one multiplication, for cores with a 32-bit product and nothing more. */
#ifndef PLANISH_ARMV6M_CONV2D_H
#define PLANISH_ARMV6M_CONV2D_H

#include "armv6m/requantize.h"

typedef struct {
    int32_t in_height, in_width, in_channels, out_height, out_width, out_channels;
    int32_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
    int32_t x_zero_point, chunks; /* chunks of the window, the last one filled up with weights of 0 */
    planish_scale scale;
    const uint8_t *weight;  /* (out_channels, chunks, taps), plus 128 */
    const int32_t *channel; /* (out_channels, 2): bias less x_zero_point * sum of weights, word of the rescale */
    const uint8_t *extra;   /* for every output: (chunk, taps weights)..., 255; null where no chunk has more than fits */
} planish_armv6m_conv2d_layer;

#endif
