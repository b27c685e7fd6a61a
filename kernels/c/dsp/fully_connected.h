/* Layers of the fully connected kernel for cores with the DSP extension. */
#ifndef PLANISH_DSP_FULLY_CONNECTED_H
#define PLANISH_DSP_FULLY_CONNECTED_H

#include <stdint.h>

/* one row of inputs */
typedef struct {
    int32_t in_features, out_features, y_zero_point, low, high, units, groups;
    const uint32_t *weight; /* streams of product.h */
} planish_dsp_fully_connected_layer;

#endif
