/* Add on cores with the DSP extension: with integer factors where some were found, else as planish_add does. */
#ifndef PLANISH_DSP_ADD_H
#define PLANISH_DSP_ADD_H

#include "planish.h"

/* code = clamp((start + (a * 256 * factor_a >> 16) + (b * 256 * factor_b >> 16)) >> PLANISH_DSP_ADD_SHIFT), for all codes a and b
 * what the formula of planish_add gives; element i of a meets element i % operand_size of b */
enum { PLANISH_DSP_ADD_SHIFT = 20 };

typedef struct {
    int32_t size, operand_size, factor_a, factor_b, start, low, high;
} planish_dsp_add_layer;

void planish_dsp_add(const planish_dsp_add_layer *layer, const int8_t *a, const int8_t *b, int8_t *y);

typedef struct {
    int32_t size, operand_size, factor_a, factor_b, start, low, high;
    const int8_t *operand; /* b, (operand_size), at a multiple of 4 */
} planish_dsp_add_constant_layer;

void planish_dsp_add_constant(const planish_dsp_add_constant_layer *layer, const int8_t *a, int8_t *y);

typedef planish_dsp_add_layer planish_dsp_add_narrow_layer; /* of dsp/add_narrow.c */

typedef planish_add_layer planish_dsp_add_float_layer;
typedef planish_add_constant_layer planish_dsp_add_float_constant_layer;

void planish_dsp_add_float(const planish_dsp_add_float_layer *layer, const int8_t *a, const int8_t *b, int8_t *y);
void planish_dsp_add_float_constant(const planish_dsp_add_float_constant_layer *layer, const int8_t *a, int8_t *y);

#endif
