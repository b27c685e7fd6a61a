/* Add and mul without floating point: linear in the codes, with factors that were tried on all pairs of codes at export. */
#ifndef PLANISH_ARMV6M_ELEMENTWISE_H
#define PLANISH_ARMV6M_ELEMENTWISE_H

#include <stdint.h>

/* code = clamp((start + a * factor_a + b * factor_b) >> shift); `even` 1: where the bits shifted out are all 0, a tie was
 * rounded up, and an odd code is one too large. Element i of a meets element i % operand_size of b */
typedef struct {
    int32_t size, operand_size, factor_a, factor_b, start, shift, even, low, high;
} planish_armv6m_add_layer;

void planish_armv6m_add(const planish_armv6m_add_layer *layer, const int8_t *a, const int8_t *b, int8_t *y);

typedef struct {
    int32_t size, operand_size, factor_a, factor_b, start, shift, even, low, high;
    const int8_t *operand; /* b, (operand_size) */
} planish_armv6m_add_constant_layer;

void planish_armv6m_add_constant(const planish_armv6m_add_constant_layer *layer, const int8_t *a, int8_t *y);

/* p = (a - a_zero_point) * (b - b_zero_point); code = clamp((start + p * upper + (p * lower >> 14)) >> shift) */
typedef struct {
    int32_t size, operand_size, a_zero_point, b_zero_point, upper, lower, start, shift, even, low, high;
} planish_armv6m_mul_layer;

void planish_armv6m_mul(const planish_armv6m_mul_layer *layer, const int8_t *a, const int8_t *b, int8_t *y);

typedef struct {
    int32_t size, operand_size, a_zero_point, b_zero_point, upper, lower, start, shift, even, low, high;
    const int8_t *operand; /* b, (operand_size) */
} planish_armv6m_mul_constant_layer;

void planish_armv6m_mul_constant(const planish_armv6m_mul_constant_layer *layer, const int8_t *a, int8_t *y);

#endif
