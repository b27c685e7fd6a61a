/* Products of a constant matrix with one or two columns of activations, for cores with the DSP extension and an FPU.
 *
 * SMLAD multiplies two pairs of 16-bit numbers and adds both products. Activations are expanded once to such pairs: of four
 * neighbours x0 x1 x2 x3 the words (x0, x2) and (x1, x3), lower half first, which is what SXTB16 makes of a word.
 * Depths are padded to whole units of four with weights 0; outputs come in groups of four.
 *
 * Weights are packed so that most of them need no unpacking: one 16-bit number h holds a weight of two or four outputs,
 *
 *     8 bits     h = 256 w0 + w1                                       w0 w1 and w2 w3 in two words
 *     4 bits     h = 4096 w0 + 256 (w1 + 8) + 16 (w2 + 8) + (w3 + 8)
 *     2 bits     h = 64 w0 + 16 (w1 + 2) + 4 (w2 + 2) + (w3 + 2)       in one byte
 *
 * h itself, and h with its highest fields masked off one after the other, are multiplied by the same activations. The sums
 * r0, r1, r2, r3 hold all fields from one's own down, so the difference of neighbours is a power of two times the wanted sum,
 * plus the bias of the field (8 or 2) times the sum of the activations. The power of two is in the output's factor; that
 * float32(2^n a) * (f / 2^n) = float32(a) * f exactly, and that nothing overflows, is checked when the weights are packed. The
 * differences are right modulo 2^32, so the r themselves may overflow.
 *
 * Stream of 32-bit words for each group of four outputs: 4 start values of r, the weights (unit after unit, a word for each
 * pair of depths, (0, 2) before (1, 3)), 4 factors (float).
 */
#ifndef PLANISH_DSP_PRODUCT_H
#define PLANISH_DSP_PRODUCT_H

#include <stdint.h>

typedef struct {
    const uint32_t *weight; /* groups streams */
    int32_t units;          /* of four depths */
    int32_t groups;         /* of four outputs */
    uint32_t zero_points;   /* y_zero_point + 128 in both halves */
} planish_product;

/* Two columns: pairs holds (0, 2) of the first, of the second, (1, 3) of the first, of the second, and so on. Writes
 * 4 * groups codes to y and to y + second, both multiples of 4. */
void planish_product_8(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second);
void planish_product_4(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second);
void planish_product_2(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second);

/* One column: x holds 4 * units codes, units even; x and y are multiples of 4. sum is that of x. */
void planish_row_product_8(const planish_product *product, const int8_t *x, int8_t *y, int32_t sum);
void planish_row_product_4(const planish_product *product, const int8_t *x, int8_t *y, int32_t sum);
void planish_row_product_2(const planish_product *product, const int8_t *x, int8_t *y, int32_t sum);

/* int8 codes to pairs: words words of a and of b, interleaved as above. a and b are multiples of 4. Returns the end. */
uint32_t *planish_expand(const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words);

#endif
