/* Matrix product of two activations. A few columns of b at a time wait in scratch, less their zero point, for all rows of a. */
#include "planish.h"

enum { COLUMNS = 4 };

void planish_matmul(const planish_matmul_layer *l, const int8_t *a, const int8_t *b, int8_t *y, int8_t *scratch)
{
    int16_t *held = (int16_t *)(void *)scratch; /* (COLUMNS, depth) */
    float low = (float)(l->low - l->y_zero_point), high = (float)(l->high - l->y_zero_point);
    int32_t batch, first, row, c, k, depth = l->depth;

    for (batch = 0; batch < l->batches; batch++) {
        const int8_t *left = a + l->a_offset + batch * l->a_batch;
        const int8_t *right = b + l->b_offset + batch * l->b_batch;
        int8_t *out = y + l->y_offset + batch * l->y_batch;
        for (first = 0; first < l->columns; first += COLUMNS) {
            int32_t count = l->columns - first < COLUMNS ? l->columns - first : COLUMNS;
            for (c = 0; c < COLUMNS; c++) {
                for (k = 0; k < depth; k++) { /* columns that are not there are 0 */
                    held[c * depth + k] = 0;
                    if (c < count) {
                        held[c * depth + k] =
                            (int16_t)(right[k * l->b_row + (first + c) * l->b_column] - l->b_zero_point);
                    }
                }
            }
            for (row = 0; row < l->rows; row++) {
                const int8_t *in = left + row * l->a_row;
                const int16_t *w = held;
                int32_t sum[COLUMNS], sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
                for (k = 0; k < depth; k++) {
                    int32_t value = *in - l->a_zero_point;
                    in += l->a_column;
                    sum0 += value * w[0];
                    sum1 += value * w[depth];
                    sum2 += value * w[2 * depth];
                    sum3 += value * w[3 * depth];
                    w++;
                }
                sum[0] = sum0;
                sum[1] = sum1;
                sum[2] = sum2;
                sum[3] = sum3;
                for (c = 0; c < count; c++) {
                    out[row * l->y_row + (first + c) * l->y_column] =
                        planish_requantize(sum[c], l->rescale, low, high, l->y_zero_point);
                }
            }
        }
    }
}
