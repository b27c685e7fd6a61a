/* Pools and products with MVE: the layers of the portable kernels. */
#ifndef PLANISH_MVE_POOLS_H
#define PLANISH_MVE_POOLS_H

#include "planish.h"

typedef planish_global_average_pool_layer planish_mve_global_average_pool_layer;
typedef planish_max_pool_layer planish_mve_max_pool_layer;
typedef planish_mul_layer planish_mve_mul_layer;
typedef planish_mul_constant_layer planish_mve_mul_constant_layer;

void planish_mve_global_average_pool(const planish_mve_global_average_pool_layer *layer, const int8_t *x, int8_t *y);
void planish_mve_max_pool(const planish_mve_max_pool_layer *layer, const int8_t *x, int8_t *y);
void planish_mve_mul(const planish_mve_mul_layer *layer, const int8_t *a, const int8_t *b, int8_t *y);
void planish_mve_mul_constant(const planish_mve_mul_constant_layer *layer, const int8_t *a, int8_t *y);

#endif
