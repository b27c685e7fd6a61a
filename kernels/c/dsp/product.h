/* Products of a constant matrix with one or two columns of activations, for cores with the DSP extension and an FPU.
 *
 * SMLAD multiplies two pairs of 16-bit numbers and adds both products. Activations are expanded once to such pairs: of four
 * neighbours x0 x1 x2 x3 the words (x0, x2) and (x1, x3), lower half first, which is what SXTB16 makes of a word.
 * Depths are padded to whole units of four with weights 0; outputs come in groups of four.
 *
 * Weights are packed so that most of them need no unpacking: one 16-bit number h holds a weight of two or four outputs,
 *
 *     8 bits     h = 256 w0 + w1                                       w0 w1 and w2 w3 in two words
 *     8 bits far the bytes w0 and w1, w2 and w3                        in two words, each extended on its own
 *     4 bits     h = 4096 w0 + 256 (w1 + 8) + 16 (w2 + 8) + (w3 + 8)
 *     4 bits far the bytes 16 w0 + (w1 + 8), 16 w2 + (w3 + 8)          in one word
 *     2 bits     h = 64 w0 + 16 (w1 + 2) + 4 (w2 + 2) + (w3 + 2)       in one byte
 *
 * h itself, and h with its highest fields masked off one after the other, are multiplied by the same activations. The sums
 * r0, r1, r2, r3 hold all fields from one's own down, so the difference of neighbours is a power of two times the wanted sum,
 * plus the bias of the field (8 or 2) times the sum of the activations. The power of two is in the output's factor; that
 * float32(2^n a) * (f / 2^n) = float32(a) * f exactly, and that nothing overflows, is checked when the weights are packed. The
 * differences are right modulo 2^32, so the r themselves may overflow. Weights whose sums are beyond this have the far form.
 *
 * Stream of 32-bit words for each group of four outputs: 4 start values of r, which hold the biases; the weights, unit after unit,
 * depths (0, 2) before (1, 3), outputs 0 and 1 before 2 and 3; 4 factors (float).
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

/* planish_product_<form>: two columns. pairs holds (0, 2) of the first, of the second, (1, 3) of the first, of the second, and so
 * on. Writes 4 * groups codes to y and to y + second, both multiples of 4.
 *
 * planish_row_product_<form>: one column. x holds 4 * units codes, units even; x and y are multiples of 4; sum is that of x, which
 * narrow weights need. */
#define PLANISH_PRODUCT(FORM)                                                                                      \
    void planish_product_##FORM(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second); \
    void planish_row_product_##FORM(const planish_product *product, const int8_t *x, int8_t *y, int32_t sum)
PLANISH_PRODUCT(8);
PLANISH_PRODUCT(8_far);
PLANISH_PRODUCT(4);
PLANISH_PRODUCT(4_far);
PLANISH_PRODUCT(2);

/* A and B, both expanded, as one name */
#define PLANISH_JOIN(A, B) A##B
#define PLANISH_NAME(A, B) PLANISH_JOIN(A, B)

/* Codes of 8, 4 or 2 bits to pairs: `words` words of a and of b, interleaved as above, then `step` bytes further on those of the
 * next row, for `rows` rows. a and b are multiples of 4. Returns the end.
 * A word of 4-bit codes gives the pairs (0, 4), (1, 5), (2, 6), (3, 7) of each column, one of 2-bit codes (0, 8) to (7, 15); their
 * zero is moved: 8 or 2 is added. */
#define PLANISH_EXPAND(BITS)                                                                                     \
    uint32_t *planish_expand_##BITS(const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words, int32_t rows, \
                                    int32_t step)
PLANISH_EXPAND(8);
PLANISH_EXPAND(4);
PLANISH_EXPAND(2);

#endif
