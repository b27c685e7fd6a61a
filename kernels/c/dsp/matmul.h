/* Matrix product of two activations on cores with the DSP extension and an FPU. */
#ifndef PLANISH_DSP_MATMUL_H
#define PLANISH_DSP_MATMUL_H

#include "planish.h"

/* The members of planish_matmul_layer, and how the operands are brought into scratch: `units` of four depths; `held` columns of b at a
 * time, a multiple of 4. a_words: rows of a lie in words. b_words: columns of b do (1), or its rows, four columns to a word (2). */
typedef struct {
    int32_t batches, rows, columns, depth;
    int32_t a_offset, a_batch, a_row, a_column;
    int32_t b_offset, b_batch, b_row, b_column;
    int32_t y_offset, y_batch, y_row, y_column;
    int32_t a_zero_point, b_zero_point, y_zero_point, low, high;
    float rescale;
    int32_t units, held, a_words, b_words;
} planish_dsp_matmul_layer;

/* scratch: 8 * units * (held + 2) bytes */
void planish_dsp_matmul(const planish_dsp_matmul_layer *layer, const int8_t *a, const int8_t *b, int8_t *y, int8_t *scratch);

#endif
