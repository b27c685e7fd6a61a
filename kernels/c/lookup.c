/* Any function of one code: a table of 256. */
#include "planish.h"

void planish_lookup(const planish_lookup_layer *l, const int8_t *x, int8_t *y)
{
    const int8_t *table = l->table; /* copies: y might lie over the layer, for all that the compiler knows */
    int32_t size = l->size, i;
    for (i = 0; i < size; i++) {
        y[i] = table[(int32_t)x[i] + 128];
    }
}
