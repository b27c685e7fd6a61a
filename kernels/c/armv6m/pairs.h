/* Dot products of two pixels at once.
 *
 * A word holds the codes of two pixels, a + b * 2^16, so that one product with a weight serves both. A chunk of TAPS products is
 * summed before the sums are taken apart; the weights are such that no sum of a chunk leaves 16 bits. Weights are stored
 * plus Z = 2^(WEIGHT_BITS - 1), since unsigned bytes load with less ado, and every chunk of words starts with what takes that back:
 *
 *     start = 2^15 - Z * (sum of the chunk's words)          sum = start + word * weight + ...
 *     second += sum >> 16                                    2^15 makes the low half positive: nothing is borrowed
 *     both   += sum                                          first = both - second * 2^16 - chunks * 2^15
 *
 * Chunks with heavier weights are stored with a part of them; the rest comes as `extra` chunks on the same words.
 *
 * Weights of 4 and 2 bits fill one 32-bit word a chunk, w0 + w1 * 2^b + ..., which is shifted right by b bits for every
 * product. What is left above the weight then, w[k] + (rest) * 2^b, is made good by words that hold x[k] - x[k - 1] * 2^b:
 * modulo 2^32 the sum of a whole chunk is the same.
 */
#ifndef PLANISH_ARMV6M_PAIRS_H
#define PLANISH_ARMV6M_PAIRS_H

#include "armv6m/requantize.h"

/* what the loop over outputs needs: the assembler knows this order */
typedef struct {
    const int32_t *words;
    int8_t *y;
    int32_t y_step; /* from the first pixel to the second */
    uint32_t half, before;
    int32_t start;   /* - chunks * 2^15 */
    int32_t skipped; /* bytes of weights before the first chunk in the unrolled loop */
    const uint8_t *extra;
    uint32_t limit;
    const planish_scale *scale;
    const int32_t *channel_end;
    int32_t entry; /* bytes of code before the first chunk */
    uint32_t window;
    int32_t low, high;
    const int32_t *channel;
    const int32_t *words_end;
    const uint8_t *weight;
} planish_pairs;

/* chunks of words from the codes of two pixels; the end of them */
int32_t *planish_armv6m_expand_8x2(const int8_t *a, const int8_t *b, int32_t *to, int32_t chunks);
int32_t *planish_armv6m_expand_8x3(const int8_t *a, const int8_t *b, int32_t *to, int32_t chunks);
int32_t *planish_armv6m_expand_8x4(const int8_t *a, const int8_t *b, int32_t *to, int32_t chunks);
int32_t *planish_armv6m_expand_8x8(const int8_t *a, const int8_t *b, int32_t *to, int32_t chunks);
int32_t *planish_armv6m_expand_4x8(const int8_t *a, const int8_t *b, int32_t *to, int32_t chunks);
int32_t *planish_armv6m_expand_2x16(const int8_t *a, const int8_t *b, int32_t *to, int32_t chunks);

typedef int32_t *planish_expand(const int8_t *a, const int8_t *b, int32_t *to, int32_t chunks);

#endif
