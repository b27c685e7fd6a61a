/* Add with MVE. */
#ifndef PLANISH_MVE_ADD_H
#define PLANISH_MVE_ADD_H

#include "planish.h"

/* code = clamp((start + a * factor_a + b * factor_b) >> PLANISH_SHIFT): for all codes a and b what the formula of planish_add gives;
 * element i of a meets element i % operand_size of b */
typedef struct {
    int32_t size, operand_size, factor_a, factor_b, start, low, high;
} planish_mve_add_layer;

typedef struct {
    int32_t size, operand_size, factor_a, factor_b, start, low, high;
    const int8_t *operand; /* b, (operand_size) */
} planish_mve_add_constant_layer;

#endif
