/* Relu, Relu6 and Clip on codes whose scale stays. */
#include "planish.h"

void planish_clamp_codes(const planish_clamp_codes_layer *l, const int8_t *x, int8_t *y)
{
    int8_t low = (int8_t)l->low, high = (int8_t)l->high;
    int32_t i;
    for (i = 0; i < l->size; i++) {
        int8_t code = x[i] < low ? low : x[i];
        y[i] = code > high ? high : code;
    }
}
