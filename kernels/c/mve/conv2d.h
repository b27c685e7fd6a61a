/* Layer of the convolution with MVE. */
#ifndef PLANISH_MVE_CONV2D_H
#define PLANISH_MVE_CONV2D_H

#include "planish.h"

typedef struct {
    int32_t in_height, in_width, in_channels, out_height, out_width, out_channels;
    int32_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
    int32_t x_zero_point, y_zero_point, low, high;
    int32_t words;          /* of `weight` */
    const uint32_t *weight; /* packed with bias and rescale: see mve/windows.h */
} planish_mve_conv2d_layer;

#endif
