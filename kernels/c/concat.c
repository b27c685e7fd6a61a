/* Joins tensors along one dimension. Inputs whose scale differs from the output's go through a table. */
#include "planish.h"

void planish_concat(const planish_concat_layer *l, const int8_t *const *x, int8_t *y)
{
    int32_t o, i;
    for (o = 0; o < l->outer; o++) {
        for (i = 0; i < l->inputs; i++) {
            int32_t width = l->widths[i];
            planish_copy(l->mapped[i] < 0 ? 0 : l->tables + l->mapped[i] * 256, x[i] + o * width, y, width);
            y += width;
        }
    }
}
