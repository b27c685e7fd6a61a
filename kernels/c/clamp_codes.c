/* Relu, Relu6 and Clip on codes whose scale stays. */
#include "planish.h"

void planish_clamp_codes(const planish_clamp_codes_layer *l, const int8_t *x, int8_t *y)
{
    int32_t low = l->low, high = l->high, size = l->size;
    int32_t i;
    for (i = 0; i < size; i++) {
        int32_t code = x[i] < low ? low : x[i];
        y[i] = (int8_t)(code > high ? high : code);
    }
}
