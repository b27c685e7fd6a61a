/* Layer normalization on cores with the DSP extension and an FPU: the layer of the portable kernel. */
#ifndef PLANISH_DSP_LAYER_NORM_H
#define PLANISH_DSP_LAYER_NORM_H

#include "planish.h"

typedef planish_layer_norm_layer planish_dsp_layer_norm_layer;

/* size is a multiple of 4 */
void planish_dsp_layer_norm(const planish_dsp_layer_norm_layer *layer, const int8_t *x, int8_t *y);

#endif
