/* Layer of the depthwise convolution with MVE. */
#ifndef PLANISH_MVE_DEPTHWISE_CONV2D_H
#define PLANISH_MVE_DEPTHWISE_CONV2D_H

#include "planish.h"

typedef struct {
    int32_t in_height, in_width, channels, out_height, out_width;
    int32_t kernel_height, kernel_width, stride_height, stride_width, pad_top, pad_left;
    int32_t x_zero_point, y_zero_point, low, high;
    int32_t strip;          /* rows of tiles that are in scratch together */
    const uint32_t *weight; /* for every channel bias, rescale, and the columns of the kernel */
} planish_mve_depthwise_conv2d_layer;

#endif
