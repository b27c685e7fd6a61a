/* Softmax without a floating-point library. */
#ifndef PLANISH_ARMV6M_SOFTMAX_H
#define PLANISH_ARMV6M_SOFTMAX_H

#include <stdint.h>

typedef struct {
    int32_t outer, size, inner, y_zero_point, low, high;
    uint32_t inverse_scale;       /* a float32, as bits */
    const uint32_t *exponentials; /* (256), float32 as bits, of the largest code less 255, 254, ..., 0 */
} planish_armv6m_softmax_layer;

void planish_armv6m_softmax(const planish_armv6m_softmax_layer *layer, const int8_t *x, int8_t *y);

#endif
