/* Mul on cores with the DSP extension and an FPU: the layers of the portable kernel. */
#ifndef PLANISH_DSP_MUL_H
#define PLANISH_DSP_MUL_H

#include "planish.h"

typedef planish_mul_layer planish_dsp_mul_layer;
typedef planish_mul_constant_layer planish_dsp_mul_constant_layer;

void planish_dsp_mul(const planish_dsp_mul_layer *layer, const int8_t *a, const int8_t *b, int8_t *y);
void planish_dsp_mul_constant(const planish_dsp_mul_constant_layer *layer, const int8_t *a, int8_t *y);

#endif
