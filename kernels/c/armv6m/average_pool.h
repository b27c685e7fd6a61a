/* Mean over a window; floating point only where rounding is in doubt. */
#ifndef PLANISH_ARMV6M_AVERAGE_POOL_H
#define PLANISH_ARMV6M_AVERAGE_POOL_H

#include "armv6m/requantize.h"
#include "planish.h"

typedef struct {
    planish_average_pool_layer formula;
    planish_scale scale;
    const uint32_t *words; /* (taps + 1), by what a sum is divided by */
} planish_armv6m_average_pool_layer;

void planish_armv6m_average_pool(const planish_armv6m_average_pool_layer *layer, const int8_t *x, int8_t *y);

#endif
