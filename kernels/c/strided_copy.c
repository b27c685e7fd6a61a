/* Copies a box of codes: transpose, slice. The innermost dimension is a plain loop, the others are counted. */
#include "planish.h"

enum { MOST = 6 };

void planish_strided_copy(const planish_strided_copy_layer *l, const int8_t *x, int8_t *y)
{
    int32_t index[MOST] = {0, 0, 0, 0, 0, 0};
    int32_t last = l->dimensions - 1;
    int32_t width = l->sizes[last], step = l->strides[last];
    int32_t offset = l->offset;
    int32_t d, i;
    for (;;) {
        for (i = 0; i < width; i++) {
            y[i] = planish_look_up(l->table, x[offset + i * step]);
        }
        y += width;
        for (d = last - 1; d >= 0; d--) {
            index[d]++;
            offset += l->strides[d];
            if (index[d] < l->sizes[d]) {
                break;
            }
            offset -= index[d] * l->strides[d];
            index[d] = 0;
        }
        if (d < 0) {
            return;
        }
    }
}
