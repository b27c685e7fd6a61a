/* Mean of each channel over all pixels, without floating point. */
#ifndef PLANISH_ARMV6M_GLOBAL_AVERAGE_POOL_H
#define PLANISH_ARMV6M_GLOBAL_AVERAGE_POOL_H

#include "armv6m/requantize.h"

typedef struct {
    int32_t pixels, channels, bias; /* - x_zero_point * pixels */
    uint32_t word;                  /* of the rescale */
    planish_scale scale;
} planish_armv6m_global_average_pool_layer;

void planish_armv6m_global_average_pool(const planish_armv6m_global_average_pool_layer *layer, const int8_t *x, int8_t *y);

#endif
