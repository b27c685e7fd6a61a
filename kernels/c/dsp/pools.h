/* Pools and products on cores with the DSP extension and an FPU: the layers of the portable kernels. */
#ifndef PLANISH_DSP_POOLS_H
#define PLANISH_DSP_POOLS_H

#include "planish.h"

typedef planish_global_average_pool_layer planish_dsp_global_average_pool_layer;
typedef planish_average_pool_layer planish_dsp_average_pool_layer;
typedef planish_max_pool_layer planish_dsp_max_pool_layer;

void planish_dsp_average_pool(const planish_dsp_average_pool_layer *layer, const int8_t *x, int8_t *y);

/* the part of a window along one axis that lies inside the image: taps `first` to `end` - 1, the first one at `position` */
typedef struct {
    int32_t first, end, position;
} planish_taps;

static inline planish_taps planish_taps_of(int32_t start, int32_t kernel, int32_t dilation, int32_t size)
{
    planish_taps t;
    t.first = start < 0 ? (dilation - 1 - start) / dilation : 0;
    t.first = t.first < kernel ? t.first : kernel;
    t.end = start < size ? (size - start + dilation - 1) / dilation : 0;
    t.end = t.end < kernel ? t.end : kernel;
    t.end = t.end > t.first ? t.end : t.first;
    t.position = start + t.first * dilation;
    return t;
}

#endif
