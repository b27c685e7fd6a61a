/* Fully connected layer on one row, four outputs at a time (dsp/product.h).
 *
 * A template:
 *   WEIGHT_BITS 8, 4 or 2; FAR 1: sums may be of any size
 *   COPIED 1: the inputs are brought to scratch first, because they are packed (X_BITS) or no multiple of 8
 *   STAGED 1: the codes are written to scratch first, for outputs that are clamped, packed (Y_BITS) or no multiple of 4
 */
#include "dsp/fully_connected.h"
#include "dsp/emit.h"
#include "dsp/halves.h"
#include "dsp/product.h"

#if FAR
#define PRODUCT PLANISH_NAME(PLANISH_NAME(planish_row_product_, WEIGHT_BITS), _far)
#else
#define PRODUCT PLANISH_NAME(planish_row_product_, WEIGHT_BITS)
#endif

#if WEIGHT_BITS < 8
static int32_t sum_of(const int8_t *x, int32_t words)
{
    int32_t total = 0;
    for (; words > 0; words--) {
        uint32_t word = planish_load_word(x);
        total = planish_dot(planish_even_bytes(word), 0x00010001u, total);
        total = planish_dot(planish_odd_bytes(word), 0x00010001u, total);
        x += 4;
    }
    return total;
}
#endif

void PLANISH_KERNEL(const planish_dsp_fully_connected_layer *l, const int8_t *x, int8_t *y
#if COPIED || STAGED
                    , int8_t *scratch
#endif
)
{
    int32_t sum = 0;
    planish_product product;
    product.weight = l->weight;
    product.units = l->units;
    product.groups = l->groups;
    product.zero_points = (uint32_t)(l->y_zero_point + 128) * 0x00010001u;
#if COPIED
    {
        int8_t *row = scratch; /* (4 * units) */
        int32_t i;
        for (i = 0; i < l->in_features; i++) {
#if X_BITS == 8
            row[i] = x[i];
#else
            enum { EACH = 8 / X_BITS, ABOVE = 32 - X_BITS };
            row[i] = (int8_t)((int32_t)((uint32_t)x[i / EACH] << (ABOVE - i % EACH * X_BITS)) >> ABOVE);
#endif
        }
        for (; i < 4 * l->units; i++) {
            row[i] = 0;
        }
        x = row;
        scratch += 4 * l->units;
    }
#endif
#if WEIGHT_BITS < 8
    sum = sum_of(x, l->units);
#endif
#if STAGED
    PRODUCT(&product, x, scratch, sum); /* (4 * groups) */
    planish_emit(scratch, l->out_features, l->low, l->high, y, 0);
#else
    PRODUCT(&product, x, y, sum);
#endif
}
