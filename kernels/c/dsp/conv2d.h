/* Layers of the convolutions for cores with the DSP extension. */
#ifndef PLANISH_DSP_CONV2D_H
#define PLANISH_DSP_CONV2D_H

#include <stdint.h>

/* channels last */
typedef struct {
    int32_t in_height, in_width, in_channels, out_height, out_width, out_channels, groups;
    int32_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
    int32_t x_zero_point, y_zero_point, low, high, units;
    const uint32_t *weight; /* streams of product.h for each group */
} planish_dsp_conv2d_layer;

#endif
