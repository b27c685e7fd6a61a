/* Any function of one code: a table of 256. */
#include "planish.h"

void planish_lookup(const planish_lookup_layer *l, const int8_t *x, int8_t *y)
{
    int32_t i;
    for (i = 0; i < l->size; i++) {
        y[i] = planish_look_up(l->table, x[i]);
    }
}
