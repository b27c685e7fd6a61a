/* Layer of the fully connected layer with MVE. */
#ifndef PLANISH_MVE_FULLY_CONNECTED_H
#define PLANISH_MVE_FULLY_CONNECTED_H

#include "planish.h"

typedef struct {
    int32_t in_features, out_features, y_zero_point, low, high;
    int32_t words;          /* of `weight` */
    const uint32_t *weight; /* packed with bias and rescale: see mve/fully_connected.c */
} planish_mve_fully_connected_layer;

#endif
